"""Against the data, from an operand of attention through what is linear in tensors that depend on the tokens.

Sums of such tensors, products of one with what is the same for all tokens, joins and cuts of the width, sums over it,
casts and layout operations are linear, for each token alike. The walk ends at everything else: a norm, a rotation by
positions, a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .axes import Axis, Dim, Layout, same_size, size_of
from .contractions import contraction
from .layouts import Part, Repeat, is_cast, is_tensor, layout_step, shape_of
from .nodes import args_of, argument
from .roles import peel
from .sites import AttentionSite

__all__ = ["LinearWalk", "drops_nothing"]

aten = torch.ops.aten

Inputs = tuple[tuple[fx.Node, Layout], ...]
"""What a step reads that depends on the tokens, with its layout."""

_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_SCALES = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
_SAME_SHAPE = {aten.neg.default}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default}


class LinearWalk:
    """The steps behind an operand, up to where they are no longer linear."""

    def __init__(self, site: AttentionSite, keys: Axis) -> None:
        self.space, self.keys = site.space, keys
        self.batch = set(self.space.resolve(site.axes.batch))
        self.heads = set(self.space.axes((site.axes.heads, site.axes.groups)))
        self.layouts: dict[fx.Node, Layout] = {}
        self.adds: list[fx.Node] = []
        self.constants: list[tuple[fx.Node, fx.Node]] = []

    def narrowest(self, root: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
        """The tensor with the fewest numbers for a token among those through which all ways lead; deep ones first."""
        pending: dict[fx.Node, Layout] = {root: layout}
        found: list[tuple[int, fx.Node]] = []
        while pending:
            node = max(pending)
            layout = self.space.resolve_layout(pending.pop(node))
            alike = node is not root and node.meta["val"].dtype == root.meta["val"].dtype  # no codes of a latent
            if not pending and alike and (width := self._width(layout)) is not None:
                found.append((width, node))
            self.layouts[node] = layout
            inputs = self._inputs(node, layout)
            if inputs is None:
                if pending:  # its ways meet no others: no tensor further up is all there is
                    break
                continue
            for source, its_layout in inputs:
                if source not in pending:
                    pending[source] = its_layout
                elif not self._agree(pending[source], its_layout):
                    return None
        if not found:
            return None
        least = min(width for width, _ in found)
        node = next(node for width, node in reversed(found) if width == least)
        return node, self.space.resolve_layout(self.layouts[node])

    def _width(self, layout: Layout) -> int | None:
        """How many numbers a token has, where nothing but tokens and batch tells them apart."""
        axes = self.space.axes(layout)
        if self.keys not in axes or axes & self.heads:
            return None
        width = size_of(tuple(axis for axis in axes if axis is not self.keys and axis not in self.batch))
        return width if isinstance(width, int) and width > 1 else None

    def _agree(self, one: Layout, other: Layout) -> bool:
        """Whether two ways come to a tensor with the same meaning of its dimensions; new axes become one."""
        fixed = {self.keys, *self.batch, *self.heads}
        for a, b in zip(self.space.resolve_layout(one), self.space.resolve_layout(other), strict=True):
            if a != b and ({*a, *b} & fixed or not self.space.unify(a, b)):
                return False
        return True

    def _varies(self, layout: Layout) -> bool:
        return self.keys in self.space.axes(layout)

    def _constant(self, node: fx.Node, layout: Layout, reader: fx.Node) -> bool:
        """Whether a tensor is the same for all tokens and sequences; what weights tell apart are heads, not those."""
        axes = self.space.axes(layout)
        if self.keys in axes:
            return False
        if told := axes & self.batch:
            if peel(node, layout, self.space).root.op not in ("placeholder", "get_attr"):
                return False
            self.batch -= told
            self.heads |= told
        self.constants.append((node, reader))
        return True

    def _inputs(self, node: fx.Node, layout: Layout) -> Inputs | None:
        """What a linear step reads that depends on the tokens; None where it is no such step."""
        if node.op != "call_function" or not is_tensor(node):
            return None
        if (step := layout_step(node)) is not None:
            before = self._undone(step, layout)
            return None if before is None else ((step.source, before),)
        first = args_of(node)[0] if node.args else None
        if is_cast(node) or node.target in _SAME_SHAPE or drops_nothing(node):
            return ((first, layout),) if isinstance(first, fx.Node) and is_tensor(first) else None
        if node.target in _SUMS | _SCALES:
            return self._of_two(node, layout)
        if node.target in (aten.cat.default, aten.stack.default):
            return self._of_parts(node, layout)
        if node.target is aten.sum.dim_IntList:
            return self._of_sum(node, layout)
        return self._of_product(node, layout)

    def _undone(self, step: Any, layout: Layout) -> Layout | None:
        if isinstance(step, Part):
            taken = () if step.drop else layout[step.dim]
            if set(taken) & {self.keys, *self.batch}:
                return None
            whole = self.space.fresh("w", shape_of(step.source)[step.dim])
            rest = layout[step.dim :] if step.drop else layout[step.dim + 1 :]
            return (*layout[: step.dim], whole, *rest)
        if isinstance(step, Repeat) and any(
            not same_size(count, 1) and set(dim) & {self.keys, *self.batch}
            for count, dim in zip(step.counts, layout, strict=True)
        ):
            return None
        undone: Layout | None = step.undo(layout, self.space)
        return undone

    def _of_two(self, node: fx.Node, layout: Layout) -> Inputs | None:
        """a + b, a - b, a · b, a / b: sums of what depends on tokens, products of it with what does not."""
        varying: list[tuple[fx.Node, Layout]] = []
        for n, operand in enumerate(args_of(node)[:2]):
            if not is_tensor(operand):
                continue
            own = _aligned(operand, layout)
            if self._varies(own):
                if n == 1 and node.target in (aten.div.Tensor, aten.div.Scalar):
                    return None
                varying.append((operand, own))
            elif not self._constant(operand, own, node):
                return None
        added = node.target in _SUMS
        if not varying or (len(varying) == 2 and not added):
            return None
        if added and len(varying) == 1:
            self.adds.append(node)
        return tuple(varying)

    def _of_parts(self, node: fx.Node, layout: Layout) -> Inputs | None:
        dim = int(argument(node, 1, "dim", 0)) % len(layout)
        if set(layout[dim]) & {self.keys, *self.batch}:
            return None
        parts, rest = args_of(node)[0], layout[dim + 1 :]
        if node.target is aten.stack.default:
            layouts = [(*layout[:dim], *rest)] * len(parts)
        else:
            layouts = [(*layout[:dim], self.space.fresh("d", shape_of(part)[dim]), *rest) for part in parts]
        return tuple(zip(parts, layouts, strict=True)) if all(map(self._varies, layouts)) else None

    def _of_sum(self, node: fx.Node, layout: Layout) -> Inputs | None:
        source, dims = args_of(node)[0], args_of(node)[1]
        shape = shape_of(source)
        reduced = {int(dim) % len(shape) for dim in dims or ()}
        kept = iter(layout)
        keeps = bool(argument(node, 2, "keepdim", False))
        before: list[Dim] = []
        for n, size in enumerate(shape):
            if n in reduced:
                before.append(self.space.fresh("s", size))
                if keeps:
                    next(kept)
            else:
                before.append(next(kept))
        return ((source, tuple(before)),) if reduced and self._varies(tuple(before)) else None

    def _of_product(self, node: fx.Node, layout: Layout) -> Inputs | None:
        """One side of a contraction depends on the tokens, the other is a weight; so is what is added."""
        found = contraction(node)
        if found is None or len(found.out_labels) != len(layout) or (found.alpha, found.beta) != (1.0, 1.0):
            return None
        of_label = {label: dim for label, dim in zip(found.out_labels, layout, strict=True) if label is not None}
        for label in found.summed:
            of_label[label] = self.space.fresh("c", shape_of(found.lhs)[found.lhs_labels.index(label)])
        sides = [
            (side, tuple(() if label is None else of_label.get(label, ()) for label in labels))
            for side, labels in ((found.lhs, found.lhs_labels), (found.rhs, found.rhs_labels))
        ]
        varying = [side for side in sides if self._varies(side[1])]
        if len(varying) != 1 or not all(self._constant(*side, node) for side in sides if side is not varying[0]):
            return None
        if found.addend is not None:
            if not self._constant(found.addend, _aligned(found.addend, layout), node):
                return None
            self.adds.append(node)
        return (varying[0],)


def drops_nothing(node: fx.Node) -> bool:
    """Dropout in evaluation mode, or of nothing."""
    return node.target in _DROPOUTS and (args_of(node)[2] is False or args_of(node)[1] == 0)


def _aligned(operand: fx.Node, layout: Sequence[Dim]) -> Layout:
    """The layout of a tensor that is broadcast against one with `layout`."""
    shape = shape_of(operand)
    dims = layout[len(layout) - len(shape) :]
    return tuple(() if same_size(size, 1) else dim for size, dim in zip(shape, dims, strict=True))
