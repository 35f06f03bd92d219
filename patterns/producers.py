"""What queries, keys and values are made with: projections, norms, scales, rotations and caches, spelling by spelling.

Each function looks at one node and answers with the piece it computes and the tensor to go on at, or with None.
Norms are in `norms`, rotations in `rotations`, caches in `caches`.
"""

from __future__ import annotations

import torch
from torch import fx

from ..rewriter.axes import AxisSpace, Dim, Layout, product, same_size
from ..rewriter.contractions import Contraction, Labels, contraction
from ..rewriter.layouts import Expand, Part, Permute, is_cast, is_tensor, layout_step, shape_of
from ..rewriter.origins.pieces import Activation, Found, PositionScale, Projection, Reading, ScaleBy, Slice
from ..rewriter.registry import pattern
from ..rewriter.scalars import read_scalar
from . import caches, norms, rotations
from .weights import is_number, weight_origin

__all__ = ["caches", "norms", "rotations"]

aten = torch.ops.aten

_MUL = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar, aten.multiply.Tensor}
_DIV = {aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar, aten.true_divide.Tensor}
_ADD = {aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor}
_ARANGE = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default}
_DROPOUT = {aten.dropout.default, aten.dropout_.default}


# ** projections **


@pattern("producer")
def projection(node: fx.Node, reading: Reading) -> Found | None:
    """x W, x Wᵀ + b, einsum(x, W), addmm(b, x, W): a contraction with a weight."""
    product_node, bias = _without_bias(node)
    found = contraction(product_node)
    if found is None or not found.summed:
        return _convolution(node, reading)
    return _projection(node, found, bias, reading)


def _without_bias(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """x of x + b where b is a weight of one dimension."""
    if node.target in _ADD and len(node.args) == 2 and not node.kwargs:
        for one, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            vector = is_tensor(other) and len(shape_of(other)) <= 1  # type: ignore[arg-type]
            if vector and is_tensor(one) and weight_origin(other) is not None:  # type: ignore[arg-type]
                return one, other  # type: ignore[return-value]
    return node, None


def _projection(node: fx.Node, found: Contraction, bias: fx.Node | None, reading: Reading) -> Found | None:
    if read_scalar(found.alpha) != 1.0 or (found.addend is not None and read_scalar(found.beta) != 1.0):
        return None
    if bias is not None and found.addend is not None:
        return None
    for data, data_labels, weight, labels in _roles(found, reading):
        origin = weight_origin(weight)
        addend = bias if bias is not None else found.addend
        if origin is None or (addend is not None and weight_origin(addend) is None):
            continue
        sizes = dict(zip(labels, shape_of(weight), strict=True))
        shared = set(data_labels) & set(labels) - {None}
        new = [label for label in found.out_labels if label in sizes and label not in shared]
        if not new:
            return None
        own = shared - found.summed
        if own and _repeats(data, data_labels, own):  # the same source for every matrix: one wide weight
            new, own = [label for label in found.out_labels if label in own or label in new], set()
        layout, axes = _layouts(found, data, data_labels, new, reading)
        piece = Projection(
            node,
            weight=weight,
            bias=addend,
            in_width=product(sizes[label] for label in found.summed),
            out_width=product(sizes[label] for label in new),
            source=data,
            parameter=origin[0],
            learned=origin[1],
            transposed=_stored_in_out(weight, labels, found),
            per_head=bool(own),
            axes=axes,
        )
        return Found(piece, data, layout)
    return None


def _roles(found: Contraction, reading: Reading) -> list[tuple[fx.Node, Labels, fx.Node, Labels]]:
    """(data, its labels, weight, its labels), the likely one first. A weight has no axis of tokens."""
    left = (found.lhs, found.lhs_labels, found.rhs, found.rhs_labels)
    right = (found.rhs, found.rhs_labels, found.lhs, found.lhs_labels)
    layout = reading.layout
    if layout is not None and reading.token_dims and len(layout) == len(found.out_labels):
        tokens = {found.out_labels[dim] for dim in reading.token_dims}
        fitting = [role for role in (left, right) if tokens <= set(role[1]) and not tokens & set(role[3])]
        if fitting:
            return fitting
    learned = [role for role in (left, right) if (origin := weight_origin(role[2])) is not None and origin[1]]
    if len(learned) == 1:
        return learned
    return [left]


def _repeats(data: fx.Node, labels: Labels, own: set[str | None]) -> bool:
    """Whether a tensor is the same along the dimensions with these labels: an expanded one."""
    space = AxisSpace()
    layout: Layout | None = tuple(space.fresh("r", size) for size in shape_of(data))
    wanted = {axis for label, dim in zip(labels, layout or (), strict=True) if label in own for axis in dim}
    while layout is not None and (step := layout_step(data)) is not None and not isinstance(step, Part):
        layout, data = step.undo(space.resolve_layout(layout), space), step.source
        if layout is not None and not space.axes(tuple((axis,) for axis in wanted)) & space.axes(layout):
            return True
    return False


def _layouts(
    found: Contraction, data: fx.Node, data_labels: Labels, new: list[str | None], reading: Reading
) -> tuple[Layout | None, Dim]:
    """The layout of the data, and the axes that the weight adds."""
    out = reading.layout
    if out is None or len(out) != len(found.out_labels):
        return None, ()
    dims = dict(zip(found.out_labels, out, strict=True))
    space = AxisSpace()
    layout = tuple(
        () if label is None else dims[label] if label in dims else space.fresh("c", size)
        for label, size in zip(data_labels, shape_of(data), strict=True)
    )
    return layout, tuple(axis for label in new for axis in dims[label])


def _stored_in_out(weight: fx.Node, labels: Labels, found: Contraction) -> bool:
    """Whether the parameter is stored [in, out]."""
    order = list(labels)
    node = weight
    while (step := layout_step(node)) is not None or is_cast(node):
        if isinstance(step, Permute):
            order = [order[step.order.index(i)] for i in range(len(order))]
        elif step is not None and shape_of(step.source) != shape_of(node):
            return False
        node = step.source if step is not None else node.args[0]  # type: ignore[assignment]
    return len(order) == 2 and order[0] in found.summed


def _convolution(node: fx.Node, reading: Reading) -> Found | None:
    """conv(x, W) with a kernel of one element: a projection of the channels."""
    if node.target not in _CONVOLUTIONS:
        return None
    data, weight = node.args[0], node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    if not isinstance(data, fx.Node) or not isinstance(weight, fx.Node):
        return None
    origin, sizes = weight_origin(weight), shape_of(weight)
    same = len(shape_of(data)) == len(shape_of(node)) and shape_of(data)[2:] == shape_of(node)[2:]
    grouped = not same_size(sizes[1], shape_of(data)[1])
    if origin is None or not same or grouped or any(not same_size(size, 1) for size in sizes[2:]):
        return None
    axes = reading.layout[1] if reading.layout is not None else ()
    piece = Projection(
        node, weight, bias if isinstance(bias, fx.Node) else None, sizes[1], sizes[0], data, *origin, axes=axes
    )
    return Found(piece, data)


# ** functions of each element **

_ACTIVATIONS = {
    aten.relu.default,
    aten.silu.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.softplus.default,
    aten.mish.default,
    aten.hardswish.default,
    aten.clamp.default,
}


@pattern("producer")
def activation(node: fx.Node, reading: Reading) -> Found | None:
    """f(x) of every element by itself, such as silu(x)."""
    x = node.args[0] if node.args else None
    if node.target not in _ACTIVATIONS or not isinstance(x, fx.Node) or node.all_input_nodes != [x]:
        return None
    return Found(Activation(node, str(node.target).removeprefix("aten.").partition(".")[0]), x)


# ** scales **


@pattern("producer")
def scale(node: fx.Node, reading: Reading) -> Found | None:
    """x * c, c * x, x / c, -x for a number c."""
    x = node.args[0] if node.args else None
    if node.target is aten.neg.default and isinstance(x, fx.Node):
        return Found(ScaleBy(node, -1.0), x)
    if node.target in _MUL:
        for one, other in ((x, node.args[1]), (node.args[1], x)):
            if isinstance(one, fx.Node) and is_tensor(one) and shape_of(one) and is_number(other):
                return Found(ScaleBy(node, read_scalar(other), other if isinstance(other, fx.Node) else None), one)
    if node.target in _DIV and isinstance(x, fx.Node) and is_number(node.args[1]) and not node.kwargs:
        number, by = read_scalar(node.args[1]), node.args[1]
        if number != 0.0:
            inverse = None if number is None else 1.0 / number
            return Found(ScaleBy(node, inverse, by if isinstance(by, fx.Node) else None), x)
    return None


@pattern("producer")
def position_scale(node: fx.Node, reading: Reading) -> Found | None:
    """x * t, where t has one number for each token and is made of positions (Llama 4, Ministral 3)."""
    if node.target not in _MUL or not reading.token_dims:
        return None
    for x, t in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if not (is_tensor(x) and is_tensor(t)) or shape_of(x) != shape_of(node):  # type: ignore[arg-type]
            continue
        numbers = _not_expanded(t)  # type: ignore[arg-type]
        first = len(shape_of(node)) - len(shape_of(numbers))
        wide = {first + dim for dim, size in enumerate(shape_of(numbers)) if not same_size(size, 1)}
        if wide == set(reading.token_dims) and _made_of_positions(numbers):
            return Found(PositionScale(node, x, numbers), x)  # type: ignore[arg-type]
    return None


def _not_expanded(node: fx.Node) -> fx.Node:
    """What was expanded and cast."""
    while True:
        step = layout_step(node)
        if isinstance(step, Expand):
            node = step.source
        elif is_cast(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return node


def _made_of_positions(node: fx.Node, budget: int = 64) -> bool:
    """Whether a tensor comes from counting alone, or from whole numbers that the graph is given."""
    pending, seen = [node], {node}
    counts = False
    while pending:
        one = pending.pop()
        if len(seen) > budget:
            return False
        if is_tensor(one) and not one.all_input_nodes:
            integer = not one.meta["val"].dtype.is_floating_point
            if one.op == "placeholder" and not integer:
                return False
            counts = counts or (integer and (one.op == "placeholder" or one.target in _ARANGE))
        pending.extend(set(one.all_input_nodes) - seen)
        seen.update(one.all_input_nodes)
    return counts


@pattern("producer")
def indexed(node: fx.Node, reading: Reading) -> Found | None:
    """x[.., [c]] for a constant c."""
    if node.target is not aten.index.Tensor or not isinstance(node.args[0], fx.Node):
        return None
    used = [(dim, index) for dim, index in enumerate(node.args[1]) if index is not None]  # type: ignore[arg-type]
    before, after = shape_of(node.args[0]), shape_of(node)
    if len(used) != 1 or len(before) != len(after):
        return None
    dim, index = used[0]
    start = read_scalar(index)
    if start is None or not is_tensor(index) or index.meta["val"].dtype == torch.bool:
        return None
    first = int(start) if start >= 0 else before[dim] + int(start)
    return Found(Slice(node, reading.along(dim, len(before)), first, 1, before[dim]), node.args[0])


@pattern("producer")
def nothing(node: fx.Node, reading: Reading) -> Found | None:
    """dropout(x, p, False)."""
    if node.target in _DROPOUT and node.args[2] is False and isinstance(node.args[0], fx.Node):
        return Found(None, node.args[0])
    return None
