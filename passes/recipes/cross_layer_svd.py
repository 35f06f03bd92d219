"""xKV: layers of a group share one factor of their tokens; each layer rebuilds its keys and values from it.

    X = [X_1 | ... | X_n]  ≈  A [B_1 | ... | B_n]     A = X Bᵀ [T, r]     B = the r leading eigenvectors of XᵀX

for the keys before rope (after their norm, if they have one), and for the values, without their biases. The error is
the energy of the singular values that were left out. Bases of the prompt are the best there are for it, at the price
of being kept with it: r·n·Gd numbers, as many as n·Gd more tokens take. Bases of calibration text are part of the
model. Beyond the paper, an error of the values counts by what the output's projection makes of it. Layers are not
weighed: to scale them to equal energy first was measured, and it was no better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.convert.attention import ConvertedAttention
from ...rewriter.convert.calibrate import Calibration
from ...rewriter.convert.factored import Factored
from ...rewriter.convert.groups.grouping import cross_moments, even_groups, given_groups, similar_groups
from ...rewriter.convert.layers import AttentionLayer, ConversionRefused, Decoder, Rotary
from ...rewriter.convert.memory import FullMemory, Memory, heads_of, unturned_keys
from ...rewriter.convert.rank import angles
from ...rewriter.convert.recipe import Needs, part, recipe
from ...rewriter.convert.rotation import Turns
from ...rewriter.convert.weighing import value_roots

__all__ = ["VALUES", "CrossLayerMemory", "CrossLayerSVD", "cached_numbers"]

VALUES = 2
"""Ranks for values to one for keys. Keys have fewer directions that matter, and where keys are wrong less is read of
values that are wrong: with exact keys, compressed values lose more. 1.5 is the paper's; measured on 135M parameters."""


@recipe
@dataclass(frozen=True)
class CrossLayerSVD:
    """Compress keys and values of groups of layers together, by a singular value decomposition of the prompt's.

    `group` layers each, the last group may be short; `groups="similar"` moves the borders to where layers differ on
    calibration text, and tuples of layers are taken as they are, with the layers that they leave out unchanged.
    `rank_key` and `rank_value` are for one layer, a group of n has n times that; without them, the ranks (1 to 2) take
    `share` of the bytes of a prompt of `length` tokens. Without `weigh` all columns of the values count alike. With
    `bases="calibrated"` the bases are learned from text, and new tokens are compressed too. A prompt of fewer than
    `least` tokens, 4 n G d if not given, is left uncompressed.
    """

    group: int = 4
    groups: Literal["even", "similar"] | tuple[tuple[int, ...], ...] = "even"
    rank_key: int | None = None
    rank_value: int | None = None
    share: float = 0.5
    length: int = 4096
    weigh: bool = True
    bases: Literal["prompt", "calibrated"] = "prompt"
    least: int | None = None

    name: ClassVar[str] = "cross_layer_svd"
    needs: ClassVar[Needs] = "nothing"
    exact: ClassVar[str] = "at ranks G d and G e; the first token after a prompt at any rank"

    def convert(self, attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration) -> None:
        """Put a CrossLayerMemory into every attention of a group. Raises ConversionRefused."""
        groups = self._groups(decoder, calibration)
        key, value = self._ranks(decoder, groups)
        bases = self._bases(decoder, groups, (key, value), calibration) if self.bases == "calibrated" else {}
        for group in groups:
            layers = [decoder.layers[index] for index in group]
            ranks = group_ranks(layers, key, value)
            least = 4 * sum(layer.groups * layer.key_width for layer in layers) if self.least is None else self.least
            for index, layer in zip(group, layers, strict=True):
                roots = value_roots(layer) if self.weigh else None
                memory = CrossLayerMemory.of(layer, group, ranks, least, roots, bases.get(index))
                attentions[index].replace_memory(memory, self.name)

    def _groups(self, decoder: Decoder, calibration: Calibration) -> list[tuple[int, ...]]:
        count = len(decoder.layers)
        if not isinstance(self.groups, str):
            return given_groups(self.groups, count)
        if self.group < 1:
            raise ConversionRefused("group", f"{self.group} layers are no group; give 1 or more")
        if self.groups == "similar":
            return similar_groups(decoder, calibration, self.group, self.name)
        return even_groups(count, self.group)

    def _ranks(self, decoder: Decoder, groups: Sequence[Sequence[int]]) -> tuple[int, int]:
        if self.rank_key is not None and self.rank_value is not None:
            if min(self.rank_key, self.rank_value) < 1:
                raise ConversionRefused("rank", "a rank below 1 keeps nothing")
            return self.rank_key, self.rank_value
        if self.rank_key is not None or self.rank_value is not None:
            raise ConversionRefused("rank", "give both rank_key and rank_value, or neither")
        if not 0 < self.share <= 1:
            raise ConversionRefused("share", f"{self.share} is no share of the cache; give one above 0, at most 1")
        room, found = self.share * decoder.cached * self.length, (0, 0)
        for unit in range(1, max(map(max, _widths(decoder.layers))) + 1):
            ranks = (unit, VALUES * unit)
            if cached_numbers(decoder, groups, ranks, self.length, self.bases == "prompt") > room:
                break
            found = ranks
        if found == (0, 0):
            raise ConversionRefused(
                "share",
                f"{self.share} of the bytes of {self.length} tokens leaves no room for bases and angles",
                "Give a larger share, a longer prompt or smaller groups.",
            )
        return found

    def _bases(
        self,
        decoder: Decoder,
        groups: Sequence[Sequence[int]],
        ranks: tuple[int, int],
        calibration: Calibration,
    ) -> dict[int, list[Tensor]]:
        """B_l of the keys of every layer, [r, G d]; what makes A of its values, and B_l of them, [r, G e]."""
        from ...rewriter.convert.groups.layers import leading

        found: dict[int, list[Tensor]] = {}
        moments = cross_moments(decoder, groups, calibration, self.name)
        for group, pair in zip(groups, moments, strict=True):
            layers = [decoder.layers[index] for index in group]
            widths, (key, value) = _widths(layers), group_ranks(layers, *ranks)
            roots = [value_roots(layer) for layer in layers] if self.weigh else []
            weights = torch.block_diag(*(root for one in roots for root in one)) if roots else None
            felt = pair[1] if weights is None else weights @ pair[1] @ weights.t()
            keys, values = leading(pair[0], key), leading(felt, value)
            into = values if weights is None else values @ weights
            up = values if weights is None else torch.linalg.solve(weights.t(), values, left=False)
            for kept, parts in ((keys, widths[0]), (into, widths[1]), (up, widths[1])):
                for index, basis in zip(group, kept.split(parts, -1), strict=True):
                    found.setdefault(index, []).append(basis.contiguous())
        return found


def group_ranks(layers: Sequence[AttentionLayer], key: int, value: int) -> tuple[int, int]:
    """Ranks of a group's keys and values, from those of one layer."""
    widths = _widths(layers)
    return min(key * len(layers), sum(widths[0])), min(value * len(layers), sum(widths[1]))


def _widths(layers: Sequence[AttentionLayer]) -> tuple[list[int], list[int]]:
    """G d and G e of each layer."""
    return [layer.groups * layer.key_width for layer in layers], [layer.groups * layer.value_width for layer in layers]


def cached_numbers(
    decoder: Decoder, groups: Sequence[Sequence[int]], ranks: tuple[int, int], tokens: int, kept_bases: bool = True
) -> int:
    """Numbers that are kept for a prompt of so many tokens: factors, bases if they are its own, angles."""
    total = angles(decoder) * tokens
    for group in groups:
        layers = [decoder.layers[index] for index in group]
        total -= tokens * sum(layer.cached for layer in layers)
        for rank, width in zip(group_ranks(layers, *ranks), _widths(layers), strict=True):
            total += min(rank, tokens) * (tokens + sum(width) * kept_bases)
    return total + tokens * decoder.cached


@part
class CrossLayerMemory(Memory):
    """k = turn(W_k x + b_k);  v = W_v x + b_v, of which a cache keeps what is said above."""

    turns_late: ClassVar[bool] = True
    after_norm: ClassVar[bool] = True

    basis_key: Tensor
    into_value: Tensor
    basis_value: Tensor
    roots: Tensor | None

    def __init__(
        self,
        rotary: Rotary | None,
        full: dict[str, Any],
        members: Sequence[int],
        ranks: Sequence[int],
        least: int,
        calibrated: bool,
        weighed: bool = False,
    ) -> None:
        super().__init__(rotary)
        self.full = FullMemory(**full, rotary=rotary)
        self.members, self.ranks = tuple(members), (ranks[0], ranks[1])
        self.least, self.calibrated = least, calibrated
        if calibrated:
            key, value = self.full.key, self.full.value
            self.register_buffer("basis_key", key.weight.new_empty(ranks[0], key.out_features))
            self.register_buffer("into_value", value.weight.new_empty(ranks[1], value.out_features))
            self.register_buffer("basis_value", value.weight.new_empty(ranks[1], value.out_features))
        # bases of a prompt are made anew for each, so what they are weighed by is kept
        width = self.full.value_width if weighed and not calibrated else None
        roots = None if width is None else self.full.value.weight.new_empty(self.full.groups, width, width)
        self.register_buffer("roots", roots)

    @classmethod
    def of(
        cls,
        layer: AttentionLayer,
        members: Sequence[int],
        ranks: tuple[int, int],
        least: int,
        roots: Tensor | None,
        bases: Sequence[Tensor] | None,
    ) -> CrossLayerMemory:
        full = FullMemory.of(layer)
        with torch.device("meta"):
            made = cls(layer.rotary, full.settings(), members, ranks, least, bases is not None, roots is not None)
        made.full = full
        if bases is not None:
            made.basis_key, made.into_value, made.basis_value = (basis.to(full.key.weight) for basis in bases)
        elif roots is not None:
            made.roots = roots.to(full.value.weight)
        return made

    def settings(self) -> dict[str, object]:
        return {
            "full": self.full.settings(),
            "members": list(self.members),
            "ranks": list(self.ranks),
            "least": self.least,
            "calibrated": self.calibrated,
            "weighed": self.roots is not None,
        }

    def new(self, hidden: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        key = unturned_keys(hidden, self.full.key, self.full.key_norm, self.full.groups)
        return key, heads_of(nn.functional.linear(hidden, self.full.value.weight), self.full.groups)

    def read(self, first: Any, second: Any, turns: Turns | None) -> tuple[Any, Any]:
        key, value = self.full.key.bias if self.full.key_norm is None else None, self.full.value.bias
        if isinstance(first, Factored):
            return replace(first, bias=key, turns=turns, rotary=self.rotary), replace(second, bias=value)
        if turns is not None:  # a fixed cache holds angles of tokens to come
            turns = (turns[0][:, : first.shape[2]], turns[1][:, : first.shape[2]])
        return self.turned(_plus(first, key), turns), _plus(second, value)

    def cache_layer(self, make: Callable[[], Any]) -> Any:
        from ...rewriter.convert.groups.layers import CalibratedLayer, PromptLayer

        if self.calibrated:
            into, bases = (self.basis_key, self.into_value), (self.basis_key, self.basis_value)
            return CalibratedLayer(self.members, make, into, bases)
        return PromptLayer(self.members, make, self.ranks, self.least, self.roots)


def _plus(x_BNTw: Tensor, bias: Tensor | None) -> Tensor:
    return x_BNTw if bias is None else x_BNTw + bias.view(x_BNTw.shape[1], 1, -1)
