"""Numbers of a graph as exact sympy numbers, and what a dtype does to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import sympy
import torch
from torch import fx

from ..compat import expr_of
from .index_bounds import Ranges, plain
from .index_values import Load, Number, UnreadError, Value, Where, apply, as_number, compare, is_bool

MAX_DENOMINATOR = 256

_LARGEST = {
    torch.uint8: 255,
    torch.int8: 127,
    torch.int16: 2**15 - 1,
    torch.bfloat16: 2**8,
    torch.float16: 2**11,
    torch.int32: 2**31 - 1,
    torch.float32: 2**24,
}
"""Integers up to here are exact in the dtype."""

_NARROW = (torch.uint8, torch.int8, torch.int16, torch.bfloat16, torch.float16)
"""Dtypes whose limit a sequence may well pass, so that unknown sizes are refused."""


def size_of(value: object) -> sympy.Expr:
    """The expression of a size, an int or a node that holds one."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, int) and not isinstance(value, bool):
        return sympy.Integer(value)
    if isinstance(value, torch.SymInt):
        return plain(expr_of(value))
    raise UnreadError("has a size that is not a number")


def exact(value: object) -> sympy.Expr:
    """A scalar argument without rounding."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, bool | int):
        return sympy.Integer(int(value))
    if isinstance(value, float):
        if math.isnan(value):
            return sympy.nan
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        fraction = Fraction(value)
        return sympy.Rational(fraction.numerator, fraction.denominator)
    if isinstance(value, torch.SymInt):
        return plain(expr_of(value))
    raise UnreadError("depends on a number that is not known when compiling")


def as_float(number: sympy.Expr) -> float:
    """The nearest float of an exact number; beyond the largest it is infinite."""
    if number is sympy.nan:
        return math.nan
    if number.is_infinite:
        return math.inf if number > 0 else -math.inf
    try:
        return float(Fraction(int(number.p), int(number.q)))
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def as_dtype(value: Value, dtype: torch.dtype, ranges: Ranges, loads: Mapping[sympy.Symbol, Load]) -> Value:
    """The value in a tensor of that dtype. Constants are rounded; other numbers must be exact in it."""
    if dtype is torch.bool:
        return value if is_bool(value) else compare("ne", as_number(value), sympy.S.Zero)
    return apply(lambda number: _fit(number, dtype, ranges, loads), as_number(value))


def _fit(number: sympy.Expr, dtype: torch.dtype, ranges: Ranges, loads: Mapping[sympy.Symbol, Load]) -> sympy.Expr:
    if number.is_number:
        return _rounded(number, dtype)
    if number in loads and loads[number].node.meta["val"].dtype is dtype:
        return number
    if dtype.is_complex:
        raise UnreadError("is complex")
    terms = number.as_coefficients_dict()
    if dtype.is_floating_point:
        if number.free_symbols & loads.keys():
            raise UnreadError("computes in floating point with values that are not known when compiling")
        if any(c.q > MAX_DENOMINATOR or c.q & (c.q - 1) for c in terms.values()):
            raise UnreadError("holds fractions that floating point does not hold exactly")
    elif any(not c.is_Integer for c in terms.values()):
        raise UnreadError("rounds to integers")
    if not all(term.is_integer for term in terms):
        raise UnreadError("holds values that are no integers")
    bound = _magnitude(number, ranges)
    if dtype in _NARROW if bound is None else bound > _LARGEST.get(dtype, 2**53):
        raise UnreadError(f"holds positions that may not be exact in {dtype}".replace("torch.", ""))
    return number


def _magnitude(expr: sympy.Expr, ranges: Ranges) -> int | None:
    """A number that |expr| never passes; None when sizes or loaded values leave it open."""
    if expr.is_number:
        return int(abs(sympy.ceiling(expr))) + 1
    if expr.is_Symbol:
        size = ranges.sizes.get(expr)
        return int(size) if size is not None and size.is_Integer else None
    parts = [_magnitude(part, ranges) for part in expr.args]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not (expr.is_Add or expr.is_Mul or isinstance(expr, sympy.floor)):
        return None
    return math.prod(known) if expr.is_Mul else sum(known) + 1


def _rounded(number: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    if dtype.is_floating_point:
        return exact(torch.tensor(as_float(number), dtype=torch.float64).to(dtype).item())
    if dtype.is_complex or not number.is_Integer:
        raise UnreadError("rounds to integers")
    info = torch.iinfo(dtype)
    if not info.min <= number <= info.max:
        raise UnreadError("overflows")
    return number


def is_constant(value: Number) -> bool:
    return not isinstance(value, Where) and value.is_number
