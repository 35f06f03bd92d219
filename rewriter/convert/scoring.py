"""What attention does to its scores before it weighs the values: scale, soft cap, mask, and sinks beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

__all__ = ["Scoring", "Sinks"]


class Sinks(nn.Module):
    """One learned score for each head that takes part in the softmax and has no value (gpt-oss)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.zeros(heads))

    @classmethod
    def of(cls, score: Tensor | None) -> Sinks | None:
        if score is None:
            return None
        made = cls(len(score))
        made.score = nn.Parameter(score.detach().clone())
        return made

    def settings(self) -> dict[str, object]:
        return {"heads": len(self.score)}


@dataclass(frozen=True)
class Scoring:
    """scale · q k, capped, masked, and normalised with `sinks` [H] beside it."""

    scale: float
    cap: float | None = None
    sinks: Tensor | None = None

    def of_heads(self, heads: slice | Tensor) -> Scoring:
        """For some of the query heads."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[heads])

    def weights(self, products_GnST: Tensor, mask: Tensor | None) -> Tensor:
        """softmax of q·k [B, G, n, S, T] or [B, H, S, T]; `mask` has as many dimensions and shows or adds."""
        scores = products_GnST * self.scale
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        if mask is not None:
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + mask
        accurate = torch.promote_types(scores.dtype, torch.float32)
        if self.sinks is None:
            return torch.softmax(scores, -1, dtype=accurate).to(scores.dtype)
        sinks = self.sinks.to(scores.dtype).view(*scores.shape[1:-2], 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat((scores, sinks), -1), -1, dtype=accurate).to(scores.dtype)[..., :-1]
