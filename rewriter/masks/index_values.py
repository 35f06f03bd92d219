"""What one element of a tensor is, as an expression in its index variables.

A number is a sympy expression over index variables, sizes and opaque loads, or a Where of two numbers; a truth value is
built from comparisons, loads, and, or, not. Constructors fold what is decided by constants alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeGuard

import sympy
from torch import fx

MAX_LEAVES = 24
"""Numbers with more cases than this are not followed."""


class UnreadError(Exception):
    """An element that is not understood; the message says why, as the end of a sentence about the node."""


@dataclass(frozen=True)
class Load:
    """The element `indices` of a tensor whose values are not known when compiling, after `epoch` writes to it."""

    node: fx.Node
    indices: tuple[sympy.Expr, ...]
    epoch: int
    reason: str


@dataclass(frozen=True)
class Const:
    value: bool


@dataclass(frozen=True)
class Truth:
    """A boolean element that is loaded."""

    load: Load


@dataclass(frozen=True)
class Compare:
    """difference op 0. Between integers there is only >=, without a common factor: 2·i - 2·j + 1 > 0 is i - j >= 0."""

    op: Literal["ge", "gt", "eq", "ne"]
    difference: sympy.Expr


@dataclass(frozen=True)
class Not:
    term: Bool


@dataclass(frozen=True)
class And:
    terms: tuple[Bool, ...]


@dataclass(frozen=True)
class Or:
    terms: tuple[Bool, ...]


@dataclass(frozen=True)
class Where:
    """then where the condition holds, other elsewhere."""

    condition: Bool
    then: Number
    other: Number


Bool: TypeAlias = Const | Truth | Compare | Not | And | Or
Number: TypeAlias = sympy.Expr | Where
Value: TypeAlias = Number | Bool
Comparison = Literal["ge", "gt", "le", "lt", "eq", "ne"]

TRUE, FALSE = Const(True), Const(False)
BOOLS = (Const, Truth, Compare, Not, And, Or)


def is_bool(value: Value) -> TypeGuard[Bool]:
    return isinstance(value, BOOLS)


# ** truth values **


def conjunction(*terms: Bool) -> Bool:
    kept: list[Bool] = []
    for term in terms:
        if term == FALSE:
            return FALSE
        parts = term.terms if isinstance(term, And) else (term,)
        kept += [part for part in parts if part != TRUE and part not in kept]
    return TRUE if not kept else kept[0] if len(kept) == 1 else And(tuple(kept))


def disjunction(*terms: Bool) -> Bool:
    kept: list[Bool] = []
    for term in terms:
        if term == TRUE:
            return TRUE
        parts = term.terms if isinstance(term, Or) else (term,)
        kept += [part for part in parts if part != FALSE and part not in kept]
    return FALSE if not kept else kept[0] if len(kept) == 1 else Or(tuple(kept))


def negation(term: Bool) -> Bool:
    match term:
        case Const(value):
            return Const(not value)
        case Not(inner):
            return inner
        case Compare("eq", difference):
            return Compare("ne", difference)
        case Compare("ne", difference):
            return Compare("eq", difference)
        case Compare("ge", difference) if integral(difference):  # of floats, the negation of >= is not < for nan
            return Compare("ge", -difference - 1)
        case And(terms):
            return disjunction(*map(negation, terms))
        case Or(terms):
            return conjunction(*map(negation, terms))
    return Not(term)


def choose(condition: Bool, then: Bool, other: Bool) -> Bool:
    """where(condition, then, other) of truth values."""
    if then == other:
        return then
    return disjunction(conjunction(condition, then), conjunction(negation(condition), other))


def choose_value(condition: Bool, then: Value, other: Value) -> Value:
    if isinstance(then, BOOLS) and isinstance(other, BOOLS):
        return choose(condition, then, other)
    return where(condition, as_number(then), as_number(other))


def same_truth(left: Bool, right: Bool) -> Bool:
    return disjunction(conjunction(left, right), conjunction(negation(left), negation(right)))


# ** numbers **


def integral(expr: sympy.Expr) -> bool:
    """Whether a multiple of the expression is an integer for all values of its symbols."""
    return all(term.is_integer for term in expr.as_coefficients_dict())


def leaves(value: Number) -> int:
    return leaves(value.then) + leaves(value.other) if isinstance(value, Where) else 1


def where(condition: Bool, then: Number, other: Number) -> Number:
    if then == other or condition == TRUE:
        return then
    if condition == FALSE:
        return other
    then, other = assuming(then, condition, True), assuming(other, condition, False)
    if then == other:
        return then
    if leaves(then) + leaves(other) > MAX_LEAVES:
        raise UnreadError("has too many cases")
    return Where(condition, then, other)


def assuming(value: Number, condition: Bool, holds: bool) -> Number:
    """The value where the condition is known: cases that it decides are gone."""
    if not isinstance(value, Where):
        return value
    known = condition if holds else negation(condition)
    facts = known.terms if isinstance(known, And) else (known,)
    if value.condition in facts:
        return assuming(value.then, condition, holds)
    if negation(value.condition) in facts:
        return assuming(value.other, condition, holds)
    then, other = assuming(value.then, condition, holds), assuming(value.other, condition, holds)
    return then if then == other else Where(value.condition, then, other)


def as_number(value: Value) -> Number:
    if isinstance(value, BOOLS):
        return where(value, sympy.S.One, sympy.S.Zero)
    return value


def apply(function: Callable[..., sympy.Expr], *values: Number) -> Number:
    """The function of each case: f(where(c, a, b)) = where(c, f(a), f(b))."""
    for position, value in enumerate(values):
        if isinstance(value, Where):
            before, after = values[:position], values[position + 1 :]
            return where(
                value.condition,
                apply(function, *before, value.then, *after),
                apply(function, *before, value.other, *after),
            )
    return function(*values)


def truth_of_cases(test: Callable[[sympy.Expr], Bool], value: Number) -> Bool:
    """test(where(c, a, b)) = where(c, test(a), test(b))."""
    if isinstance(value, Where):
        return choose(value.condition, truth_of_cases(test, value.then), truth_of_cases(test, value.other))
    return test(value)


def compare(op: Comparison, left: Number, right: Number) -> Bool:
    if op == "le":
        return compare("ge", right, left)
    if op == "lt":
        return compare("gt", right, left)
    return truth_of_cases(lambda a: truth_of_cases(lambda b: _compare(op, a, b), right), left)


def _compare(op: Literal["ge", "gt", "eq", "ne"], left: sympy.Expr, right: sympy.Expr) -> Bool:
    if left is sympy.nan or right is sympy.nan:
        return Const(op == "ne")
    if left.is_number and right.is_number:
        holds = {"ge": left >= right, "gt": left > right, "eq": left == right, "ne": left != right}[op]
        return Const(bool(holds))
    if left.is_infinite or right.is_infinite:
        raise UnreadError("compares with infinity")
    difference = sympy.expand(left - right)
    if difference.is_number:
        return _compare(op, difference, sympy.S.Zero)
    if op in ("ge", "gt") and integral(difference):
        return Compare("ge", _reduced(difference, strict=op == "gt"))
    return Compare(op, difference)


def _reduced(expr: sympy.Expr, strict: bool) -> sympy.Expr:
    """An integer e without common factor such that e >= 0 says that expr >= 0, or expr > 0.

    With fractions cleared, g·x + c > 0 is g·x + c - 1 >= 0, and g·x + c >= 0 is x + floor(c / g) >= 0.
    """
    terms = expr.as_coefficients_dict()
    common = sympy.ilcm(*(coefficient.q for coefficient in terms.values()), 1)
    whole = {term: coefficient * common for term, coefficient in terms.items()}
    constant = whole.pop(sympy.S.One, sympy.S.Zero) - int(strict)
    factor = sympy.igcd(0, *whole.values())
    return sympy.Add(sympy.floor(constant / factor), *(count / factor * term for term, count in whole.items()))
