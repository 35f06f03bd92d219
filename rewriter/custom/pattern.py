"""A function read as attention: which argument is what, in which layout, and how its numbers follow from its scalars.

    b batch   h key heads   g heads that share one   i queries   j keys   d width   e value width

A layout is a tuple of such letters, a string for each dimension: "B (K G) S D" of a query reads ("b", "hg", "i", "d").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ..masks.terms import Flags
from ..plain_form import PlainForm, plain_form
from ..recognise import recognise
from ..score_form import Unusual
from .example import Example, Sizes, trace_example

Letters = tuple[str, ...]
Kind = Literal["query", "key", "value", "mask", "sinks"]

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


class PatternError(ValueError):
    """A function that is no pattern of attention, with the reason."""


@dataclass(frozen=True)
class Slot:
    """What an argument is, and in which layout the function wants it."""

    kind: Kind
    layout: Letters


@dataclass(frozen=True)
class Pattern:
    """One reading of a function: with the optional tensors in `absent` left out."""

    function: Callable[..., Any]
    example: Example
    absent: frozenset[str]
    slots: Mapping[str, Slot]
    output: Letters
    names: Mapping[str, frozenset[str]]
    """The letters that each name of a dimension stands for: "S" may name queries and keys."""

    flags: Flags
    """What the function hides by itself."""

    capped: bool
    sink: float | None
    exponents: tuple[tuple[float, ...], ...]
    """numbers[n] grows with the exponents[n][m]-th power of scalar m."""

    def has(self, kind: Kind) -> bool:
        return any(slot.kind == kind for slot in self.slots.values())

    @property
    def letters(self) -> str:
        return "".join("".join(slot.layout) for slot in self.slots.values())

    def numbers(self, sizes: Sizes, scalars: Mapping[str, float]) -> tuple[float, ...]:
        """Scale and, where there is one, cap."""
        form = form_at(self.function, self.example, tuple(sizes.items()), tuple(scalars.items()), self.absent)
        return numbers_of(form)

    def solve(self, sizes: Sizes, wanted: tuple[float, ...]) -> dict[str, float]:
        """The scalars with which the function comes nearest to these numbers, which are products of their powers."""
        scalars = dict(self.example.scalars)
        given = self.numbers(sizes, scalars)
        if not scalars or any(w * g <= 0 for w, g in zip(wanted, given, strict=True)):
            return scalars
        powers = torch.tensor(self.exponents, dtype=torch.float64)
        ratios = torch.tensor([math.log(w / g) for w, g in zip(wanted, given, strict=True)], dtype=torch.float64)
        for name, change in zip(scalars, (torch.linalg.pinv(powers) @ ratios).tolist(), strict=True):
            scalars[name] = float(f"{scalars[name] * math.exp(change):.12g}")
        return scalars


def example_sizes(example: Example, given: Sizes) -> dict[str, int]:
    """A size for every name, all different, so that no two dimensions are taken for one another."""
    if unknown := set(given) - set(example.names):
        raise PatternError(f"sizes: {unknown.pop()!r} is none of the example's dimensions {', '.join(example.names)}")
    primes = iter(p for p in _PRIMES if p not in given.values())
    return {name: given[name] if name in given else next(primes) for name in example.names}


@functools.lru_cache(maxsize=256)
def form_at(
    function: Callable[..., Any],
    example: Example,
    sizes: tuple[tuple[str, int], ...],
    scalars: tuple[tuple[str, float], ...],
    absent: frozenset[str],
) -> PlainForm:
    return form_of(trace_example(function, example, dict(sizes), dict(scalars), absent), function)


def form_of(traced: fx.GraphModule, function: Callable[..., Any]) -> PlainForm:
    """Raises PatternError unless the graph is one plain attention."""
    found = recognise(traced.graph)
    if len(found.sites) != 1:
        if found.sites:
            raise refused(function, f"it holds {len(found.sites)} attentions, not one")
        reasons = [miss.reason for miss in (*found.near_misses, *found.misses)]
        raise refused(function, f"it is no attention: {reasons[0] if reasons else 'it has no softmax'}")
    form = plain_form(found.sites[0])
    if isinstance(form, Unusual):
        raise refused(function, form.reason)
    if len(form.site.terms) > 1:
        raise refused(function, "it adds several products; one, of queries and keys side by side, matches them too")
    if form.scores.scale_by:
        raise refused(function, "it multiplies scores by a tensor; such tensors belong to the query that it is given")
    return form


def numbers_of(form: PlainForm) -> tuple[float, ...]:
    return (form.scores.scale,) if form.scores.cap is None else (form.scores.scale, form.scores.cap)


def refused(function: Callable[..., Any], reason: str) -> PatternError:
    code = getattr(function, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return PatternError(f"the pattern {getattr(function, '__name__', function)!r}{place}: {reason}")
