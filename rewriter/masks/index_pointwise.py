"""Elements of operators that compute each element from the same element of their operands."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch import fx

from .index_call import Call, is_tensor, reads
from .index_numbers import as_dtype
from .index_values import (
    Bool,
    Comparison,
    Number,
    UnreadError,
    Value,
    apply,
    as_number,
    choose,
    choose_value,
    compare,
    conjunction,
    disjunction,
    is_bool,
    negation,
    same_truth,
    where,
)

# ** arithmetic **


def _arithmetic(call: Call, function: Callable[..., sympy.Expr], *values: Value) -> Number:
    """The function of numbers; with infinities only where all are constants."""

    def checked(*numbers: sympy.Expr) -> sympy.Expr:
        if any(n.is_infinite or n is sympy.nan for n in numbers) and not all(n.is_number for n in numbers):
            raise UnreadError("adds infinity to what is not known")
        return sympy.expand(function(*numbers))

    return apply(checked, *map(as_number, values))


def _operands(call: Call) -> tuple[Value, Value]:
    return call.value(call.argument("self")), call.value(call.argument("other"))


def _alpha(call: Call) -> Number:
    return call.number(call.argument("alpha", 1))


@reads("add")
def _add(call: Call) -> Value:
    left, right = _operands(call)
    if call.dtype is torch.bool:
        return disjunction(_truth(left), _truth(right))
    return _arithmetic(call, lambda a, b, f: a + (b if f == 1 else f * b), left, right, _alpha(call))


@reads("sub", "subtract")
def _sub(call: Call) -> Value:
    return _arithmetic(call, lambda a, b, f: a - (b if f == 1 else f * b), *_operands(call), _alpha(call))


@reads("rsub")
def _rsub(call: Call) -> Value:
    return _arithmetic(call, lambda a, b, f: b - (a if f == 1 else f * a), *_operands(call), _alpha(call))


@reads("mul", "multiply")
def _mul(call: Call) -> Value:
    left, right = _operands(call)
    if call.dtype is torch.bool:
        return conjunction(_truth(left), _truth(right))
    return _arithmetic(call, lambda a, b: a * b, left, right)


@reads("neg", "negative")
def _neg(call: Call) -> Value:
    return _arithmetic(call, lambda a: -a, call.value(call.argument("self")))


@reads("div", "divide", "true_divide", "floor_divide")
def _div(call: Call) -> Value:
    mode = "floor" if "floor_divide" in str(call.node.target) else call.argument("rounding_mode")
    left, right = call.number(call.argument("self")), call.number(call.argument("other"))

    def divided(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
        if b == 0 or (mode is None and not b.is_number):
            raise UnreadError("is divided by what is not a known number")
        if mode is None:
            return a / b
        return _whole_division(call, mode, a, b)

    return _arithmetic(call, divided, left, right)


def _whole_division(call: Call, mode: str, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    whole = all(term.is_integer and c.is_Integer for n in (a, b) for term, c in n.as_coefficients_dict().items())
    if not whole or call.dtype.is_floating_point or not call.ranges.nonnegative(b - 1):
        raise UnreadError("is a rounded quotient of what may be no integers")
    if mode != "floor" and not call.ranges.nonnegative(a):
        raise UnreadError("is a quotient rounded towards zero")
    return call.ranges.quotient(a, b)


@reads("remainder", "fmod")
def _remainder(call: Call) -> Value:
    mode = "trunc" if "fmod" in str(call.node.target) else "floor"
    return _arithmetic(call, lambda a, b: a - b * _whole_division(call, mode, a, b), *_operands(call))


@reads("minimum", "min")
def _minimum(call: Call) -> Value:
    return _smaller(call, call.number(call.argument("self")), call.number(call.argument("other")))


@reads("maximum", "max")
def _maximum(call: Call) -> Value:
    return _larger(call, call.number(call.argument("self")), call.number(call.argument("other")))


def _smaller(call: Call, left: Number, right: Number) -> Number:
    return where(call.compare("ge", right, left), left, right)


def _larger(call: Call, left: Number, right: Number) -> Number:
    return where(call.compare("ge", left, right), left, right)


@reads("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(call: Call) -> Value:
    value = call.number(call.argument("self"))
    if (least := call.argument("min")) is not None:
        value = _larger(call, value, call.number(least))
    if (most := call.argument("max")) is not None:
        value = _smaller(call, value, call.number(most))
    return value


@reads("abs")
def _abs(call: Call) -> Value:
    value = call.number(call.argument("self"))
    return where(call.compare("ge", value, sympy.S.Zero), value, _arithmetic(call, lambda a: -a, value))


# ** comparisons and logic **


_COMPARISONS: dict[str, Comparison] = {
    **{"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge"},
    **{"not_equal": "ne", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge"},
}


@reads(*_COMPARISONS)
def _compare(call: Call) -> Value:
    name = call.reader.storages.functional(call.node)
    left, right = _operands(call)
    op = _COMPARISONS[name]
    if is_bool(left) and is_bool(right) and op in ("eq", "ne"):
        same = same_truth(left, right)
        return same if op == "eq" else negation(same)
    dtype = _compared_in(call)
    ours, theirs = (as_dtype(value, dtype, call.ranges, call.reader.loads) for value in (left, right))
    return call.compare(op, as_number(ours), as_number(theirs))


def _compared_in(call: Call) -> torch.dtype:
    """The dtype in which two operands meet."""
    left, right = _stand_in(call.argument("self")), _stand_in(call.argument("other"))
    dtype: torch.dtype = torch.result_type(left, right)
    return torch.int64 if dtype is torch.bool else dtype


def _stand_in(operand: object) -> torch.Tensor | float:
    """An empty tensor, or a number, of the same kind."""
    value = operand.meta["val"] if isinstance(operand, fx.Node) else operand
    if isinstance(value, torch.Tensor):
        return torch.empty((0,) * value.dim(), dtype=value.dtype)
    return 1.0 if isinstance(value, float | torch.SymFloat) else 1


def _truth(value: Value) -> Bool:
    if is_bool(value):
        return value
    return compare("ne", value, sympy.S.Zero)


@reads("logical_and", "bitwise_and", "__and__")
def _and(call: Call) -> Value:
    return conjunction(*_truths(call))


@reads("logical_or", "bitwise_or", "__or__")
def _or(call: Call) -> Value:
    return disjunction(*_truths(call))


@reads("logical_xor", "bitwise_xor", "__xor__")
def _xor(call: Call) -> Value:
    return negation(same_truth(*_truths(call)))


def _truths(call: Call) -> tuple[Bool, Bool]:
    if call.dtype is not torch.bool:
        raise UnreadError("combines the bits of integers")
    left, right = _operands(call)
    return _truth(left), _truth(right)


@reads("logical_not", "bitwise_not")
def _not(call: Call) -> Value:
    if call.dtype is not torch.bool:
        raise UnreadError("combines the bits of integers")
    return negation(_truth(call.value(call.argument("self"))))


# ** choices **


@reads("where")
def _where(call: Call) -> Value:
    condition = _truth(call.value(call.argument("condition")))
    return _chosen(call, condition, call.value(call.argument("self")), call.value(call.argument("other")))


@reads("masked_fill")
def _masked_fill(call: Call) -> Value:
    hidden = _truth(call.value(call.argument("mask")))
    return _chosen(call, hidden, call.value(call.argument("value")), call.value(call.argument("self")))


@reads("index_put")
def _index_put(call: Call) -> Value:
    """x[mask] = number."""
    mask, values = call.argument("indices")[0], call.argument("values")
    whole = is_tensor(mask) and mask.meta["val"].dtype is torch.bool and mask.meta["val"].dim() == call.rank
    if not whole or call.argument("accumulate", False) or values.meta["val"].numel() != 1:
        raise UnreadError("is assigned to at positions that are not followed")
    new = call.read(values, [sympy.S.Zero] * values.meta["val"].dim())
    return _chosen(call, _truth(call.value(mask)), new, call.value(call.argument("self")))


def _chosen(call: Call, condition: Bool, then: Value, other: Value) -> Value:
    if call.dtype is torch.bool:
        return choose(condition, _truth(then), _truth(other))
    return choose_value(condition, as_number(then), as_number(other))


@reads("tril")
def _tril(call: Call) -> Value:
    """x[.., i, j] where j - i <= diagonal."""
    return _triangle(call, below=True)


@reads("triu")
def _triu(call: Call) -> Value:
    """x[.., i, j] where j - i >= diagonal."""
    return _triangle(call, below=False)


def _triangle(call: Call, below: bool) -> Value:
    i, j = call.indices[-2:]
    diagonal = call.number(call.argument("diagonal", 0))
    inside = call.compare("le" if below else "ge", j - i, diagonal)
    return _chosen(call, inside, call.value(call.argument("self")), sympy.S.Zero)
