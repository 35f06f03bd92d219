"""One latent for keys and values together, by principal components of both; keys are turned after they were rebuilt.

    z = D [k ; v] before rope      M = Σ z zᵀ      R_r = the r leading eigenvectors of M
    c = R_rᵀ D [W_k ; W_v] x       [k ; v] = D⁻¹ R_r c + [b_k ; b_v]

D weighs an error by what reads it: keys by the root mean square of their queries, the same for both columns of a rope
pair, since rope mixes these; values by (Σ_h W_o,hᵀ W_o,h)^½ over the heads of their group. Then the keys are divided by
ρ, the ratio of the two halves' root mean squares, which keeps the louder of them from taking all components. Biases
stay outside of the latent. Nothing is cached but c, r numbers for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.convert.attention import ConvertedAttention
from ...rewriter.convert.calibrate import Calibration
from ...rewriter.convert.layers import Affine, AttentionLayer, Decoder, Rotary
from ...rewriter.convert.memory import Memory, heads_of
from ...rewriter.convert.rank import even_ranks, ranks_by_energy
from ...rewriter.convert.recipe import Needs, part, recipe
from ...rewriter.convert.rotation import Turns
from ...rewriter.convert.weighing import value_roots

__all__ = ["JointLatent", "JointMemory", "basis", "factors", "keys_of", "stacked", "weighing"]


@recipe
@dataclass(frozen=True)
class JointLatent:
    """Cache one latent of r numbers instead of keys and values; rebuild both from it.

    `rank` is r for every layer; without it the ranks fit into `share` of the bytes that keys and values take, angles of
    the positions included. With `ranks="energy"` layers get what their spectra need, at the same total. Without `weigh`
    all columns count alike, without `balance` so do keys and values.
    """

    rank: int | None = None
    share: float = 0.5
    ranks: Literal["even", "energy"] = "even"
    weigh: bool = True
    balance: bool = True

    name: ClassVar[str] = "joint_latent"
    needs: ClassVar[Needs] = "text"
    exact: ClassVar[str] = "at rank G(d + e), the width of keys and values together"

    def convert(self, attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration) -> None:
        """Put a JointMemory into every attention. Raises ConversionRefused."""
        maps = {layer.path: stacked(layer) for layer in decoder.layers}
        queries = {layer.path: layer.query.flat for layer in decoder.layers} if self.weigh else {}
        moments, squares = calibration.moments(maps, queries, self.name)
        weights = [weighing(layer, squares[layer.path]) if self.weigh else None for layer in decoder.layers]
        bases = [
            basis(moments[layer.path] if d is None else d @ moments[layer.path] @ d.t(), keys_of(layer), self.balance)
            for layer, d in zip(decoder.layers, weights, strict=True)
        ]
        wanted = even_ranks(decoder, self.share) if self.rank is None else [self.rank] * len(bases)
        if self.ranks == "energy":
            wanted = ranks_by_energy([energy for _, energy, _ in bases], sum(wanted))
        for at, (vectors, _, rho) in enumerate(bases):
            memory = JointMemory.of(decoder.layers[at], vectors[:, : wanted[at]], rho, weights[at])
            attentions[at].replace_memory(memory, self.name)


def keys_of(layer: AttentionLayer) -> int:
    """G·d."""
    return layer.groups * layer.key_width


def stacked(layer: AttentionLayer) -> Tensor:
    """[W_k ; W_v], [G(d + e), C]."""
    return torch.cat((layer.key.flat, layer.value.flat))


def weighing(layer: AttentionLayer, query_squares: Tensor) -> Tensor:
    """D, [G(d + e), G(d + e)], from Σ q² of every query column [H·d]."""
    groups, width = layer.groups, layer.key_width
    felt = query_squares.view(groups, -1, width).sum(1)
    if (rotary := layer.rotary) is not None:
        turned = felt[:, rotary.first : rotary.first + rotary.width]
        if rotary.form == "half":
            felt[:, rotary.first : rotary.first + rotary.width] = turned.view(groups, 2, -1).mean(1).repeat(1, 2)
        else:
            pairs = turned.view(groups, -1, 2).mean(2)
            felt[:, rotary.first : rotary.first + rotary.width] = pairs.repeat_interleave(2, 1)
    keys = felt.flatten().clamp_min(1e-8 * float(felt.max())).sqrt()
    blocks: Tensor = torch.block_diag(torch.diag(keys), *value_roots(layer))
    return blocks


def basis(moment: Tensor, keys: int, balance: bool = True) -> tuple[Tensor, Tensor, float]:
    """Eigenvectors of a second moment, the leading ones first, their eigenvalues, and ρ.

    Balanced, its first `keys` rows and columns are divided by ρ.
    """
    rms = moment.diagonal().clamp_min(0).sqrt()
    balance = balance and 0 < keys < len(rms)
    rho = float(rms[:keys].mean() / rms[keys:].mean().clamp_min(1e-30)) if balance else 1.0
    scale = torch.ones_like(rms)
    scale[:keys] = 1 / rho
    energy, vectors = torch.linalg.eigh(scale[:, None] * moment * scale)
    return vectors.flip(1), energy.flip(0).clamp_min(0), rho


def factors(vectors: Tensor, keys: int, rho: float) -> tuple[Tensor, Tensor]:
    """R_rᵀ with its first `keys` columns divided by ρ [r, n], and R_r with its first rows times ρ [n, r]."""
    scale = torch.ones(len(vectors), 1, dtype=vectors.dtype, device=vectors.device)
    scale[:keys] = 1 / rho
    return (scale * vectors).t(), vectors / scale


@part
class JointMemory(Memory):
    """c = W x;  k = U_k c, turned;  v = U_v c."""

    turns_late: ClassVar[bool] = True

    def __init__(
        self,
        hidden: int,
        rank: int,
        groups: int,
        key_width: int,
        value_width: int,
        bias: Sequence[bool],
        rotary: Rotary | None,
    ) -> None:
        super().__init__(rotary)
        self.groups = groups
        self.down = nn.Linear(hidden, rank, bias=False)
        self.up_key = nn.Linear(rank, groups * key_width, bias[0])
        self.up_value = nn.Linear(rank, groups * value_width, bias[1])

    @classmethod
    def of(cls, layer: AttentionLayer, vectors: Tensor, rho: float, weights: Tensor | None = None) -> JointMemory:
        """From an orthonormal basis [G(d + e), r] of the balanced keys and values, weighed by `weights`, D."""
        keys, dtype = keys_of(layer), layer.key.weight.dtype
        into, up = factors(vectors, keys, rho)
        if weights is not None:
            into, up = into @ weights, torch.linalg.solve(weights, up)
        down = into @ stacked(layer).to(vectors)
        rank, hidden = down.shape
        with torch.device("meta"):
            made = cls(hidden, rank, layer.groups, layer.key_width, layer.value_width, (True, True), layer.rotary)
        made.down = Affine(down.to(dtype)).linear()
        made.up_key = Affine(up[:keys].to(dtype), layer.key.bias).linear()
        made.up_value = Affine(up[keys:].to(dtype), layer.value.bias).linear()
        return made

    def settings(self) -> dict[str, object]:
        return {
            "hidden": self.down.in_features,
            "rank": self.down.out_features,
            "groups": self.groups,
            "key_width": self.up_key.out_features // self.groups,
            "value_width": self.up_value.out_features // self.groups,
            "bias": [self.up_key.bias is not None, self.up_value.bias is not None],
        }

    def new(self, hidden: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        latent = self.down(hidden).unsqueeze(1)
        return latent, latent[..., :0]

    def read(self, first: Tensor, second: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        latent = first.squeeze(1)
        key = heads_of(self.up_key(latent), self.groups)
        return self.turned(key, turns), heads_of(self.up_value(latent), self.groups)
