"""One example of a rewrite's check: the function with random tensors, rewritten, and compared with what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..compat import size_hints
from ..normal_form import remove_dead_code
from ..options import Options
from ..recognise import recognise
from ..registry import RewriteEntry
from ..rewrite import rewrite_graph
from ..rules import Verdict
from .example import Example, ExampleError, call, silent, trace_example

__all__ = ["Case", "Draw", "by_condition", "disagreement", "fault_of", "rewrite_alone"]

TOLERANCE = 1e-3
"""Of float32 results relative to their size; the certificate compares in fp64."""

NO_GRADIENT = "its result has no gradient (gradient=False, if it is meant for inference alone)"


@dataclass(frozen=True)
class Case:
    """A function that the rewrite should match, and one with the result and gradients that it should have then."""

    function: Callable[..., Any]
    wanted: Callable[..., Any]
    example: Example


@dataclass(frozen=True)
class Draw:
    """One choice of everything that is free."""

    case: Case
    sizes: Mapping[str, int]
    scalars: Mapping[str, float]
    absent: frozenset[str]
    seed: int

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        numbers = " ".join(f"{name}={value:g}" for name, value in self.scalars.items())
        missing = " ".join(f"{name}=None" for name in sorted(self.absent))
        return " ".join(filter(None, (sizes, numbers, missing)))

    def tensors(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        present = self.case.example.present(self.absent)
        return {name: torch.randn(a.shape(sizes), generator=generator) for name, a in present.items()}


def fault_of(entry: RewriteEntry, draw: Draw, gradient: bool) -> str | None:
    """Why the rewrite is wrong here; "" where it was applied and is right, None where it does not apply."""
    try:
        traced = trace_example(draw.case.function, draw.case.example, draw.sizes, draw.scalars, draw.absent)
    except ExampleError as error:
        return str(error)
    verdict = rewrite_alone(entry, traced)
    if verdict is None:
        return None if 1 in draw.sizes.values() else "its example is not recognised as attention"
    if verdict.outcome == "not paying" or by_condition(verdict):
        return None
    if verdict.outcome != "applied":
        return f"{verdict.outcome}: {verdict.reason}"
    return disagreement(traced, draw, draw.sizes, gradient)


def by_condition(verdict: Verdict) -> bool:
    return "condition does not hold" in verdict.reason


def rewrite_alone(entry: RewriteEntry, traced: fx.GraphModule) -> Verdict | None:
    """Apply the rewrite in place; None where there is no site."""
    found = recognise(traced.graph)
    if not found.sites:
        return None
    options = Options(rewrites=(entry.name,), verify="full")
    with silent(rewrite_graph.__module__):  # its warnings are this check's result
        done = rewrite_graph(traced.graph, found.sites, options, size_hints(traced.graph.nodes))
    remove_dead_code(traced)
    return next(verdict for verdict in done.verdicts if verdict.rewrite == entry.name)


def disagreement(traced: fx.GraphModule, draw: Draw, sizes: Mapping[str, int], gradient: bool) -> str:
    """How the rewritten graph differs from what is wanted, in values or gradients; "" when it does not."""
    values = {name: tensor.requires_grad_(gradient) for name, tensor in draw.tensors(sizes).items()}
    wanted = call(draw.case.wanted, draw.case.example, values, draw.scalars)
    got = traced(*values.values())
    if (error := _error(got, wanted)) > TOLERANCE:
        return f"the rewritten graph is off by {error:.1e} of the result's size"
    if not gradient:
        return ""
    if not got.requires_grad:
        return NO_GRADIENT
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(wanted, list(values.values()), pull, allow_unused=True)
    try:
        given = torch.autograd.grad(got, list(values.values()), pull, allow_unused=True)
    except RuntimeError as raised:  # autograd's own words for an operator without a formula
        return f"{NO_GRADIENT}: {str(raised).splitlines()[0]}"
    for name, one, other in zip(values, given, expected, strict=True):
        if (error := _error(_or_zero(one, values[name]), _or_zero(other, values[name]))) > TOLERANCE:
            return f"the gradient of {name} is off by {error:.1e} of its size"
    return ""


def _or_zero(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if gradient is None else gradient


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1e-3))
