"""Bounds of integer expressions in index variables, each of which runs from 0 to its size - 1.

Only what holds for every size counts: a symbol is at least 1 when it is declared positive, at least 0 when declared
non-negative, and otherwise unbounded. Nothing is ever guarded on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import sympy

MAX_DEPTH = 4


class Ranges:
    """The index variables of a graph, with their sizes."""

    def __init__(self) -> None:
        self._indices: dict[tuple[str, sympy.Expr], sympy.Symbol] = {}
        self.sizes: dict[sympy.Symbol, sympy.Expr] = {}
        self._proven: dict[sympy.Expr, bool] = {}

    def index(self, name: str, size: sympy.Expr) -> sympy.Symbol:
        """The variable of that name for dimensions of that size."""
        found = self._indices.get((name, size))
        if found is None:
            found = self._indices[name, size] = sympy.Dummy(name, integer=True, nonnegative=True)
            self.sizes[found] = size
        return found

    def nonnegative(self, expr: sympy.Expr) -> bool:
        """Whether expr >= 0 for all index values and all sizes. False means: not proven."""
        expr = sympy.expand(expr)
        if expr not in self._proven:
            self._proven[expr] = self._least(expr, 0)
        return self._proven[expr]

    def _least(self, expr: sympy.Expr, depth: int) -> bool:
        if not integer_terms(expr) or depth > MAX_DEPTH:
            return False
        for variable in sorted(expr.free_symbols & self.sizes.keys(), key=str):
            slope = expr.coeff(variable)
            rest = sympy.expand(expr - slope * variable)
            if rest.has(variable):
                return False  # inside a product or a floor
            if nonnegative_term_by_term(slope):
                expr = rest
            elif nonnegative_term_by_term(sympy.expand(-slope)):
                expr = sympy.expand(rest + slope * (self.sizes[variable] - 1))
            else:
                return False
        for coefficient, choice in _choices(expr):
            # c·max(a, b) is at least c·a when c > 0; when c < 0 both c·a and c·b must do
            largest = type(choice).__name__ == "Max"
            cases = [sympy.expand(expr + coefficient * (option - choice)) for option in choice.args]
            decide = any if (coefficient > 0) == largest else all
            return decide(self._least(case, depth + 1) for case in cases)
        return nonnegative_term_by_term(expr)

    def below(self, expr: sympy.Expr, size: sympy.Expr) -> bool:
        """Whether 0 <= expr < size always."""
        return self.nonnegative(expr) and self.nonnegative(size - 1 - expr)

    def quotient(self, expr: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
        """floor(expr / divisor), for a positive divisor, with multiples of the divisor taken out."""
        whole, part = self._divided(expr, divisor)
        if part == 0 or self.below(part, divisor):
            return whole
        return whole + sympy.floor(part / divisor)

    def remainder(self, expr: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
        """expr mod divisor, for a positive divisor: expr - divisor·floor(expr / divisor)."""
        return sympy.expand(expr - divisor * self.quotient(expr, divisor))

    @staticmethod
    def _divided(expr: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        """expr = whole·divisor + part, term by term."""
        whole, part = sympy.S.Zero, sympy.S.Zero
        for term, coefficient in sympy.expand(expr).as_coefficients_dict().items():
            if divisor.is_Integer and coefficient.is_Integer:
                count, left = divmod(int(coefficient), int(divisor))
                whole, part = whole + count * term, part + left * term
            elif (ratio := sympy.cancel(coefficient * term / divisor)).is_integer:
                whole += ratio
            else:
                part += coefficient * term
        return sympy.expand(whole), sympy.expand(part)


def _choices(expr: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """The terms c·max(..) and c·min(..) of a sum."""
    terms = expr.as_coefficients_dict().items()
    return [(coefficient, term) for term, coefficient in terms if type(term).__name__ in ("Max", "Min")]


@lru_cache(maxsize=4096)
def nonnegative_term_by_term(expr: sympy.Expr) -> bool:
    """A sum is at least the sum of the least values of its terms; terms with negative sign must be constants."""
    least = sympy.S.Zero
    for term, coefficient in expr.as_coefficients_dict().items():
        if term == 1:
            least += coefficient
        elif coefficient < 0 or not term.is_nonnegative:
            return False
        elif term.is_positive and term.is_integer:
            least += coefficient
    return bool(least >= 0)


def integer_terms(expr: sympy.Expr) -> bool:
    return all(term.is_integer for term in expr.as_coefficients_dict())


def plain(expr: sympy.Expr) -> sympy.Expr:
    """A size expression of torch in sympy's own functions: FloorDiv(a, b) becomes floor(a / b)."""
    if expr.is_Symbol or expr.is_number:
        return expr
    return expr.replace(
        lambda e: type(e).__name__ in ("FloorDiv", "CleanDiv"), lambda e: sympy.floor(e.args[0] / e.args[1])
    )


def substitute(expr: sympy.Expr, values: Mapping[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    return expr.xreplace(dict(values)) if expr.free_symbols & values.keys() else expr
