"""Rotary positions: angles as the model hands them to its attention, and what they do to queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import Rotary

__all__ = ["Turns", "rotate", "turns_of"]

Turns = tuple[Tensor, Tensor]
"""Cosine and sine of the angle of every pair, [B, S, width/2] each."""


def turns_of(position_embeddings: object, rotary: Rotary) -> Turns:
    """Each pair's angle once, from (cos, sin) of one or of both columns of a pair, or from one complex factor."""
    if isinstance(position_embeddings, Tensor) and position_embeddings.is_complex():
        cos, sin = position_embeddings.real, position_embeddings.imag
    elif isinstance(position_embeddings, tuple | list) and len(position_embeddings) == 2:
        cos, sin = position_embeddings
    else:
        raise TypeError("the angles are neither (cos, sin) nor a complex tensor")
    if rotary.given == "halves":
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
    elif rotary.given == "pairs":
        cos, sin = cos[..., ::2], sin[..., ::2]
    return cos, -sin if rotary.backwards else sin


def rotate(x_BNSd: Tensor, turns: Turns, rotary: Rotary) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair of columns; columns outside `rotary` stay."""
    cos, sin = (t.to(x_BNSd.dtype) for t in turns)
    if rotary.frequencies:
        cos, sin = (t[..., list(rotary.frequencies)] for t in (cos, sin))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    end = rotary.first + rotary.width
    before, part, after = x_BNSd[..., : rotary.first], x_BNSd[..., rotary.first : end], x_BNSd[..., end:]
    if rotary.form == "half":
        a, b = part.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = part[..., ::2], part[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    kept = [t for t in (before, turned, after) if t.shape[-1]]
    return kept[0] if len(kept) == 1 else torch.cat(kept, -1)
