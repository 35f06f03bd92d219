"""What every head adds to the hidden states, token by token, and a guess of it before the attention has run.

A head h adds W_o,h o_h, which costs the whole attention to know. How much that is, compared with the other heads, can
be told from the hidden state x alone: y_h = log |W_o,h o_h| is fitted by W x with ridge regression, whose sums are all
that is kept of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import ConvertedAttention
from .calibrate import Calibration, calls
from .layers import Decoder

__all__ = ["Contributions", "contributions"]

RIDGE = 1e-3
"""Of the mean square of a hidden state: keeps a guess from what it saw by chance."""


@dataclass(frozen=True)
class Contributions:
    """Of H heads of one attention, from hidden states of width C; float64."""

    sums: Tensor
    """Σ |W_o,h o_h| over all tokens, [H]."""
    moment: Tensor
    """The mean of x xᵀ, [C, C]."""
    logs: Tensor
    """The mean of x y, y_h = log |W_o,h o_h|, [C, H]."""

    @property
    def order(self) -> list[int]:
        """The heads, those that add most first."""
        order: list[int] = self.sums.argsort(descending=True, stable=True).tolist()
        return order

    def guess(self, heads: Sequence[int], size: float) -> Tensor:
        """W [n, C]: scores W x that rank some of the heads by what they add to a token; `size` is their RMS."""
        ridge = RIDGE * self.moment.diagonal().mean() * torch.eye(len(self.moment)).to(self.moment)
        fitted = torch.linalg.solve(self.moment + ridge, self.logs[:, list(heads)]).t()
        fitted = fitted - fitted.mean(0)  # what all heads have in common ranks none of them
        power = torch.einsum("nc,cd,nd->n", fitted, self.moment, fitted).mean()
        scaled: Tensor = fitted * (size / power.sqrt().clamp_min(1e-30))
        return scaled


def contributions(
    attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration, recipe: str
) -> dict[str, Contributions]:
    """What the heads add on calibration text, by the path of their attention. Raises ConversionRefused."""
    by_path = {layer.path: attention for layer, attention in zip(decoder.layers, attentions, strict=True)}
    totals: dict[str, tuple[Tensor, ...]] = {}
    tokens = calibration.required(recipe).numel()

    def see(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attention = by_path[path]
        form = attention.form
        weight = attention.output.weight.view(form.hidden, form.heads, form.value_width)
        accurate = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.to(accurate)
        gram = torch.einsum("che,chf->hef", weight, weight)  # |W o|² = oᵀ Wᵀ W o
        given = attention.given(*args, **kwargs)
        heads = attention.attention(given).to(accurate).unflatten(-1, (form.heads, form.value_width))
        square = torch.einsum("bshe,hef,bshf->bsh", heads, gram, heads).flatten(0, 1).double().clamp_min(0)
        x = given.hidden.flatten(0, 1).double()
        y = square.clamp_min(1e-12 * float(square.mean()) + 1e-300).log() / 2
        found = (square.sqrt().sum(0), x.t() @ x / tokens, x.t() @ y / tokens)
        before = totals.get(path)
        totals[path] = found if before is None else tuple(a + b for a, b in zip(before, found, strict=True))

    with torch.no_grad(), calls(calibration.model, list(by_path), see):
        for rows in calibration.batches(recipe, "contributions of heads"):
            calibration.run(rows)
    return {path: Contributions(*total) for path, total in totals.items()}
