"""Gates on what the heads give, before it is joined: o_h · f(W_h x + b_h) (Qwen3-Next, Afmoe, Laguna)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import GateFacts

__all__ = ["FUNCTIONS", "OutputGate"]

aten = torch.ops.aten

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "silu": F.silu,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


class OutputGate(nn.Module):
    """A number for each head, or for each of its columns (`width`), from the hidden states."""

    def __init__(self, hidden: int, heads: int, width: int, bias: bool, function: str) -> None:
        super().__init__()
        self.heads, self.width, self.function = heads, width, function
        self.linear = nn.Linear(hidden, heads * width, bias)

    @classmethod
    def of(cls, facts: GateFacts | None) -> OutputGate | None:
        if facts is None:
            return None
        heads, width, hidden = facts.made.weight.shape
        with torch.device("meta"):
            made = cls(hidden, heads, width, facts.made.bias is not None, facts.function)
        made.linear = facts.made.linear()
        return made

    def settings(self) -> dict[str, object]:
        return {
            "hidden": self.linear.in_features,
            "heads": self.heads,
            "width": self.width,
            "bias": self.linear.bias is not None,
            "function": self.function,
        }

    def forward(self, heads_BSHe: Tensor, hidden: Tensor) -> Tensor:
        return heads_BSHe * self.factor(hidden)

    def factor(self, hidden: Tensor) -> Tensor:
        """[B, S, H, e or 1]."""
        return FUNCTIONS[self.function](self.linear(hidden).unflatten(-1, (self.heads, self.width)))
