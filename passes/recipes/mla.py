"""Multi-head latent attention: one latent for keys and values, and one key with positions that all heads share.

    c = W_c x        k_r = turn(W_r x + b_r)        k_g = [U_g c + b_g ; k_r]        v_g = V_g c + a_g

Cached are c and k_r, whose positions are in it: any cache of two tensors holds them. Up to the shared key, keys and
values are linear in c, so U_g can go into the queries and V_g behind the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...rewriter.convert.attention import ConvertedAttention
from ...rewriter.convert.layers import Affine, AttentionLayer, ConversionRefused, Rotary
from ...rewriter.convert.memory import Memory, heads_of
from ...rewriter.convert.recipe import part
from ...rewriter.convert.rotation import Turns

__all__ = ["MLAMemory", "pair_columns", "put_mla", "required_rotary", "shared_query"]


@part
class MLAMemory(Memory):
    """c = W_c x, and one turned key for all heads."""

    turns_late: ClassVar[bool] = False

    def __init__(
        self,
        hidden: int,
        rank: int,
        turned_width: int,
        groups: int,
        key_width: int,
        value_width: int,
        bias: Sequence[bool],
        rotary: Rotary | None,
    ) -> None:
        super().__init__(rotary)
        self.groups = groups
        self.down = nn.Linear(hidden, rank, bias=False)
        self.turned_key = nn.Linear(hidden, turned_width, bias[0])
        self.up_key = nn.Linear(rank, groups * key_width, bias[1])
        self.up_value = nn.Linear(rank, groups * value_width, bias[2])

    def settings(self) -> dict[str, object]:
        return {
            "hidden": self.down.in_features,
            "rank": self.down.out_features,
            "turned_width": self.turned_key.out_features,
            "groups": self.groups,
            "key_width": self.up_key.out_features // self.groups,
            "value_width": self.up_value.out_features // self.groups,
            "bias": [part.bias is not None for part in (self.turned_key, self.up_key, self.up_value)],
        }

    def new(self, hidden: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        return self.down(hidden).unsqueeze(1), self.turned(self.turned_key(hidden).unsqueeze(1), turns)

    def read(self, first: Tensor, second: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        latent = first.squeeze(1)
        key = heads_of(self.up_key(latent), self.groups)
        key = torch.cat((key, second.expand(-1, self.groups, -1, -1)), -1)
        return key, heads_of(self.up_value(latent), self.groups)


def put_mla(
    attention: ConvertedAttention,
    *,
    plain_query: Affine,
    turned_query: Affine,
    down: Tensor,
    turned_key: Affine,
    up_key: Affine,
    up_value: Affine,
    rotary: Rotary,
    recipe: str,
) -> None:
    """Put the parts of such an attention into its place, in the dtype of its weights.

    Queries [H, n, C] and [H, t, C], `down` [r, C], `turned_key` [t, C], `up_key` [G, n, r], `up_value` [G, e, r];
    `rotary` is that of the t columns.
    """
    dtype = attention.query.weight.dtype
    groups, width, rank = up_key.weight.shape
    biases = [part.bias is not None for part in (turned_key, up_key, up_value)]
    value_width = up_value.weight.shape[1]
    with torch.device("meta"):
        memory = MLAMemory(down.shape[1], rank, rotary.width, groups, width, value_width, biases, rotary)
    memory.down, memory.turned_key = linear(Affine(down), dtype), linear(turned_key, dtype)
    memory.up_key, memory.up_value = linear(up_key, dtype), linear(up_value, dtype)
    attention.replace_memory(memory, recipe)
    weight = torch.cat((plain_query.weight.to(dtype), turned_query.weight.to(dtype)), 1)
    bias = None
    if plain_query.bias is not None and turned_query.bias is not None:
        bias = torch.cat((plain_query.bias.to(dtype), turned_query.bias.to(dtype)), 1)
    attention.replace_query(Affine(weight, bias), replace(rotary, first=width), recipe)


def linear(affine: Affine, dtype: torch.dtype) -> nn.Linear:
    """As a module of that dtype."""
    return affine.linear().to(dtype)


def shared_query(layer: AttentionLayer, mix: Tensor) -> Affine:
    """Queries for a key that all heads share: m_gᵀ q_h for `mix` [G, d, t] and the group g of head h, [H, t, C]."""
    groups, heads = layer.groups, layer.heads
    weight = layer.query.weight.to(mix).view(groups, heads // groups, layer.key_width, -1)
    mixed = torch.einsum("gdt,grdc->grtc", mix, weight).flatten(0, 1)
    if layer.query.bias is None:
        return Affine(mixed)
    bias = layer.query.bias.to(mix).view(groups, heads // groups, layer.key_width)
    return Affine(mixed, torch.einsum("gdt,grd->grt", mix, bias).flatten(0, 1))


def required_rotary(layer: AttentionLayer, recipe: str) -> Rotary:
    """How the layer turns its keys. Raises ConversionRefused where it does not."""
    if layer.rotary is None:
        raise ConversionRefused(
            layer.path,
            f"{recipe} splits keys into a part with and one without positions, and these are not turned at all",
            "joint_latent holds for it, and its keys and values are absorbed as well.",
        )
    return layer.rotary


def pair_columns(rotary: Rotary) -> tuple[Tensor, Tensor]:
    """The first and the second column of every pair, [width/2] each."""
    pairs = torch.arange(rotary.width // 2)
    if rotary.form == "half":
        return rotary.first + pairs, rotary.first + pairs + rotary.width // 2
    return rotary.first + 2 * pairs, rotary.first + 2 * pairs + 1
