"""Queries times a number for their position, so that attention stays sharp in long texts (Llama 4, Ministral 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import QueryScaleFacts

__all__ = ["QueryScale", "steps_of"]

STEPS = 4096
"""What changes more often goes in no steps: config.json would hold a number for every position."""


class QueryScale(nn.Module):
    """factors[n] from position starts[n] on; positions after the last that a model knows keep its factor."""

    def __init__(self, starts: Sequence[int], factors: Sequence[float]) -> None:
        super().__init__()
        self.starts, self.factors = tuple(starts), tuple(factors)

    @classmethod
    def of(cls, facts: QueryScaleFacts | None) -> QueryScale | None:
        return None if facts is None else cls(facts.starts, facts.factors)

    def settings(self) -> dict[str, object]:
        return {"starts": list(self.starts), "factors": list(self.factors)}

    def forward(self, positions: Tensor) -> Tensor:
        """[B, 1, S, 1] for positions [B, S], in float32."""
        starts = torch.tensor(self.starts, device=positions.device)
        factors = torch.tensor(self.factors, dtype=torch.float32, device=positions.device)
        return factors[torch.bucketize(positions.contiguous(), starts, right=True) - 1][:, None, :, None]


def steps_of(numbers: Tensor) -> QueryScaleFacts | None:
    """Of a number for every position; None where it changes too often."""
    numbers = numbers.flatten().cpu()
    starts = torch.cat((torch.zeros(1, dtype=torch.long), (numbers[1:] != numbers[:-1]).nonzero().flatten() + 1))
    if len(starts) > STEPS:
        return None
    return QueryScaleFacts(tuple(starts.tolist()), tuple(numbers[starts].tolist()))
