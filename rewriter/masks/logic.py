"""Truth values of masks in conjunctive form: every clause is a disjunction of literals.

AtLeast is the one arithmetic literal, expr >= 0 over the integers. Its negation is -expr - 1 >= 0; two of them decide
each other when their sum or difference has a sign over the whole index range (`Ranges.nonnegative`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import sympy

from .index_bounds import Ranges
from .index_values import And, Bool, Compare, Const, Load, Not, Or, Truth, compare, conjunction, integral, negation

MAX_CLAUSES = 24
MAX_LITERALS = 6


@dataclass(frozen=True)
class AtLeast:
    """expr >= 0, where expr is an integer."""

    expr: sympy.Expr


@dataclass(frozen=True)
class Equal:
    """expr == 0, or != 0."""

    expr: sympy.Expr
    holds: bool


@dataclass(frozen=True)
class Loaded:
    """A boolean element, or its negation."""

    load: Load
    holds: bool


@dataclass(frozen=True)
class Unclear:
    """A comparison that is not followed."""

    term: Bool
    reason: str


Literal: TypeAlias = AtLeast | Equal | Loaded | Unclear
Clause: TypeAlias = tuple[Literal, ...]


class TooComplexError(Exception):
    """The conjunctive form has too many clauses."""


def clauses(term: Bool, ranges: Ranges, indexed: frozenset[sympy.Symbol]) -> tuple[Clause, ...]:
    """The conjunctive form; () is always true, ((),) is always false. `indexed` are symbols that vary with an index."""
    return _Forms(ranges, indexed).of(term)


class _Forms:
    def __init__(self, ranges: Ranges, indexed: frozenset[sympy.Symbol]) -> None:
        self.ranges, self.indexed = ranges, indexed
        self._memo: dict[Bool, tuple[Clause, ...]] = {}

    def of(self, term: Bool) -> tuple[Clause, ...]:
        if term not in self._memo:
            self._memo[term] = self._of(term)
        return self._memo[term]

    def _of(self, term: Bool) -> tuple[Clause, ...]:
        match term:
            case Const(value):
                return () if value else ((),)
            case And(terms):
                return self.all(clause for part in terms for clause in self.of(part))
            case Or(terms):
                result: tuple[Clause, ...] = ((),)
                for part in terms:
                    result = self.all(a + b for a in result for b in self.of(part))
                return result
            case Truth(load):
                return ((Loaded(load, True),),)
            case Not(Truth(load)):
                return ((Loaded(load, False),),)
            case Compare(op, difference):
                return self._comparison(term, op, difference)
        return ((Unclear(term, "compares values that are not integers"),),)

    def _comparison(self, term: Compare, op: str, difference: sympy.Expr) -> tuple[Clause, ...]:
        if op in ("eq", "ne"):
            if not self._linear(difference):
                return ((Equal(difference, op == "eq"),),)
            zero = sympy.S.Zero
            both = conjunction(compare("ge", difference, zero), compare("le", difference, zero))
            return self.of(both if op == "eq" else negation(both))
        if op != "ge" or not integral(difference):  # of integers, a comparison always is >=
            return ((Unclear(term, "compares values that are not integers"),),)
        return self.all([(AtLeast(difference),)])

    def _linear(self, expr: sympy.Expr) -> bool:
        """Whether equality is best split in two inequalities: a sum of index variables and of what no index changes."""
        for part in expr.as_coefficients_dict():
            if part.free_symbols & self.indexed or not part.is_integer:
                return False
            if part.has(sympy.floor) and part.free_symbols & self.ranges.sizes.keys():
                return False
        return True

    # ** simplification **

    def all(self, given: Iterable[Clause]) -> tuple[Clause, ...]:
        """The conjunction, without clauses that others imply."""
        kept: list[Clause] = []
        for clause in given:
            simple = self._clause(clause)
            if simple is None or any(self._covers(other, simple) for other in kept):
                continue
            kept = [other for other in kept if not self._covers(simple, other)]
            kept.append(simple)
            if len(kept) > MAX_CLAUSES or len(simple) > MAX_LITERALS:
                raise TooComplexError
        units = [clause[0] for clause in kept if len(clause) == 1]
        if any(self._contradict(a, b) for n, a in enumerate(units) for b in units[:n]):
            return ((),)
        return tuple(kept)

    def _clause(self, clause: Clause) -> Clause | None:
        """The disjunction, without literals that imply others; None when it always holds."""
        kept: list[Literal] = []
        for literal in clause:
            if isinstance(literal, AtLeast):
                if self.ranges.nonnegative(literal.expr):
                    return None
                if self.ranges.nonnegative(-literal.expr - 1):
                    continue
            if any(self._implies(literal, other) for other in kept):
                continue
            if any(self._complete(literal, other) for other in kept):
                return None
            kept = [other for other in kept if not self._implies(other, literal)]
            kept.append(literal)
        return tuple(kept)

    def _covers(self, strong: Clause, weak: Clause) -> bool:
        """Whether the first disjunction implies the second."""
        return all(any(self._implies(a, b) for b in weak) for a in strong)

    def _implies(self, a: Literal, b: Literal) -> bool:
        if isinstance(a, AtLeast) and isinstance(b, AtLeast):
            return self.ranges.nonnegative(b.expr - a.expr)
        return a == b

    def _complete(self, a: Literal, b: Literal) -> bool:
        """Whether one of the two always holds."""
        match a, b:
            case AtLeast(), AtLeast():
                return self.ranges.nonnegative(a.expr + b.expr + 1)
            case Loaded(), Loaded():
                return a.load == b.load and a.holds != b.holds
            case Equal(), Equal():
                return a.expr == b.expr and a.holds != b.holds
        return False

    def _contradict(self, a: Literal, b: Literal) -> bool:
        match a, b:
            case AtLeast(), AtLeast():
                return self.ranges.nonnegative(-a.expr - b.expr - 1)
        return self._complete(a, b) and not isinstance(a, AtLeast)
