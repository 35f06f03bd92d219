"""How a budget of bytes becomes ranks: the same for every layer, or where the spectra need them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layers import ConversionRefused, Decoder

__all__ = ["angles", "even_ranks", "ranks_by_energy"]


def angles(decoder: Decoder) -> int:
    """Numbers that a cache keeps for the position of a token: one cosine and one sine for every pair."""
    widths = {layer.turns: layer.rotary.width for layer in decoder.layers if layer.rotary is not None}
    return sum(widths.values())


def even_ranks(decoder: Decoder, share: float, beside: int | None = None) -> list[int]:
    """The largest rank, the same for all layers, whose latents take at most `share` of the cache's bytes.

    `beside` are the numbers of a token that are kept beside the latents of all layers; None: the angles.
    """
    beside = angles(decoder) if beside is None else beside
    if not 0 < share <= 1:
        raise ConversionRefused("share", f"{share} is no share of the cache; give a number above 0, at most 1")
    room = (share * decoder.cached - beside) / len(decoder.layers)
    rank = int(room + 1e-6)
    if rank < 1:
        raise ConversionRefused("share", f"{share} of {decoder.cached} numbers leaves no room beside the positions")
    return [min(rank, layer.cached) for layer in decoder.layers]


def ranks_by_energy(energies: Sequence[Tensor], total: int) -> list[int]:
    """Ranks that sum to `total` and discard the least energy, as a share of each layer's own. At least 1 each."""
    shares = [energy / energy.sum().clamp_min(1e-30) for energy in energies]
    pooled = torch.cat([share[1:] for share in shares])
    layer = torch.cat([torch.full((len(share) - 1,), n) for n, share in enumerate(shares)])
    taken = layer[pooled.argsort(descending=True)[: max(0, total - len(shares))]]
    return [1 + int((taken == n).sum()) for n in range(len(shares))]
