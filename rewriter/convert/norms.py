"""Norms of queries and keys between their projection and the scores, read off from what they compute."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from .layers import HeadNormFacts, Rotary
from .linear_maps import Function
from .rotation import Turns, rotate

__all__ = ["HeadNorm", "read_norm", "turned_and_normed"]

SMALL = 1e-6
"""Mean square of the input that tells how much is added below the root."""


class HeadNorm(nn.Module):
    """w x / √(mean x² + ε) + b over the width of each head, or of all heads together; of x - mean x: layer."""

    def __init__(
        self,
        kind: Literal["rms", "layer"],
        heads: int,
        width: int,
        together: bool,
        eps: float,
        after_rope: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.together, self.eps, self.after_rope = kind, together, eps, after_rope
        self.weight = nn.Parameter(torch.ones(heads, 1, width))
        self.bias = nn.Parameter(torch.zeros(heads, 1, width)) if bias else None

    @classmethod
    def of(cls, facts: HeadNormFacts | None) -> HeadNorm | None:
        if facts is None:
            return None
        heads, width = facts.weight.shape
        with torch.device("meta"):
            made = cls(facts.kind, heads, width, facts.together, facts.eps, facts.after_rope, facts.bias is not None)
        made.weight = nn.Parameter(facts.weight.detach().clone().unsqueeze(1))
        if facts.bias is not None:
            made.bias = nn.Parameter(facts.bias.detach().clone().unsqueeze(1))
        return made

    def settings(self) -> dict[str, object]:
        heads, _, width = self.weight.shape
        return {
            "kind": self.kind,
            "heads": heads,
            "width": width,
            "together": self.together,
            "eps": self.eps,
            "after_rope": self.after_rope,
            "bias": self.bias is not None,
        }

    def forward(self, x_BHSd: Tensor) -> Tensor:
        x = x_BHSd.to(torch.promote_types(x_BHSd.dtype, torch.float32))
        over = (1, 3) if self.together else (3,)
        if self.kind == "layer":
            x = x - x.mean(over, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(over, keepdim=True) + self.eps)
        normed: Tensor = self.weight * x.to(x_BHSd.dtype)
        return normed if self.bias is None else normed + self.bias


def turned_and_normed(x_BHSd: Tensor, turns: Turns | None, rotary: Rotary | None, norm: HeadNorm | None) -> Tensor:
    """Queries or keys at their positions, with their norm before or after that."""
    if norm is not None and not norm.after_rope:
        x_BHSd = norm(x_BHSd)
    if rotary is not None and turns is not None:
        x_BHSd = rotate(x_BHSd, turns, rotary)
    return norm(x_BHSd) if norm is not None and norm.after_rope else x_BHSd


def read_norm(function: Function, like: Tensor, kind: str, heads: int, width: int) -> HeadNormFacts | None:
    """The norm that `function` is, over the last dimension of tensors like `like`; None where it is another one.

    The bias is what zeros give, the weight what a large input is multiplied by, ε what a small one shows.
    """
    over = like.shape[-1]
    if kind not in ("rms", "layer") or over not in (width, heads * width):
        return None
    x = 1 + 0.5 * torch.rand(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[..., ::2] *= -1  # as many of either sign, and none near zero, which it is divided by
    x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    bias = function(torch.zeros_like(like)).double().cpu()
    large, small = ((function((x * scale).to(like)).double().cpu() - bias) / x for scale in (2.0**20, SMALL**0.5))
    weights, biases = large.flatten(0, -2), bias.flatten(0, -2)
    tolerance = max(8 * torch.finfo(like.dtype).eps, 1e-5)
    if any(float((rows - rows[:1]).abs().max()) > tolerance * float(rows.abs().max()) for rows in (weights, biases)):
        return None
    eps = float(((large / small).square() - 1).nanmedian()) * SMALL
    weight, added = (rows[0].view(-1, width).expand(heads, width).to(like.dtype) for rows in (weights, biases))
    kind_of = cast(Literal["rms", "layer"], kind)
    return HeadNormFacts(kind_of, weight, over != width, float(f"{eps:.3g}"), bias=added if added.any() else None)
