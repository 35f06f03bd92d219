"""Multi-head latent attention from the weights alone, as a start for distillation (X-EcoMLA, Zebra-Llama).

    [W_k ; W_v] = U Σ Vᵀ     c = Σ_r V_rᵀ x     k = U_r[k] c     v = U_r[v] c

A head keeps d - d_r of its columns without positions, from the latent; its last d_r columns, averaged over the groups,
are the key that all heads share. They are turned by the angles of a rope of width d_r. Even at full rank this is not
the model it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...rewriter.convert.attention import ConvertedAttention
from ...rewriter.convert.calibrate import Calibration
from ...rewriter.convert.layers import Affine, AttentionLayer, ConversionRefused, Decoder, Rotary
from ...rewriter.convert.rank import even_ranks
from ...rewriter.convert.recipe import Needs, recipe
from .joint_latent import keys_of, stacked
from .mla import put_mla, required_rotary

__all__ = ["WeightSVD"]


@recipe
@dataclass(frozen=True)
class WeightSVD:
    """Start a distillation to multi-head latent attention from the weights; the result needs distillation.

    `rope_dim` columns of each head are turned, by default half of those that the model turns. `rank` is that of the
    latent; without it latent and shared key fit into `share` of the bytes that keys and values take.
    """

    rope_dim: int | None = None
    rank: int | None = None
    share: float = 0.5

    name: ClassVar[str] = "weight_svd"
    needs: ClassVar[Needs] = "nothing"
    exact: ClassVar[str] = "never: keys change their positions, so it needs distillation"

    def convert(self, attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration) -> None:
        """Put an MLAMemory and rearranged queries into every attention. Raises ConversionRefused."""
        widths = [self._width(layer) for layer in decoder.layers]
        ranks = even_ranks(decoder, self.share, sum(widths)) if self.rank is None else [self.rank] * len(widths)
        for attention, layer, width, rank in zip(attentions, decoder.layers, widths, ranks, strict=True):
            _put(attention, layer, width, rank, self.name)

    def _width(self, layer: AttentionLayer) -> int:
        rotary = required_rotary(layer, self.name)
        width = rotary.width // 2 if self.rope_dim is None else self.rope_dim
        if width < 2 or width % 2 or rotary.width % width:
            raise ConversionRefused(layer.path, f"rope_dim {width} is no even divisor of the {rotary.width} it turns")
        return width


def _put(attention: ConvertedAttention, layer: AttentionLayer, width: int, rank: int, recipe: str) -> None:
    rotary = required_rotary(layer, recipe)
    groups, keys = layer.groups, keys_of(layer)
    chosen = torch.zeros(layer.key_width, dtype=torch.bool, device=layer.key.weight.device)
    chosen[rotary.first + rotary.width - width : rotary.first + rotary.width] = True
    vectors, values, rows = torch.linalg.svd(stacked(layer).double(), full_matrices=False)
    vectors, values, rows = vectors[:, :rank], values[:rank], rows[:rank]

    def columns(affine: Affine, which: torch.Tensor) -> Affine:
        return Affine(affine.weight[:, which], None if affine.bias is None else affine.bias[:, which])

    shared = columns(layer.key, chosen)
    put_mla(
        attention,
        plain_query=columns(layer.query, ~chosen),
        turned_query=columns(layer.query, chosen),
        down=values[:, None] * rows,
        turned_key=Affine(shared.weight.mean(0), None if shared.bias is None else shared.bias.mean(0)),
        up_key=columns(Affine(vectors[:keys].view(groups, layer.key_width, -1), layer.key.bias), ~chosen),
        up_value=Affine(vectors[keys:].view(groups, layer.value_width, -1), layer.value.bias),
        # Every n-th of the model's frequencies are those of a rope that is n times narrower.
        rotary=Rotary(rotary.form, width, 0, rotary.given, tuple(range(0, rotary.width // 2, rotary.width // width))),
        recipe=recipe,
    )
