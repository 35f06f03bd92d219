"""`latent.testing`: a rewrite against random sizes, numbers and masks, and the smallest example where it goes wrong.

    latent.testing.check_rewrite("my_soft_cap")            in a test: raises RewriteCheckFailed with what to look at

Sizes, scalars and absent tensors are drawn by hypothesis from what the rewrite declares: the short form by its example,
a class by `examples`, pairs of a function and such a declaration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..registry import RewriteEntry, rewrites
from .conditions import text_of
from .example import Example, trace_example
from .replacement import Replacement
from .trial import Case, Draw, by_condition, disagreement, fault_of, rewrite_alone

__all__ = ["CheckReport", "RewriteCheckFailed", "check_rewrite"]

Range = int | tuple[int, int]
SMALL = (1, 8)


class RewriteCheckFailed(AssertionError):
    """What is wrong with a rewrite, and the smallest sizes that show it."""


@dataclass(frozen=True)
class CheckReport:
    """What was tried without finding a fault."""

    name: str
    examples: int
    applied: int
    gradient: bool
    symbolic: tuple[str, ...]

    def __str__(self) -> str:
        also = ["gradients agree"] if self.gradient else []
        also += [f"symbolic {' '.join(self.symbolic)}"] if self.symbolic else []
        return (
            f"{self.name}: applied to {self.applied} of {self.examples} examples; {', '.join(also) or 'values agree'}"
        )


def check_rewrite(
    rule: str | object,
    *,
    sizes: Mapping[str, Range] | None = None,
    examples: int = 20,
    gradient: bool = True,
    symbolic: Sequence[str] | None = None,
) -> CheckReport:
    """Check that a registered rewrite matches its own examples and computes the same there. Raises RewriteCheckFailed.

    `sizes` gives numbers or ranges for dimensions, in place of the rule's `example_sizes` or else 1 to 8; `symbolic`
    names the dimensions that are symbolic in a last trace: batch, queries and keys without it, () to leave it out.
    `gradient=False` is for operators without one. Raises ValueError for a rewrite that is not registered
    or declares no example.
    """
    entry = _entry(rule)
    cases = _cases(entry)
    ranges = {**getattr(entry.rule, "example_sizes", {}), **(sizes or {})}
    found = _search(entry, cases, ranges, examples, gradient)
    if found.failed is not None:
        raise RewriteCheckFailed(_text(entry, *found.failed))
    if not found.applied:
        raise RewriteCheckFailed(
            f"{entry.name} was applied to none of {found.tried} examples; give `sizes` that fit it"
        )
    done: list[str] = []
    for draw in {draw.case: draw for draw in found.applied}.values():
        names = _symbolic_names(entry, draw.case) if symbolic is None else tuple(symbolic)
        reason = _check_symbolic(entry, draw, names, ranges) if names else None
        if reason:
            raise RewriteCheckFailed(f"{entry.name} with symbolic {' '.join(names)}:\n  {reason}")
        done += names if reason == "" else ()
    return CheckReport(entry.name, found.tried, len(found.applied), gradient, tuple(dict.fromkeys(done)))


def _entry(rule: str | object) -> RewriteEntry:
    known = rewrites()
    for entry in known:
        if rule in (entry.name, entry.rule):
            return entry
    raise ValueError(f"no rewrite {rule!r} is registered; there are: {', '.join(e.name for e in known)}")


def _cases(entry: RewriteEntry) -> tuple[Case, ...]:
    if isinstance(entry.rule, Replacement):
        rule = entry.rule
        return (Case(rule.pattern, rule.pattern if entry.exact else rule.function, rule.example),)
    declared = getattr(entry.rule, "examples", ())
    if not declared:
        raise ValueError(
            f"{entry.name} declares no example: give its class "
            f"`examples = ((function, dict(q='B H S D', ...)),)`, functions that it should match"
        )
    return tuple(Case(function, function, Example.read(example)) for function, example in declared)


# ** the search **


@dataclass
class _Search:
    """What the search came by."""

    tried: int = 0
    applied: list[Draw] = field(default_factory=list)
    failed: tuple[Draw, str] | None = None
    """The smallest draw that fails, and why."""


def _search(
    entry: RewriteEntry,
    cases: Sequence[Case],
    ranges: Mapping[str, Range],
    examples: int,
    gradient: bool,
) -> _Search:
    try:
        from hypothesis import HealthCheck, Phase, given, settings
    except ImportError:
        raise ImportError("check_rewrite draws its examples with hypothesis: pip install hypothesis") from None

    found = _Search()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(_draws(cases, ranges))
    def attempt(draw: Draw) -> None:
        reason = fault_of(entry, draw, gradient)
        found.tried += 1
        if reason:
            found.failed = draw, reason  # hypothesis ends with the smallest
            raise RewriteCheckFailed(reason)
        if reason == "":
            found.applied.append(draw)

    with contextlib.suppress(RewriteCheckFailed):
        attempt()
    return found


def _draws(cases: Sequence[Case], ranges: Mapping[str, Range]) -> Any:
    from hypothesis import strategies as st

    def of(case: Case) -> Any:
        sizes = {name: st.integers(*_range(ranges.get(name, SMALL))) for name in case.example.names}
        factors = st.sampled_from((1.0, 0.5, 2.0, 0.3))
        return st.builds(
            lambda sizes, factors, absent, seed: Draw(
                case, sizes, {n: factors[n] * v for n, v in case.example.scalars.items()}, absent, seed
            ),
            st.fixed_dictionaries(sizes),
            st.fixed_dictionaries({name: factors for name in case.example.scalars}),
            st.sampled_from(tuple(case.example.variants())),
            st.integers(0, 3),
        )

    return st.one_of([of(case) for case in cases])


def _range(given: Range) -> tuple[int, int]:
    return (given, given) if isinstance(given, int) else given


# ** symbolic sizes **


def _symbolic_names(entry: RewriteEntry, case: Case) -> tuple[str, ...]:
    """Batch, queries and keys: what changes from call to call."""
    if isinstance(entry.rule, Replacement):
        return tuple(n for n, letters in entry.rule.patterns[0].names.items() if set("".join(letters)) <= set("bij"))
    return tuple(name for name in case.example.names if name in ("B", "S", "T"))


def _check_symbolic(entry: RewriteEntry, draw: Draw, names: tuple[str, ...], ranges: Mapping[str, Range]) -> str | None:
    """One trace with symbolic sizes, run at two choices of them; None where the rewrite's condition excludes them."""
    case = draw.case
    different = {name: max(_range(ranges.get(name, SMALL))[1] - n, 2) for n, name in enumerate(names)}
    first = {**draw.sizes, **different}
    traced = trace_example(case.function, case.example, first, draw.scalars, draw.absent, frozenset(names))
    verdict = rewrite_alone(entry, traced)
    if verdict is None or verdict.outcome != "applied":
        if verdict is not None and by_condition(verdict):
            return None
        return f"{verdict.outcome}: {verdict.reason}" if verdict else "its example is not recognised as attention"
    for sizes in (first, {**first, **{name: size + 3 for name, size in different.items()}}):
        if reason := disagreement(traced, draw, sizes, gradient=False):
            return f"at {replace(draw, sizes=sizes)}: {reason}"
    return ""


# ** words **


def _text(entry: RewriteEntry, draw: Draw, reason: str) -> str:
    lines = [f"{entry.name} is wrong at   {draw}   (the smallest found)", f"  {reason}"]
    admitted = isinstance(entry.rule, Replacement) and entry.rule.where is not None and not reason.startswith("refused")
    if admitted:
        lines.append(f"  where: {text_of(entry.rule.where)}   holds there, so it admits what the replacement cannot do")
    return "\n".join(lines)
