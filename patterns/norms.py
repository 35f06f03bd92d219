"""Norms over the last dimensions, as calls and spelled out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import fx

from ..rewriter.axes import product
from ..rewriter.layouts import Expand, Identity, View, is_cast, is_tensor, layout_step, shape_of
from ..rewriter.origins.pieces import Found, Norm, Reading
from ..rewriter.registry import pattern
from ..rewriter.scalars import read_scalar
from .weights import is_number, uncast, weight_origin

aten = torch.ops.aten

_MUL = {aten.mul.Tensor, aten.mul_.Tensor, aten.multiply.Tensor}
_DIV = {aten.div.Tensor, aten.div_.Tensor, aten.true_divide.Tensor}
_ADD = {aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor}
_CLAMPS = {aten.clamp_min.default, aten.clamp.default, aten.maximum.default}


@pattern("producer")
def norm_call(node: fx.Node, reading: Reading) -> Found | None:
    """rms_norm(x, widths, weight), layer_norm(x, widths, weight, bias)."""
    kinds: dict[object, Literal["rms", "layer"]] = {aten.rms_norm.default: "rms", aten.layer_norm.default: "layer"}
    kind = kinds.get(node.target)
    source = node.args[0] if node.args else None
    if kind is None or not isinstance(source, fx.Node):
        return None
    count = len(node.args[1])  # type: ignore[arg-type]
    weight = node.args[2] if len(node.args) > 2 else node.kwargs.get("weight")
    return Found(_norm(node, kind, source, range(-count, 0), weight), source)


@pattern("producer")
def norm_spelled(node: fx.Node, reading: Reading) -> Found | None:
    """weight * (x * rsqrt(mean(x²) + eps)): rms; of x - mean(x): layer; x / sqrt(sum(x²)), x / |x|: l2."""
    if (found := _unweighted(node)) is not None:
        return found
    for one, weight in _operands(node) if node.target in _MUL else ():
        inner = _unweighted(uncast(one))
        if inner is not None and weight_origin(weight) is not None:
            assert isinstance(inner.piece, Norm)
            return Found(replace(inner.piece, node=node, weight=weight), inner.source)
    return None


def _operands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(x, factor) of a product or quotient of two tensors, either way round for a product."""
    if node.target not in _MUL | _DIV or len(node.args) < 2:
        return []
    a, b = node.args[0], node.args[1]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or not is_tensor(a) or not is_tensor(b):
        return []
    return [(a, b), (b, a)] if node.target in _MUL else [(a, b)]


def _unweighted(node: fx.Node) -> Found | None:
    """x times (or, for a division, over) a function of the squares of x along the last dimensions."""
    for x, factor in _operands(node):
        if shape_of(x) != shape_of(node):
            continue
        total = _root(_bare(factor), inverse=node.target in _MUL)
        found = _normalised(node, x, factor, _without_eps(total)) if total is not None else None
        if found is not None:
            return found
    return None


def _normalised(node: fx.Node, x: fx.Node, factor: fx.Node, total: fx.Node) -> Found | None:
    squared: object
    if total.target is aten.linalg_vector_norm.default:
        if read_scalar(total.args[1] if len(total.args) > 1 else 2.0) != 2.0:
            return None
        squared, dims = total.args[0], total.args[2] if len(total.args) > 2 else None
    elif total.target in (aten.mean.dim, aten.sum.dim_IntList):
        squared, dims = _squared(total.args[0]), total.args[1]
    else:
        return None
    if not isinstance(squared, fx.Node) or uncast(squared) is not uncast(x):
        return None
    over = _from_the_end(dims, len(shape_of(x)))
    if over is None or not _lines_up(factor, x, len(over)):
        return None
    if total.target is not aten.mean.dim:
        return Found(_norm(node, "l2", x, over), x)
    centred = _centred(uncast(x), over)
    if centred is not None:
        return Found(_norm(node, "layer", x, over), centred)
    return Found(_norm(node, "rms", x, over), x)


def _norm(
    node: fx.Node, kind: Literal["rms", "layer", "l2"], source: fx.Node, over: Iterable[int], weight: object = None
) -> Norm:
    dims = tuple(over)
    width = product(shape_of(source)[dim] for dim in dims)
    return Norm(node, kind, dims, width, weight if isinstance(weight, fx.Node) else None)


def _from_the_end(dims: object, rank: int) -> tuple[int, ...] | None:
    """Dimensions counted from the end, where they are the last ones."""
    if not isinstance(dims, list | tuple):
        return None
    over = tuple(sorted(int(dim) % rank - rank for dim in dims))
    return over if over == tuple(range(-len(over), 0)) else None


def _lines_up(factor: fx.Node, x: fx.Node, over: int) -> bool:
    """Whether every row is divided by its own norm: views keep the order, so the shape decides."""
    while is_cast(factor) or isinstance(layout_step(factor), Expand):
        factor = factor.args[0]  # type: ignore[assignment]
    lead = shape_of(x)[: len(shape_of(x)) - over]
    return shape_of(factor) == (*lead, *(1 for _ in range(over)))


def _root(node: fx.Node, inverse: bool) -> fx.Node | None:
    """What a square root (or its inverse) is taken of; a length stands for its own square."""
    power = read_scalar(node.args[1]) if node.target is aten.pow.Tensor_Scalar else None
    given = node.args[0] if node.args else None
    if inverse:
        if node.target is aten.rsqrt.default or power == -0.5:
            return given if isinstance(given, fx.Node) else None
        if node.target is aten.reciprocal.default and isinstance(given, fx.Node):
            return _root(_bare(given), inverse=False)
        if node.target in _DIV and read_scalar(given) == 1.0 and isinstance(node.args[1], fx.Node):
            return _root(_bare(node.args[1]), inverse=False)
        return None
    if node.target is aten.sqrt.default or power == 0.5:
        return given if isinstance(given, fx.Node) else None
    inner = _without_eps(node)
    if inner.target is aten.linalg_vector_norm.default:
        return inner
    return _root(inner, inverse=False) if inner is not node else None


def _bare(node: fx.Node) -> fx.Node:
    """Without the casts, views and expansions that lead to it, none of which changes the order of elements."""
    while True:
        step = layout_step(node)
        if isinstance(step, View | Expand | Identity):
            node = step.source
        elif is_cast(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return node


def _without_eps(node: fx.Node) -> fx.Node:
    """A sum without the small number that keeps it from zero."""
    node = _bare(node)
    given = node.args[0] if node.args else None
    if isinstance(given, fx.Node) and (node.target in _CLAMPS or (node.target in _ADD and is_number(node.args[1]))):
        return _bare(given)
    return node


def _squared(node: object) -> object:
    if not isinstance(node, fx.Node):
        return None
    node = uncast(node)
    if node.target is aten.pow.Tensor_Scalar and read_scalar(node.args[1]) == 2.0:
        return node.args[0]
    if node.target is aten.square.default or (node.target in _MUL and node.args[0] is node.args[1]):
        return node.args[0]
    return None


def _centred(node: fx.Node, over: tuple[int, ...]) -> fx.Node | None:
    """x of x - mean(x)."""
    if node.target is not aten.sub.Tensor or node.kwargs:
        return None
    x, mean = node.args[0], node.args[1]
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node) or not _lines_up(mean, node, len(over)):
        return None
    mean = _bare(mean)
    given = mean.args[0] if mean.target is aten.mean.dim else None
    if not isinstance(given, fx.Node) or uncast(given) is not uncast(x):
        return None
    return x if _from_the_end(mean.args[1], len(shape_of(x))) == over else None
