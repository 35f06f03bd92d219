"""What happens to scores between the product and the softmax, and to weights between the softmax and the values.

Each function looks at one node and at the input that carries the scores (or weights), and names the step, or answers
None. Both operand orders of a commutative operator come here, because the caller asks for each input in turn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..rewriter.layouts import is_cast, is_tensor, shape_of
from ..rewriter.nodes import args_of, argument
from ..rewriter.registry import pattern
from ..rewriter.scalars import read_scalar
from ..rewriter.score_form import HIDES
from ..rewriter.sites import (
    Bias,
    Cast,
    Changed,
    Dropout,
    Fill,
    Gate,
    NanToZero,
    Rehidden,
    Scale,
    ScoreStep,
    Sink,
    Tanh,
    WeightStep,
)
from . import examples

aten = torch.ops.aten

_MUL = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar}
_DIV = {aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar, aten.true_divide.Tensor}
_ADD = {aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor, aten.add_.Scalar}
_SUB = {aten.sub.Tensor, aten.sub.Scalar, aten.sub_.Tensor, aten.sub_.Scalar, aten.rsub.Scalar}
_FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor}
_DROPOUT = {aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default}
_SPREAD = {aten.expand, aten.expand_as}


def _other(node: fx.Node, carrier: fx.Node) -> Any:
    """The second operand of a binary operator, whichever side the carrier is on."""
    return args_of(node)[1] if args_of(node)[0] is carrier else args_of(node)[0]


def _boolean(node: Any) -> bool:
    return isinstance(node, fx.Node) and is_tensor(node) and node.meta["val"].dtype == torch.bool


@pattern("score_step", examples=((examples.in_double, examples.QKV),))
def cast(node: fx.Node, scores: fx.Node) -> ScoreStep | None:
    """scores.to(dtype)."""
    return Cast(node, node.meta["val"].dtype) if is_cast(node) and args_of(node)[0] is scores else None


@pattern("score_step")
def scale(node: fx.Node, scores: fx.Node) -> ScoreStep | None:
    """scores * c, scores / c, -scores."""
    if node.target is aten.neg.default:
        return Scale(node, factor=-1.0)
    if node.target in _MUL:
        other = _other(node, scores)
        if other is scores:  # squared scores
            return None
        number = read_scalar(other)
        return Scale(node, factor=number) if number is not None else Scale(node, by=other)
    if node.target in _DIV and args_of(node)[0] is scores and not node.kwargs.get("rounding_mode"):
        number = read_scalar(args_of(node)[1])
        if number is not None:
            return Scale(node, factor=1.0 / number) if number else None
        return Scale(node, by=args_of(node)[1], divide=True)
    return None


@pattern("score_step", examples=((examples.capped, examples.QKV),))
def soft_cap(node: fx.Node, scores: fx.Node) -> ScoreStep | None:
    """tanh(scores)."""
    return Tanh(node) if node.target in (aten.tanh.default, aten.tanh_.default) else None


@pattern("score_step", examples=((examples.biased, {**examples.QKV, "bias": "B H S T"}),))
def bias(node: fx.Node, scores: fx.Node) -> ScoreStep | tuple[ScoreStep, ...] | None:
    """scores + bias, bias + scores, scores - shift, shift - scores."""
    if node.target not in _ADD | _SUB:
        return None
    other = _other(node, scores)
    if other is scores:
        return None
    alpha = read_scalar(node.kwargs.get("alpha", args_of(node)[2] if len(node.args) > 2 else 1.0))
    if alpha is None:
        return None
    carried_first = args_of(node)[0] is scores
    if node.target in _SUB and (not carried_first or node.target is aten.rsub.Scalar):
        number = read_scalar(other)
        rest = Bias(node, number if number is not None else other)
        return (Scale(node, factor=-1.0), rest) if alpha == 1.0 else None
    if not carried_first and alpha != 1.0:
        return None
    factor = -alpha if node.target in _SUB else alpha
    number = read_scalar(other)
    return Bias(node, number if number is not None else other, factor)


@pattern("score_step", examples=((examples.filled, examples.QKV),))
def fill(node: fx.Node, scores: fx.Node) -> ScoreStep | None:
    """masked_fill(scores, hide, c), where(keep, scores, c), where(hide, c, scores)."""
    if node.target in _FILL and args_of(node)[0] is scores:
        value = read_scalar(args_of(node)[2])
        return None if value is None else Fill(node, args_of(node)[1], False, value)
    if node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        condition, yes, no = args_of(node)[:3]
        if not _boolean(condition):
            return None
        keep = yes is scores
        value = read_fill(no if keep else yes)
        return None if value is None else Fill(node, condition, keep, value)
    return None


def read_fill(value: object) -> float | None:
    """A number, or a tensor that holds one number everywhere."""
    number = read_scalar(value)
    if number is not None or not isinstance(value, fx.Node):
        return number
    if value.target in (aten.full_like.default, aten.full.default, aten.new_full.default):
        return read_scalar(args_of(value)[2] if value.target is aten.new_full.default else args_of(value)[1])
    if value.target in (aten.zeros_like.default, aten.zeros.default):
        return 0.0
    overload = getattr(value.target, "overloadpacket", None)
    if overload in _SPREAD or is_cast(value):
        return read_fill(args_of(value)[0])
    if value.target in _MUL:
        factors = [read_fill(factor) for factor in args_of(value)[:2]]
        known = [factor for factor in factors if factor is not None]
        return math.prod(known) if len(known) == len(factors) else None
    if value.target is aten.ones_like.default:
        return 1.0
    return None


@pattern("score_step", examples=((examples.with_sink, {**examples.QKV, "sink": "1 H 1 1"}),))
def sink(node: fx.Node, scores: fx.Node) -> ScoreStep | None:
    """cat([scores, sink], dim): scores of things that have no value."""
    if node.target is not aten.cat.default:
        return None
    parts = args_of(node)[0]
    others = [part for part in parts if part is not scores]
    if len(others) != 1 or len(parts) != 2:
        return None
    rank = len(shape_of(scores))
    dim = int(argument(node, 1, "dim", 0)) % rank
    return Sink(node, others[0], dim, others[0] is parts[0], shape_of(others[0])[dim])


@pattern("score_step", examples=((examples.padded, examples.QKV),))
def padded_sink(node: fx.Node, scores: fx.Node) -> ScoreStep | None:
    """pad(scores, (1, 0), value): a column of one number."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return None
    widths = list(args_of(node)[1])
    mode = args_of(node)[2] if node.target is aten.pad.default and len(node.args) > 2 else "constant"
    value = read_scalar(
        args_of(node)[-1] if isinstance(args_of(node)[-1], int | float) else node.kwargs.get("value") or 0.0
    )
    padded = [i for i, width in enumerate(widths) if width != 0]
    if mode != "constant" or value is None or len(padded) != 1 or not isinstance(widths[padded[0]], int):
        return None
    if widths[padded[0]] < 0:
        return None
    dim = len(shape_of(scores)) - 1 - padded[0] // 2
    return Sink(node, value, dim, padded[0] % 2 == 0, widths[padded[0]])


@pattern("score_step", examples=((examples.floored, {**examples.QKV, "bias": "B 1 S T"}),))
def floor(node: fx.Node, scores: fx.Node) -> ScoreStep | None:
    """max(scores, the lowest number): changes only rows that are hidden altogether."""
    if node.target not in (aten.maximum.default, aten.max.other, aten.clamp.default, aten.clamp_min.default):
        return None
    if node.target is aten.clamp.default and len(node.args) > 2:
        return None
    bound = read_fill(_other(node, scores) if len(node.args) > 1 else node.kwargs.get("min"))
    return Bias(node, 0.0) if bound is not None and bound <= HIDES else None


@pattern("score_step", examples=((examples.assigned, examples.QKV),))
def assigned(node: fx.Node, scores: fx.Node) -> ScoreStep | None:
    """scores[.., mask] = c with one boolean mask over the last dimensions."""
    if node.target not in (aten.index_put_.default, aten.index_put.default) or args_of(node)[0] is not scores:
        return None
    indices, value = args_of(node)[1], read_fill(args_of(node)[2])
    mask: Any = indices[-1] if indices else None
    if value is None or not _boolean(mask) or any(index is not None for index in indices[:-1]):
        return None
    if len(indices) - 1 + len(shape_of(mask)) != len(shape_of(scores)):
        return None
    return Fill(node, mask, False, value)


# ------------------------------------------------------------------ after the softmax


@pattern("weight_step", examples=((examples.weights_in_double, examples.QKV),))
def weight_cast(node: fx.Node, weights: fx.Node) -> WeightStep | None:
    """weights.to(dtype)."""
    return Cast(node, node.meta["val"].dtype) if is_cast(node) and args_of(node)[0] is weights else None


@pattern("weight_step", examples=((examples.dropped, examples.QKV),))
def dropout(node: fx.Node, weights: fx.Node) -> WeightStep | None:
    """dropout(weights, p, training)."""
    if node.target not in _DROPOUT:
        return None
    p, training = read_scalar(args_of(node)[1]), args_of(node)[2]
    return Dropout(node, (p if p is not None else 1.0) if training else 0.0)


@pattern("weight_step", examples=((examples.without_nan, examples.QKV),))
def nan_to_zero(node: fx.Node, weights: fx.Node) -> WeightStep | None:
    """nan_to_num(weights)."""
    return NanToZero(node) if node.target in (aten.nan_to_num.default, aten.nan_to_num_.default) else None


@pattern("weight_step", examples=((examples.gated, {**examples.QKV, "gate": "H 1 1"}),))
def gate(node: fx.Node, weights: fx.Node) -> WeightStep | None:
    """weights * gate."""
    if node.target in _MUL:
        other = _other(node, weights)
        if other is weights:
            return None
        if read_scalar(other) == 1.0:
            return Dropout(node, 0.0)
        return Gate(node, other) if is_tensor(other) else Changed(node, "the weights are scaled")
    return None


@pattern("weight_step")
def changed(node: fx.Node, weights: fx.Node) -> WeightStep | None:
    """Elementwise changes that plain attention does not express; the site is still attention, of changed weights."""
    if node.target in _FILL and args_of(node)[0] is weights:
        return Rehidden(node, args_of(node)[1], True, read_scalar(args_of(node)[2]))
    if node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf) and _boolean(args_of(node)[0]):
        kept = args_of(node)[1] is weights
        return Rehidden(node, args_of(node)[0], not kept, read_fill(args_of(node)[2 if kept else 1]))
    if node.target in _ADD | _SUB:
        return Changed(node, "something is added to the weights after the softmax")
    if node.target in _DIV and args_of(node)[0] is weights:
        return Changed(node, "the weights are divided again after the softmax")
    return None
