"""Which layers of a decoder are treated together, and what text says of them together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..calibrate import Calibration, base_of, hidden_states
from ..layers import ConversionRefused, Decoder
from ..memory import unturned_keys
from ..norms import HeadNorm

__all__ = ["cross_moments", "even_groups", "given_groups", "similar_groups"]

SAMPLE = 512
"""Tokens of each batch by which layers are compared; the work is the square of it."""


def even_groups(count: int, size: int) -> list[tuple[int, ...]]:
    """Groups of `size` neighbours; the last may be short."""
    return [tuple(range(start, min(start + size, count))) for start in range(0, count, size)]


def given_groups(groups: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
    """As they were given, each in the order of the layers. Raises ConversionRefused."""
    named = [index for group in groups for index in group]
    if wrong := [index for index in named if not 0 <= index < count]:
        raise ConversionRefused("groups", f"there is no layer {wrong[0]}; layers are 0 to {count - 1}")
    if twice := [index for index in named if named.count(index) > 1]:
        raise ConversionRefused("groups", f"layer {twice[0]} is named twice")
    return [tuple(sorted(group)) for group in groups if group]


def similar_groups(decoder: Decoder, calibration: Calibration, size: int, recipe: str) -> list[tuple[int, ...]]:
    """As many groups of neighbours as groups of `size` would be, with borders where the layers' tokens differ most.

    Layers i and j are alike by s_ij = <K_i, K_j> / (|K_i| |K_j|), where K_i are the products of all tokens with each
    other; that is what one factor for both must reproduce. Of all partitions into groups of at most 2·size, the one
    with the largest Σ_groups Σ_ij s_ij / n is taken.
    """
    sums: list[Tensor] = [torch.zeros(()), torch.zeros(())]
    for made in _rows(decoder, calibration, recipe, "similarity of layers"):
        for which in range(2):
            products = torch.stack([(x @ x.t()).flatten() for x in (pair[which][:SAMPLE] for pair in made)])
            sums[which] = sums[which].to(products) + products @ products.t()
    norms = [total.diagonal().clamp_min(1e-30).sqrt() for total in sums]
    alike = sum(total / (norm[:, None] * norm) for total, norm in zip(sums, norms, strict=True)) / 2
    count = len(decoder.layers)
    return _partition(torch.as_tensor(alike), -(-count // size), 2 * size)


def _partition(alike: Tensor, groups: int, largest: int) -> list[tuple[int, ...]]:
    """By dynamic programming over the border of the last group."""
    count = len(alike)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for used in range(1, groups + 1):
        for end in range(1, count + 1):
            ways = [
                (best[used - 1, start][0] + float(alike[start:end, start:end].mean(1).sum()), start)
                for start in range(max(0, end - largest), end)
                if (used - 1, start) in best
            ]
            if ways:
                gain, start = max(ways)
                best[used, end] = (gain, (*best[used - 1, start][1], start))
    borders = (*best[groups, count][1], count)
    return [tuple(range(start, end)) for start, end in itertools.pairwise(borders)]


def cross_moments(
    decoder: Decoder, groups: Sequence[Sequence[int]], calibration: Calibration, recipe: str
) -> list[tuple[Tensor, Tensor]]:
    """Σ_t z zᵀ in float64 of a group's keys before rope side by side, and of its values, without their biases."""
    sums: list[list[Tensor]] = [[torch.zeros(()), torch.zeros(())] for _ in groups]
    for made in _rows(decoder, calibration, recipe, "second moments"):
        for total, group in zip(sums, groups, strict=True):
            for which in range(2):
                z = torch.cat([made[index][which] for index in group], -1).double()
                total[which] = total[which].to(z) + z.t() @ z
    return [(key, value) for key, value in sums]


def _rows(decoder: Decoder, calibration: Calibration, recipe: str, what: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keys and values of every layer, [tokens, width] each, batch by batch."""
    layers = {layer.path: layer for layer in decoder.layers}
    made: dict[str, tuple[Tensor, Tensor]] = {}

    def see(path: str, hidden: Tensor) -> None:
        layer = layers[path]
        key = unturned_keys(hidden, layer.key, HeadNorm.of(layer.key_norm), layer.groups)
        made[path] = (key.transpose(1, 2).flatten(2).flatten(0, 1), hidden.flatten(0, 1) @ layer.value.flat.t())

    with torch.no_grad(), hidden_states(calibration.model, list(layers), see):
        for tokens in calibration.batches(recipe, what):
            base_of(calibration.model)(input_ids=tokens, use_cache=False)
            yield [made[path] for path in layers]
