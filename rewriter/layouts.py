"""What ATen's layout operations do to axes.

`layout_step(node)` reads a node as one of a handful of steps. A step can be applied to the layout of its input
(walking with the data) and, except for parts and sums, undone on the layout of its output (walking against it).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .axes import AxisSpace, Dim, Layout, Size, product, same_size
from .nodes import args_of, argument
from .sizes import size_expr

aten = torch.ops.aten


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    """The shape of the tensor a node makes; empty for a 0-d tensor. Raises TypeError for anything but a tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{node.name} is not a tensor")
    return tuple(size_expr(size) for size in value.shape)


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


@dataclass(frozen=True)
class Step:
    """One layout operation: `source` is the tensor it reads."""

    source: fx.Node

    def apply(self, layout: Layout, space: AxisSpace) -> Layout | None:
        raise NotImplementedError

    def undo(self, layout: Layout, space: AxisSpace) -> Layout | None:
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Step):
    """contiguous, clone, detach, a slice that takes everything."""

    def apply(self, layout: Layout, space: AxisSpace) -> Layout | None:
        return layout

    undo = apply


@dataclass(frozen=True)
class View(Step):
    """The same elements in the same order under another shape."""

    before: tuple[Size, ...]
    after: tuple[Size, ...]

    def apply(self, layout: Layout, space: AxisSpace) -> Layout | None:
        return space.factor(tuple(axis for dim in layout for axis in dim), self.after)

    def undo(self, layout: Layout, space: AxisSpace) -> Layout | None:
        return space.factor(tuple(axis for dim in layout for axis in dim), self.before)


@dataclass(frozen=True)
class Permute(Step):
    """Output dimension n is input dimension order[n]."""

    order: tuple[int, ...]

    def apply(self, layout: Layout, space: AxisSpace) -> Layout | None:
        return tuple(layout[i] for i in self.order)

    def undo(self, layout: Layout, space: AxisSpace) -> Layout | None:
        return tuple(layout[self.order.index(i)] for i in range(len(self.order)))


@dataclass(frozen=True)
class Expand(Step):
    """Dimensions of size 1 (and new leading ones) repeat the same element."""

    before: tuple[Size, ...]
    after: tuple[Size, ...]

    def repeated(self) -> list[bool]:
        """Which dimensions of the output repeat one element."""
        lead = len(self.after) - len(self.before)
        return [
            i < lead or (same_size(self.before[i - lead], 1) and not same_size(size, 1))
            for i, size in enumerate(self.after)
        ]

    def apply(self, layout: Layout, space: AxisSpace) -> Layout | None:
        old = iter(layout)
        lead = len(self.after) - len(self.before)
        dims = [() if i < lead else next(old) for i in range(len(self.after))]
        return tuple(
            space.fresh("x", size) if repeated else dim
            for dim, size, repeated in zip(dims, self.after, self.repeated(), strict=True)
        )

    def undo(self, layout: Layout, space: AxisSpace) -> Layout | None:
        lead = len(self.after) - len(self.before)
        kept = zip(layout, self.repeated(), strict=True)
        return tuple(() if repeated else dim for dim, repeated in kept)[lead:]


@dataclass(frozen=True)
class Repeat(Step):
    """Dimension n becomes [counts[n], size] (tiles) or, with `interleave`, [size, counts[n]]."""

    before: tuple[Size, ...]
    counts: tuple[Size, ...]
    interleave: bool = False

    def apply(self, layout: Layout, space: AxisSpace) -> Layout | None:
        lead = len(self.counts) - len(self.before)
        dims: list[Dim] = [()] * lead + list(layout)
        copies = [space.fresh("x", count) for count in self.counts]
        return tuple((dim + copy if self.interleave else copy + dim) for dim, copy in zip(dims, copies, strict=True))

    def undo(self, layout: Layout, space: AxisSpace) -> Layout | None:
        lead = len(self.counts) - len(self.before)
        before = (1,) * lead + self.before
        dims = []
        for dim, size, count in zip(layout, before, self.counts, strict=True):
            cut = space.factor(dim, (size, count) if self.interleave else (count, size))
            if cut is None:
                return None
            dims.append(cut[0] if self.interleave else cut[1])
        return tuple(dims[lead:])


@dataclass(frozen=True)
class Part(Step):
    """The elements start .. start + length of one dimension; `drop` removes the dimension (select, unbind)."""

    dim: int
    start: Size
    length: Size
    drop: bool = False

    def apply(self, layout: Layout, space: AxisSpace) -> Layout | None:
        taken = space.part(layout[self.dim], self.start, self.length)
        if taken is None:
            return None
        head, tail = layout[: self.dim], layout[self.dim + 1 :]
        return head + (() if self.drop else (taken,)) + tail

    def undo(self, layout: Layout, space: AxisSpace) -> Layout | None:
        return None


_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
}
_IDENTITIES = {
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.positive.default,
}
_EXPANDS = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default}
_CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.float.default if hasattr(aten, "float") else None,
    torch.ops.prims.convert_element_type.default,
}


def is_cast(node: fx.Node) -> bool:
    """A conversion of dtype or device that changes no index."""
    return node.target in _CASTS


def layout_step(node: fx.Node) -> Step | None:
    """`node` as a layout operation, or None when it is something else."""
    if node.op != "call_function" or not node.args or not is_tensor(node):
        return None
    if node.target is operator.getitem:
        return _member(node)
    source = args_of(node)[0]
    if not isinstance(source, fx.Node) or not is_tensor(source):
        return None
    target = node.target
    if target in _IDENTITIES:
        return Identity(source)
    if target in _VIEWS:
        return View(source, shape_of(source), shape_of(node))
    if target in _EXPANDS:
        return Expand(source, shape_of(source), shape_of(node))
    if (order := _permutation(node, len(shape_of(source)))) is not None:
        return Permute(source, order)
    if target in (aten.repeat.default, aten.tile.default):
        return _repeat(node, source)
    if target is aten.repeat_interleave.self_int:
        return _repeat_interleave(node, source)
    if target in (aten.slice.Tensor, aten.narrow.default, aten.select.int):
        return _part(node, source)
    return None


def _permutation(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """The order of dimensions when `node` permutes them."""
    order = list(range(rank))
    match node.target:
        case aten.permute.default:
            return tuple(int(i) % rank for i in args_of(node)[1])
        case aten.transpose.int | aten.swapaxes.default | aten.swapdims.default:
            a, b = int(args_of(node)[1]) % rank, int(args_of(node)[2]) % rank
        case aten.t.default if rank == 2:
            a, b = 0, 1
        case aten.mT.default | aten.adjoint.default:
            a, b = rank - 2, rank - 1
        case aten.numpy_T.default:
            return tuple(reversed(order))
        case aten.movedim.intlist | aten.moveaxis.intlist | aten.movedim.int | aten.moveaxis.int:
            return _moved(rank, _ints(args_of(node)[1]), _ints(args_of(node)[2]))
        case _:
            return None
    order[a], order[b] = b, a
    return tuple(order)


def _ints(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _moved(rank: int, source: Sequence[int], destination: Sequence[int]) -> tuple[int, ...]:
    moved = {d % rank: s % rank for s, d in zip(source, destination, strict=True)}
    rest = iter(i for i in range(rank) if i not in moved.values())
    return tuple(moved[i] if i in moved else next(rest) for i in range(rank))


def _repeat(node: fx.Node, source: fx.Node) -> Step | None:
    before, after = shape_of(source), shape_of(node)
    counts = tuple(size_argument(count) for count in args_of(node)[1])
    if len(counts) < len(after):  # tile pads the counts on the left
        counts = (1,) * (len(after) - len(counts)) + counts
    return Repeat(source, before, counts) if None not in counts else None


def _repeat_interleave(node: fx.Node, source: fx.Node) -> Step | None:
    before = shape_of(source)
    count = size_argument(args_of(node)[1])
    dim = argument(node, 2, "dim")
    if count is None or dim is None:
        return None
    counts: list[Size] = [1] * len(before)
    counts[int(dim) % len(before)] = count
    return Repeat(source, before, tuple(counts), interleave=True)


def size_argument(value: object) -> Size | None:
    """An argument that is a size: a number, or a node that computes one."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    return size_expr(value) if isinstance(value, int | torch.SymInt) else None


def _part(node: fx.Node, source: fx.Node) -> Step | None:
    before, after = shape_of(source), shape_of(node)
    if node.target is aten.select.int:
        dim = int(args_of(node)[1]) % len(before)
        index = size_argument(args_of(node)[2])
        if same_size(before[dim], 1):
            return View(source, before, after)
        if index is None:
            return None
        return Part(source, dim, index if not isinstance(index, int) or index >= 0 else before[dim] + index, 1, True)
    if node.target is aten.slice.Tensor and len(node.args) > 4 and args_of(node)[4] != 1:
        return None
    dim = int(args_of(node)[1] if len(node.args) > 1 else 0) % len(before)
    if same_size(before[dim], after[dim]):
        return Identity(source)
    start = size_argument(args_of(node)[2]) if len(node.args) > 2 and args_of(node)[2] is not None else 0
    if start is None:
        return None
    if isinstance(start, int) and start < 0:
        start = before[dim] + start
    return Part(source, dim, start, after[dim])


def _member(node: fx.Node) -> Step | None:
    """One result of split, chunk, unbind or broadcast_tensors."""
    maker, index = node.args
    if not isinstance(maker, fx.Node) or not isinstance(index, int):
        return None
    if maker.target is aten.broadcast_tensors.default:
        source = args_of(maker)[0][index]
        return Expand(source, shape_of(source), shape_of(node))
    source = args_of(maker)[0] if maker.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source):
        return None
    before = shape_of(source)
    members = maker.meta.get("val")
    if maker.target is aten.unbind.int:
        dim = int(args_of(maker)[1] if len(maker.args) > 1 else 0) % len(before)
        if same_size(before[dim], 1):
            return View(source, before, shape_of(node))
        return Part(source, dim, index, 1, drop=True)
    if maker.target in (
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.tensor_split.sections,
    ):
        dim = int(argument(maker, 2, "dim", 0)) % len(before)
        lengths = [size_expr(member.shape[dim]) for member in members or ()]
        if len(lengths) == 1:
            return Identity(source)
        start = sum(lengths[:index], 0)
        return Part(source, dim, start, lengths[index])
    return None


def view_sizes(layout: Layout) -> tuple[Size, ...]:
    return tuple(product(axis.size for axis in dim) for dim in layout)
