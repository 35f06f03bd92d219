"""`latent.testing`: a rewrite against random sizes, numbers and masks, and the smallest example where it goes wrong.

    latent.testing.check_rewrite("my_soft_cap")            in a test: raises RewriteCheckFailed with what to look at

Sizes, scalars and absent tensors are drawn by hypothesis from what the rewrite declares: the short form by its example,
a class by `examples`, pairs of a function and such a declaration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..compat import size_hints
from ..normal_form import remove_dead_code
from ..options import Options
from ..recognise import recognise
from ..registry import RewriteEntry, rewrites
from ..rewrite import rewrite_graph
from ..rules import Verdict
from .conditions import text_of
from .example import Example, ExampleError, call, silent, trace_example
from .replacement import Replacement

__all__ = ["CheckReport", "RewriteCheckFailed", "check_rewrite"]

TOLERANCE = 1e-3
"""Of float32 results relative to their size; the certificate compares in fp64."""

_NO_GRADIENT = "its result has no gradient (gradient=False, if it is meant for inference alone)"

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


@dataclass(frozen=True)
class _Case:
    """A function that the rewrite should match, and one with the result and gradients that it should have then."""

    function: Callable[..., Any]
    wanted: Callable[..., Any]
    example: Example


@dataclass(frozen=True)
class _Draw:
    """One choice of everything that is free."""

    case: _Case
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


def check_rewrite(
    rule: str | object,
    *,
    sizes: Mapping[str, Range] | None = None,
    examples: int = 20,
    gradient: bool = True,
    symbolic: Sequence[str] | None = None,
) -> CheckReport:
    """Check that a registered rewrite matches its own examples and computes the same there. Raises RewriteCheckFailed.

    `sizes` gives numbers or ranges for dimensions (1 to 8 without); `symbolic` names the dimensions that are symbolic
    in a last trace: batch, queries and keys without it, () to leave it out. `gradient=False` is for operators without
    one. Raises ValueError for a rewrite that is not registered or declares no example.
    """
    entry = _entry(rule)
    cases = _cases(entry)
    found = _search(entry, cases, dict(sizes or {}), examples, gradient)
    if found.failed is not None:
        raise RewriteCheckFailed(_text(entry, *found.failed))
    if not found.applied:
        raise RewriteCheckFailed(
            f"{entry.name} was applied to none of {found.tried} examples; give `sizes` that fit it"
        )
    done: list[str] = []
    for draw in {draw.case: draw for draw in found.applied}.values():
        names = _symbolic_names(entry, draw.case) if symbolic is None else tuple(symbolic)
        reason = _check_symbolic(entry, draw, names, dict(sizes or {})) if names else None
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


def _cases(entry: RewriteEntry) -> tuple[_Case, ...]:
    if isinstance(entry.rule, Replacement):
        rule = entry.rule
        return (_Case(rule.pattern, rule.pattern if entry.exact else rule.function, rule.example),)
    declared = getattr(entry.rule, "examples", ())
    if not declared:
        raise ValueError(
            f"{entry.name} declares no example: give its class "
            f"`examples = ((function, dict(q='B H S D', ...)),)`, functions that it should match"
        )
    return tuple(_Case(function, function, Example.read(example)) for function, example in declared)


# ** the search **


@dataclass
class _Search:
    """What the search came by."""

    tried: int = 0
    applied: list[_Draw] = field(default_factory=list)
    failed: tuple[_Draw, str] | None = None
    """The smallest draw that fails, and why."""


def _search(
    entry: RewriteEntry,
    cases: Sequence[_Case],
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
    def attempt(draw: _Draw) -> None:
        reason = _check(entry, draw, gradient)
        found.tried += 1
        if reason:
            found.failed = draw, reason  # hypothesis ends with the smallest
            raise RewriteCheckFailed(reason)
        if reason == "":
            found.applied.append(draw)

    with contextlib.suppress(RewriteCheckFailed):
        attempt()
    return found


def _draws(cases: Sequence[_Case], ranges: Mapping[str, Range]) -> Any:
    from hypothesis import strategies as st

    def of(case: _Case) -> Any:
        sizes = {name: st.integers(*_range(ranges.get(name, SMALL))) for name in case.example.names}
        factors = st.sampled_from((1.0, 0.5, 2.0, 0.3))
        return st.builds(
            lambda sizes, factors, absent, seed: _Draw(
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


# ** one example **


def _check(entry: RewriteEntry, draw: _Draw, gradient: bool) -> str | None:
    """Why the rewrite is wrong here; "" where it was applied and is right, None where it does not apply."""
    try:
        traced = trace_example(draw.case.function, draw.case.example, draw.sizes, draw.scalars, draw.absent)
    except ExampleError as error:
        return str(error)
    verdict = _rewritten(entry, traced)
    if verdict is None:
        return None if 1 in draw.sizes.values() else "its example is not recognised as attention"
    if verdict.outcome == "not paying" or _by_condition(verdict):
        return None
    if verdict.outcome != "applied":
        return f"{verdict.outcome}: {verdict.reason}"
    return _disagreement(traced, draw, draw.sizes, gradient)


def _by_condition(verdict: Verdict) -> bool:
    return "condition does not hold" in verdict.reason


def _rewritten(entry: RewriteEntry, traced: fx.GraphModule) -> Verdict | None:
    """Apply the rewrite in place; None where there is no site."""
    found = recognise(traced.graph)
    if not found.sites:
        return None
    options = Options(rewrites=(entry.name,), verify="full")
    with silent(rewrite_graph.__module__):  # its warnings are this check's result
        done = rewrite_graph(traced.graph, found.sites, options, size_hints(traced.graph.nodes))
    remove_dead_code(traced)
    return next(verdict for verdict in done.verdicts if verdict.rewrite == entry.name)


def _disagreement(traced: fx.GraphModule, draw: _Draw, sizes: Mapping[str, int], gradient: bool) -> str:
    """How the rewritten graph differs from what is wanted, in values or gradients; "" when it does not."""
    values = {name: tensor.requires_grad_(gradient) for name, tensor in draw.tensors(sizes).items()}
    wanted = call(draw.case.wanted, draw.case.example, values, draw.scalars)
    got = traced(*values.values())
    if (error := _error(got, wanted)) > TOLERANCE:
        return f"the rewritten graph is off by {error:.1e} of the result's size"
    if not gradient:
        return ""
    if not got.requires_grad:
        return _NO_GRADIENT
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(wanted, list(values.values()), pull, allow_unused=True)
    try:
        given = torch.autograd.grad(got, list(values.values()), pull, allow_unused=True)
    except RuntimeError as raised:  # autograd's own words for an operator without a formula
        return f"{_NO_GRADIENT}: {str(raised).splitlines()[0]}"
    for name, one, other in zip(values, given, expected, strict=True):
        if (error := _error(_or_zero(one, values[name]), _or_zero(other, values[name]))) > TOLERANCE:
            return f"the gradient of {name} is off by {error:.1e} of its size"
    return ""


def _or_zero(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if gradient is None else gradient


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1e-3))


# ** symbolic sizes **


def _symbolic_names(entry: RewriteEntry, case: _Case) -> tuple[str, ...]:
    """Batch, queries and keys: what changes from call to call."""
    if isinstance(entry.rule, Replacement):
        return tuple(n for n, letters in entry.rule.patterns[0].names.items() if set("".join(letters)) <= set("bij"))
    return tuple(name for name in case.example.names if name in ("B", "S", "T"))


def _check_symbolic(
    entry: RewriteEntry, draw: _Draw, names: tuple[str, ...], ranges: Mapping[str, Range]
) -> str | None:
    """One trace with symbolic sizes, run at two choices of them; None where the rewrite's condition excludes them."""
    case = draw.case
    different = {name: max(_range(ranges.get(name, SMALL))[1] - n, 2) for n, name in enumerate(names)}
    first = {**draw.sizes, **different}
    traced = trace_example(case.function, case.example, first, draw.scalars, draw.absent, frozenset(names))
    verdict = _rewritten(entry, traced)
    if verdict is None or verdict.outcome != "applied":
        if verdict is not None and _by_condition(verdict):
            return None
        return f"{verdict.outcome}: {verdict.reason}" if verdict else "its example is not recognised as attention"
    for sizes in (first, {**first, **{name: size + 3 for name, size in different.items()}}):
        if reason := _disagreement(traced, draw, sizes, gradient=False):
            return f"at {replace(draw, sizes=sizes)}: {reason}"
    return ""


# ** words **


def _text(entry: RewriteEntry, draw: _Draw, reason: str) -> str:
    lines = [f"{entry.name} is wrong at   {draw}   (the smallest found)", f"  {reason}"]
    if isinstance(entry.rule, Replacement) and entry.rule.where is not None:
        lines.append(f"  where: {text_of(entry.rule.where)}   holds there, so it admits what the replacement cannot do")
    return "\n".join(lines)
