"""Norms of queries and keys between their projection and the scores, read off from what they compute."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from .layers import HeadNormFacts
from .linear_maps import Function

__all__ = ["HeadNorm", "read_norm"]

SMALL = 1e-6
"""Mean square of the input that tells how much is added below the root."""


class HeadNorm(nn.Module):
    """w x / √(mean x² + ε) over the width of each head, or of all heads together; of x - mean x: layer."""

    def __init__(self, kind: Literal["rms", "layer"], heads: int, width: int, together: bool, eps: float) -> None:
        super().__init__()
        self.kind, self.together, self.eps = kind, together, eps
        self.weight = nn.Parameter(torch.ones(heads, 1, width))

    @classmethod
    def of(cls, facts: HeadNormFacts | None) -> HeadNorm | None:
        if facts is None:
            return None
        heads, width = facts.weight.shape
        with torch.device("meta"):
            made = cls(facts.kind, heads, width, facts.together, facts.eps)
        made.weight = nn.Parameter(facts.weight.detach().clone().unsqueeze(1))
        return made

    def settings(self) -> dict[str, object]:
        heads, _, width = self.weight.shape
        return {"kind": self.kind, "heads": heads, "width": width, "together": self.together, "eps": self.eps}

    def forward(self, x_BHSd: Tensor) -> Tensor:
        x = x_BHSd.to(torch.promote_types(x_BHSd.dtype, torch.float32))
        over = (1, 3) if self.together else (3,)
        if self.kind == "layer":
            x = x - x.mean(over, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(over, keepdim=True) + self.eps)
        return self.weight * x.to(x_BHSd.dtype)


def read_norm(function: Function, like: Tensor, kind: str, heads: int, width: int) -> HeadNormFacts | None:
    """The norm that `function` is, over the last dimension of tensors like `like`; None where it is another one.

    The weight is what a large input is multiplied by, ε what a small one shows.
    """
    over = like.shape[-1]
    if kind not in ("rms", "layer") or over not in (width, heads * width):
        return None
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    large, small = (function((x * scale).to(like)).double().cpu() / x for scale in (2.0**20, SMALL**0.5))
    weight = large.flatten(0, -2)
    steady = float((weight - weight[:1]).abs().max() / weight.abs().max())
    if steady > max(8 * torch.finfo(like.dtype).eps, 1e-5) or bool(function(torch.zeros_like(like)).any()):
        return None
    eps = float(((large / small).square() - 1).mean()) * SMALL
    weight = weight[0].view(-1, width).expand(heads, width).to(like.dtype)
    return HeadNormFacts(cast(Literal["rms", "layer"], kind), weight, over != width, float(f"{eps:.3g}"))
