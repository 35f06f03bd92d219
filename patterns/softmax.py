"""Spellings of softmax.

    softmax(x)                        the library calls
    e / sum(e),  e = exp(x)           by hand, with or without a subtracted maximum
    (e @ v) / sum(e)                  normalised after the value product
    exp(x - logsumexp(x))             through the log-sum-exp
    exp(log_softmax(x))
    exp2(x) / sum(exp2(x))            powers of two: the scores times log 2
    e / (1 + sum(e))                  "off by one": a sink of score 0

A subtracted maximum is left among the score steps: it is a bias without the key axis, which softmax ignores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..rewriter.axes import AxisSpace
from ..rewriter.layouts import is_cast, is_tensor, layout_step, shape_of
from ..rewriter.nodes import args_of
from ..rewriter.registry import pattern
from ..rewriter.scalars import read_scalar
from ..rewriter.sites import SoftmaxSpelling
from ..rewriter.totals import broadcasts, layout_of_total
from . import examples

aten = torch.ops.aten

_LIBRARY = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default}
_EXPONENTIALS: dict[object, float] = {
    aten.exp.default: 1.0,
    aten.exp_.default: 1.0,
    aten.exp2.default: math.log(2),
    aten.exp2_.default: math.log(2),
}
_ADD = {aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor}
_SUB = {aten.sub.Tensor, aten.sub_.Tensor}
_DIV = {aten.div.Tensor, aten.true_divide.Tensor, aten.div_.Tensor}
_MUL = {aten.mul.Tensor, aten.mul_.Tensor}
_FLOORS = {aten.clamp_min.default, aten.clamp.default, aten.maximum.default}


def _dim(node: fx.Node, position: int = 1) -> int | None:
    """The one dimension an operator reduces, counted from the front."""
    dims = args_of(node)[position] if len(node.args) > position else node.kwargs.get("dim")
    if isinstance(dims, list | tuple):
        if len(dims) != 1:
            return None
        dims = dims[0]
    if not isinstance(dims, int) or not isinstance(args_of(node)[0], fx.Node):
        return None
    return dims % max(len(shape_of(args_of(node)[0])), 1)


def _dtype(node: fx.Node) -> torch.dtype | None:
    found = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)]
    return found[0] if found else None


@pattern("softmax", examples=((examples.library, examples.QKV),))
def library_softmax(node: fx.Node) -> SoftmaxSpelling | None:
    """softmax(x, dim)."""
    if node.target not in _LIBRARY or (dim := _dim(node)) is None:
        return None
    return SoftmaxSpelling(node, args_of(node)[0], dim, node, _dtype(node))


@pattern("softmax", examples=((examples.of_log_softmax, examples.QKV),))
def exponential_of_log_softmax(node: fx.Node) -> SoftmaxSpelling | None:
    """exp(log_softmax(x))."""
    inner = args_of(node)[0] if node.target is aten.exp.default else None
    if not isinstance(inner, fx.Node) or inner.target not in (aten.log_softmax.int, aten._log_softmax.default):
        return None
    dim = _dim(inner)
    return None if dim is None else SoftmaxSpelling(node, args_of(inner)[0], dim, node, _dtype(inner))


@pattern("softmax", examples=((examples.less_logsumexp, examples.QKV),))
def exponential_of_shifted(node: fx.Node) -> SoftmaxSpelling | None:
    """exp(x - logsumexp(x, keepdim))."""
    inner = args_of(node)[0] if node.target is aten.exp.default else None
    if not isinstance(inner, fx.Node) or inner.target not in _SUB:
        return None
    scores, shift = args_of(inner)[:2]
    for total in _upwards(shift):
        if total.target is aten.logsumexp.default and args_of(total)[0] is scores and (dim := _dim(total)) is not None:
            return SoftmaxSpelling(node, scores, dim, node) if _lines_up(total, shift, scores, dim) else None
    return None


@pattern("softmax", examples=((examples.over_sum, examples.QKV),))
def exponentials_over_their_sum(node: fx.Node) -> SoftmaxSpelling | None:
    """e / sum(e), at once or after the value product; `node` is e."""
    base = _EXPONENTIALS.get(node.target)
    if base is None or not is_tensor(node) or not isinstance(args_of(node)[0], fx.Node):
        return None
    later: SoftmaxSpelling | None = None
    for total, dim in _totals(node):
        for divisor in _divisors(total, args_of(node)[0]):
            found = SoftmaxSpelling(
                node, args_of(node)[0], dim, node, sink=divisor.sink, base=base, inexact=divisor.inexact
            )
            for quotient, numerator in _quotients(divisor):
                if node in _upwards(numerator, casts=True) and shape_of(numerator) == shape_of(node):
                    if _lines_up(total, divisor.node, node, dim):
                        return replace(found, weights=quotient)
                elif divisor.sink is None:
                    later = replace(found, divided_later=divisor.node, total=total)
    return later


def _totals(exponentials: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """Sums of the exponentials over one dimension."""
    for user in exponentials.users:
        dim: int | None = None
        if user.target is aten.sum.dim_IntList:
            dim = _dim(user)
        elif user.target is aten.linalg_vector_norm.default and args_of(user)[1] == 1:  # F.normalize(p=1) of positives
            dim = _dim(user, 2)
        elif user.target is aten.einsum.default and len(args_of(user)[1]) == 1:
            dim = _einsum_dim(str(args_of(user)[0]))
        if dim is not None:
            yield user, dim


def _einsum_dim(equation: str) -> int | None:
    """The dimension that "bhqk->bhq" sums over, when the others keep their order."""
    term, _, output = equation.replace(" ", "").partition("->")
    gone = [i for i, letter in enumerate(term) if letter not in output]
    return gone[0] if len(gone) == 1 and term.replace(term[gone[0]], "") == output else None


@dataclass(frozen=True)
class _Divisor:
    node: fx.Node
    sink: float | None = None
    inexact: str | None = None
    reciprocal: bool = False


def _divisors(total: fx.Node, scores: fx.Node) -> Iterator[_Divisor]:
    """The row sums and what layout operations, `1 +` or a floor make of them."""
    pending = [_Divisor(total)]
    while pending:
        divisor = pending.pop(0)
        yield divisor
        for user in divisor.node.users:
            step = layout_step(user)
            if (step is not None and step.source is divisor.node) or is_cast(user):
                pending.append(replace(divisor, node=user))
            elif _is_reciprocal(user):
                pending.append(replace(divisor, node=user, reciprocal=not divisor.reciprocal))
            elif user.target in _ADD and divisor.sink is None:
                other = args_of(user)[1] if args_of(user)[0] is divisor.node else args_of(user)[0]
                if _is_score_zero(other, scores):
                    pending.append(replace(divisor, node=user, sink=0.0))
                elif read_scalar(other) is not None:
                    reason = f"{read_scalar(other):g} is added to the row sums"
                    pending.append(replace(divisor, node=user, inexact=reason))
            elif user.target in _FLOORS and len(user.args) > 1 and read_scalar(args_of(user)[1]) is not None:
                pending.append(replace(divisor, node=user, inexact="the row sums are bounded from below"))


def _is_score_zero(value: object, scores: fx.Node) -> bool:
    """exp(0 - shift): 1 for unshifted scores, exp(-m) for scores x - m."""
    if scores.target not in _SUB:
        return read_scalar(value) == 1.0
    if not isinstance(value, fx.Node) or value.target is not aten.exp.default:
        return False
    negated = args_of(value)[0]
    return (
        isinstance(negated, fx.Node)
        and negated.target is aten.neg.default
        and args_of(negated)[0] is args_of(scores)[1]
    )


def _is_reciprocal(node: fx.Node) -> bool:
    power = node.target is aten.pow.Tensor_Scalar and args_of(node)[1] == -1
    return power or node.target is aten.reciprocal.default


def _quotients(divisor: _Divisor) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(quotient, numerator) of every division by the divisor, or multiplication by its reciprocal."""
    for user in divisor.node.users:
        if not divisor.reciprocal and user.target in _DIV and args_of(user)[1] is divisor.node:
            yield user, args_of(user)[0]
        elif divisor.reciprocal and user.target in _MUL:
            other = args_of(user)[1] if args_of(user)[0] is divisor.node else args_of(user)[0]
            if isinstance(other, fx.Node):
                yield user, other


def _upwards(node: object, casts: bool = False) -> Iterator[fx.Node]:
    """The node and what it was before layout operations (and casts)."""
    while isinstance(node, fx.Node):
        yield node
        step = layout_step(node)
        if step is not None:
            node = step.source
        elif casts and is_cast(node):
            node = args_of(node)[0]
        else:
            return


def _lines_up(total: fx.Node, divisor: object, tensor: object, dim: int) -> bool:
    """Whether `divisor` broadcasts against `tensor` so that every row meets its own sum.

    exp(x) / exp(x).sum(-1) without keepdim runs for square scores and divides by the wrong rows.
    """
    assert isinstance(tensor, fx.Node) and isinstance(divisor, fx.Node)
    space = AxisSpace()
    own = space.fresh_layout([f"x{i}" for i in range(len(shape_of(tensor)))], shape_of(tensor))
    moved = layout_of_total(total, divisor, own, dim, space)
    return moved is not None and broadcasts(moved, own, space)
