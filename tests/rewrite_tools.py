"""For tests of one rewrite: a function through the backend, with the verdict of the rewrite and the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from latent.rewriter import history
from latent.rewriter.rules import Verdict
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What one rewrite did to the only site of a function, and how far the result is from eager."""

    verdict: Verdict
    error: float
    mask: str


def outcome(rewrite: str, function: Callable[..., Tensor], *inputs: Tensor, dynamic: bool = False) -> Outcome:
    """Run a function eagerly and compiled. Raises ValueError unless it has exactly one site."""
    torch._dynamo.reset()
    options = {"inner": "eager", "strict": True}
    with torch.no_grad():
        expected = function(*inputs)
        actual = torch.compile(function, backend="latent", dynamic=dynamic, options=options)(*inputs)
    report = history.reports()
    (site,) = report.sites
    (verdict,) = (v for v in report.verdicts if v.rewrite == rewrite)
    error = (expected.double() - actual.double()).abs().max() / expected.double().abs().max()
    return Outcome(verdict, float(error), site.mask)
