"""`latent.testing`: what a pattern's own examples are with it and without it.

    latent.testing.check_pattern(read_soft_clip)           in a test: raises PatternCheckFailed with what to look at

The examples are declared where the pattern is registered, as a rewrite's are: functions, and the dimensions of their
arguments. Each is looked at twice, as `latent.explain` looks at a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..explain import explain
from ..registry import KINDS, examples_of, left_out, patterns
from ..report import Report
from ..report_text import hanging
from ..units import error_text
from .example import Example, call
from .pattern import example_sizes
from .trial import Case, Draw

__all__ = ["PatternCheckFailed", "PatternReport", "check_pattern"]


class PatternCheckFailed(AssertionError):
    """What is wrong with a pattern, and at which example."""


@dataclass(frozen=True)
class Reading:
    """One example: what is seen without the pattern and with it, and which rewrites were certified then."""

    example: str
    without: str
    found: str
    certified: Mapping[str, float]

    def lines(self) -> list[str]:
        proof = "no rewrite was applied, so nothing certifies what it reads"
        if self.certified:
            error = error_text(max(self.certified.values()))
            proof = f"{', '.join(self.certified)} certified, relative error {error} in fp64"
        return [
            f"  {self.example}",
            *hanging("    without it   ", self.without),
            *hanging("    with it      ", self.found),
            f"                 {proof}",
        ]


@dataclass(frozen=True)
class PatternReport:
    """What was seen without finding a fault."""

    name: str
    kind: str
    readings: tuple[Reading, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.name}   {self.kind}", *(line for r in self.readings for line in r.lines())])


def check_pattern(pattern: str | Callable[..., Any]) -> PatternReport:
    """Check that a registered pattern reads its own examples, which nothing else does, and reads them rightly.

    With it there has to be an attention site, or one of which more is known; without it not; and no certificate of a
    rewrite may fail: certificates run the operators themselves. Raises PatternCheckFailed, and ValueError for a pattern
    that is not registered or declares no example.
    """
    function, kind = _registered(pattern)
    name = function.__name__
    declared = examples_of(function)
    if not declared:
        raise ValueError(
            f"{name} declares no example: register it with "
            f"@latent.pattern({kind!r}, examples=((function, dict(q='B H S D', ...)),))"
        )
    return PatternReport(name, kind, tuple(_read(function, *example) for example in declared))


def _registered(pattern: str | Callable[..., Any]) -> tuple[Callable[..., Any], str]:
    known = [(function, kind) for kind in KINDS for function in patterns(kind)]  # type: ignore[arg-type]
    for function, kind in known:
        if pattern in (function, function.__name__):
            return function, kind
    names = ", ".join(function.__name__ for function, _ in known)
    raise ValueError(f"no pattern {pattern!r} is registered; there are: {names}")


def _read(pattern: Callable[..., Any], function: Callable[..., Any], declared: Mapping[str, str | float]) -> Reading:
    """Look at an example without the pattern and with it. Raises PatternCheckFailed."""
    example = Example.read(declared)
    sizes = example_sizes(example, {})
    tensors = Draw(Case(function, function, example), sizes, example.scalars, frozenset(), 0).tensors(sizes)

    def attend() -> Any:
        return call(function, example, tensors, example.scalars)

    with left_out(pattern):
        without = explain(attend, verify="full")()
    found = explain(attend, verify="full")()
    name = function.__name__
    if not found.sites:
        raise PatternCheckFailed(f"{pattern.__name__} does not make {name} attention: {_missed(found)}")
    if _known(without) == _known(found):
        raise PatternCheckFailed(f"{pattern.__name__} adds nothing to {name}: without it the same is read")
    for verdict in found.verdicts:
        if verdict.outcome in ("undone", "failed"):
            raise PatternCheckFailed(f"{pattern.__name__} misreads {name}: {verdict.rewrite} {verdict.reason}")
    certified = {v.rewrite: v.error for v in found.verdicts if v.outcome == "applied" and v.error is not None}
    if len(without.sites) < len(found.sites):
        return Reading(name, _missed(without), "; ".join(site.equation for site in found.sites), certified)
    return Reading(name, _only_in(without, found), _only_in(found, without), certified)


def _known(report: Report) -> tuple[str, ...]:
    """What the sites are said to be, and where what they read comes from."""
    return tuple(text for site in report.sites for text in (site.equation, *site.origins))


def _only_in(report: Report, other: Report) -> str:
    return "; ".join(dict.fromkeys(text for text in _known(report) if text not in _known(other)))


def _missed(report: Report) -> str:
    """Why there is no site, at which line."""
    misses = report.near_misses or tuple(miss for graph in report.graphs for miss in graph.misses)
    return f"{misses[0].reason}   {misses[0].line}" if misses else "no softmax is found"
