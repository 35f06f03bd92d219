"""A latent for keys and one for values, each by its own principal components (as Palu); keys are turned late.

    c_k = R_kᵀ W_k x     k = R_k c_k + b_k        c_v = R_vᵀ W_v x     v = R_v c_v + b_v

One basis for all heads of a layer, or one for each: then the matrices that rebuild are smaller, and more is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.convert.attention import ConvertedAttention
from ...rewriter.convert.calibrate import Calibration
from ...rewriter.convert.layers import Affine, AttentionLayer, ConversionRefused, Decoder, Rotary
from ...rewriter.convert.memory import Memory, heads_of
from ...rewriter.convert.rank import even_ranks
from ...rewriter.convert.recipe import Needs, part, recipe
from ...rewriter.convert.rotation import Turns
from .joint_latent import basis, keys_of, stacked

__all__ = ["SeparateLatent", "SeparateMemory"]


@recipe
@dataclass(frozen=True)
class SeparateLatent:
    """Cache one latent for the keys and one for the values; rebuild both.

    The ranks fit into `share` of the bytes that keys and values take, angles of the positions included; keys get
    `keys` of them. `rank_key` and `rank_value` are the ranks of every layer instead. `basis` is one for each layer or
    one for each head. With `fold_values` the matrices that rebuild values are multiplied into the output's weights.
    """

    share: float = 0.5
    keys: float = 0.4
    rank_key: int | None = None
    rank_value: int | None = None
    basis: Literal["layer", "head"] = "layer"
    fold_values: bool = False

    name: ClassVar[str] = "separate_latent"
    needs: ClassVar[Needs] = "text"
    exact: ClassVar[str] = "at ranks G·d for keys and G·e for values"

    def convert(self, attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration) -> None:
        """Put a SeparateMemory into every attention. Raises ConversionRefused."""
        ranks = self._ranks(decoder)
        moments = calibration.second_moments({layer.path: stacked(layer) for layer in decoder.layers}, self.name)
        for attention, layer, (rank_key, rank_value) in zip(attentions, decoder.layers, ranks, strict=True):
            moment, keys = moments[layer.path], keys_of(layer)
            key = leading(moment[:keys, :keys], self._blocks(layer), rank_key)
            value = leading(moment[keys:, keys:], self._blocks(layer), rank_value)
            attention.replace_memory(SeparateMemory.of(layer, key, value, self.fold_values), self.name)
            if self.fold_values:
                attention.replace_output(folded_output(layer, value))

    def _blocks(self, layer: AttentionLayer) -> int:
        return layer.groups if self.basis == "head" else 1

    def _ranks(self, decoder: Decoder) -> list[tuple[int, int]]:
        """Of keys and of values, for each block of heads."""
        if (self.rank_key is None) != (self.rank_value is None):
            raise ConversionRefused(self.name, "rank_key and rank_value go together", "Give both, or share and keys.")
        if not 0 < self.keys < 1:
            raise ConversionRefused(self.name, f"keys is {self.keys}", "Give the keys' share of the ranks.")
        if self.rank_key is not None and self.rank_value is not None:
            wanted = [(self.rank_key, self.rank_value)] * len(decoder.layers)
        else:
            wanted = [(round(rank * self.keys), rank) for rank in even_ranks(decoder, self.share)]
            wanted = [(key, rank - key) for key, rank in wanted]
        found = []
        for layer, (key, value) in zip(decoder.layers, wanted, strict=True):
            most_key, most_value = keys_of(layer), layer.cached - keys_of(layer)
            key, value = (
                max(key, key + value - most_value),
                max(value, key + value - most_key),
            )  # what one has no use for
            blocks = self._blocks(layer)
            key, value = min(key, most_key) // blocks, min(value, most_value) // blocks
            if min(key, value) < 1:
                raise ConversionRefused(layer.path, f"there is no rank for each of {blocks} blocks of keys and values")
            found.append((key, value))
        return found


def leading(moment: Tensor, blocks: int, rank: int) -> Tensor:
    """Principal components of each block of columns by itself, [blocks, columns, rank]."""
    diagonal = zip(*(moment.chunk(blocks)[n].chunk(blocks, 1) for n in range(blocks)), strict=True)
    return torch.stack([basis(block[n], 0)[0][:, :rank] for n, block in enumerate(diagonal)])


def folded_output(layer: AttentionLayer, value: Tensor) -> Affine:
    """W_o,h R_v,g [C, H, r]. The values' bias passes through where the weights of a row sum to one.

    Raises ConversionRefused where they do not.
    """
    if layer.value.bias is not None and (layer.sinks is not None or layer.gate is not None):
        raise ConversionRefused(
            layer.path,
            "its values have a bias, which sinks or gates weigh, so that it is no bias of the output",
            "Leave out fold_values.",
        )
    repeats, output = layer.heads // layer.groups, layer.output.weight.to(value)
    rebuild = value.reshape(layer.groups, layer.value_width, -1).repeat_interleave(repeats, 0)
    weight = torch.einsum("che,her->chr", output, rebuild)
    bias = layer.output.bias
    if layer.value.bias is not None:
        passed = torch.einsum("che,he->c", output, layer.value.bias.to(value).repeat_interleave(repeats, 0))
        bias = passed if bias is None else bias.to(value) + passed
    dtype = layer.output.weight.dtype
    return Affine(weight.to(dtype), None if bias is None else bias.to(dtype))


@part
class SeparateMemory(Memory):
    """c_k = W x, c_v = W' x;  k = U c_k, turned;  v = U' c_v, or c_v itself where U' is in the output's weights."""

    turns_late: ClassVar[bool] = True

    def __init__(
        self,
        hidden: int,
        ranks: Sequence[int],
        blocks: int,
        groups: int,
        key_width: int,
        value_width: int,
        bias: Sequence[bool],
        fold_values: bool,
        rotary: Rotary | None,
    ) -> None:
        super().__init__(rotary)
        self.ranks, self.blocks, self.groups = tuple(ranks), blocks, groups
        self.widths, self.bias = (key_width, value_width), tuple(bias)
        own = groups // blocks
        self.down_key = nn.Linear(hidden, blocks * ranks[0], bias=False)
        self.down_value = nn.Linear(hidden, blocks * ranks[1], bias=False)
        self.up_key = BlockLinear(blocks, ranks[0], own * key_width, bias[0])
        self.up_value = None if fold_values else BlockLinear(blocks, ranks[1], own * value_width, bias[1])

    @classmethod
    def of(cls, layer: AttentionLayer, key: Tensor, value: Tensor, fold_values: bool) -> SeparateMemory:
        """From orthonormal bases [blocks, columns of a block, rank]."""
        blocks, hidden = len(key), layer.key.weight.shape[-1]
        widths = (layer.key_width, layer.value_width)
        bias = (layer.key.bias is not None, layer.value.bias is not None)
        ranks, dtype = (key.shape[-1], value.shape[-1]), layer.key.weight.dtype
        with torch.device("meta"):
            made = cls(hidden, ranks, blocks, layer.groups, *widths, bias, fold_values, layer.rotary)
        made.down_key = Affine(_down(key, layer.key).to(dtype)).linear()
        made.down_value = Affine(_down(value, layer.value).to(dtype)).linear()
        made.up_key.fill(key.to(dtype), layer.key.bias)
        if made.up_value is not None:
            made.up_value.fill(value.to(dtype), layer.value.bias)
        return made

    def settings(self) -> dict[str, object]:
        return {
            "hidden": self.down_key.in_features,
            "ranks": list(self.ranks),
            "blocks": self.blocks,
            "groups": self.groups,
            "key_width": self.widths[0],
            "value_width": self.widths[1],
            "bias": list(self.bias),
            "fold_values": self.up_value is None,
        }

    def new(self, hidden: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        return heads_of(self.down_key(hidden), self.blocks), heads_of(self.down_value(hidden), self.blocks)

    def read(self, first: Tensor, second: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        key = self._of_groups(self.up_key(first))
        if self.up_value is None:
            value = second.repeat_interleave(self.groups // self.blocks, 1)
        else:
            value = self._of_groups(self.up_value(second))
        return self.turned(key, turns), value

    def _of_groups(self, x_BNTw: Tensor) -> Tensor:
        """[B, blocks, T, heads of a block · d] -> [B, G, T, d]."""
        split: Tensor = x_BNTw.unflatten(-1, (self.groups // self.blocks, -1))
        return split.transpose(2, 3).flatten(1, 2)


class BlockLinear(nn.Module):
    """A matrix for each block: [B, N, T, r] -> [B, N, T, w]."""

    def __init__(self, blocks: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(blocks, 1, outputs)) if bias else None

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` [N, w, r]; a bias has N·w numbers in any shape."""
        self.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().reshape(len(weight), 1, -1).clone())

    def forward(self, x_BNTr: Tensor) -> Tensor:
        made = x_BNTr @ self.weight.mT
        return made if self.bias is None else made + self.bias


def _down(vectors: Tensor, projection: Affine) -> Tensor:
    """Rᵀ W of each block, one below the other."""
    blocks, columns, _ = vectors.shape
    weight = projection.flat.to(vectors).view(blocks, columns, -1)
    return (vectors.mT @ weight).flatten(0, 1)
