"""Angles of positions that an attention makes itself, as GPT-J and much code outside of transformers does.

    cos p f_i,  sin p f_i      times one factor (YaRN)

The frequencies f_i are fitted to the cosines and sines of every position that a model knows, which tells them more
exactly than float32 holds them; so they need not be where the model keeps them, nor be kept at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import AngleFacts

__all__ = ["OwnAngles", "fitted_angles"]

ROUNDING = 2.0**-24
"""Of float32, in which models make their angles."""


class OwnAngles(nn.Module):
    """Cosine and sine of every angle, for positions."""

    def __init__(self, frequencies: Sequence[float], factor: float = 1.0) -> None:
        super().__init__()
        self.frequencies, self.factor = tuple(frequencies), factor

    @classmethod
    def of(cls, facts: AngleFacts | None) -> OwnAngles | None:
        return None if facts is None else cls(facts.frequencies, facts.factor)

    def settings(self) -> dict[str, object]:
        return {"frequencies": list(self.frequencies), "factor": self.factor}

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, n] each, in float32, for positions [B, S]."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device)
        angles = positions[..., None].float() * frequencies
        return angles.cos() * self.factor, angles.sin() * self.factor


def fitted_angles(cos: Tensor, sin: Tensor) -> AngleFacts | None:
    """The frequencies of [positions, n] cosines and sines; None where these are something else.

    They may be rounded to 16 bits, as those of a model are that was cast as a whole; the frequencies are not, then.
    """
    rounding = torch.finfo(cos.dtype).eps
    cos, sin = cos.double().cpu(), sin.double().cpu()
    factor = float(torch.hypot(cos, sin).mean())
    factor = 1.0 if abs(factor - 1) < rounding / 4 else factor
    count = len(cos)
    if count < 2 or factor == 0:
        return None
    places, phases = torch.arange(count, dtype=torch.float64)[:, None], torch.atan2(sin, cos)
    frequencies = phases[1]
    for place in (2**n for n in range(1, (count - 1).bit_length())):  # each tells twice as much as the one before
        frequencies = frequencies + _within_a_turn(phases[place] - place * frequencies) / place
    weights = 1 / (1 + places * frequencies.abs()).square()  # roundings of a cosine, and of the angle
    off = _within_a_turn(phases - places * frequencies)
    frequencies = frequencies + (weights * places * off).sum(0) / (weights * places.square()).sum(0)
    frequencies = frequencies.float().double()
    allowed = factor * (max(16 * ROUNDING, rounding) + 4 * ROUNDING * places * frequencies.abs())
    errors = [(factor * f(places * frequencies) - x).abs() for f, x in ((torch.cos, cos), (torch.sin, sin))]
    if any(bool((error > allowed).any()) for error in errors):
        return None
    return AngleFacts(tuple(frequencies.tolist()), float(f"{factor:.7g}"))


def _within_a_turn(angles: Tensor) -> Tensor:
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi
