"""Which elements a rotation pairs.

One reading serves every real spelling. The result is followed up to one tensor x, and each of its elements written as a
sum of elements of x times factors; that is a rotation when the elements come in pairs

    y[n] = x[a] c - x[b] s        y[m] = x[b] c + x[a] s

Which elements are paired is the form. Slices, chunks, strides, stacks and joins only say where an element comes from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from ..rewriter.axes import same_size
from ..rewriter.compat import expr_of, size_hints
from ..rewriter.layouts import Part, Permute, View, is_cast, is_tensor, layout_step, shape_of
from ..rewriter.origins.pieces import RopeForm

__all__ = ["function_of", "rotation_form"]

aten = torch.ops.aten

_MUL = {aten.mul.Tensor, aten.mul_.Tensor, aten.multiply.Tensor}
_ADD = {aten.add.Tensor, aten.add_.Tensor}
_SUB = {aten.sub.Tensor, aten.sub_.Tensor}
_JOINS = {aten.cat.default, aten.concat.default, aten.stack.default}
NODES = 64
"""Nodes between a rotation and what it rotates."""


def rotation_form(node: fx.Node, base: fx.Node) -> tuple[RopeForm, tuple[fx.Node, ...]] | None:
    """How `node` rotates the last dimension of `base`, and cosine and sine; None when it is no rotation of it."""
    form = _form(_Elements(base, _sizes(base, 1)).of(node))
    if form is not None and not isinstance(shape_of(base)[-1], int):
        # a form must not be one of the example sizes only
        return form if _form(_Elements(base, _sizes(base, 3)).of(node)) == form else None
    return form


# ** elements **

Term = tuple[int, int, fx.Node | None]
"""(element of x, sign, factor)"""


@dataclass(frozen=True)
class _Grid:
    """Terms for every element of the last dimensions of a tensor, which have this shape."""

    shape: tuple[int, ...]
    cells: tuple[tuple[Term, ...], ...]

    def pick(self, dim: int, indices: Sequence[int]) -> _Grid:
        shape = (*self.shape[:dim], len(indices), *self.shape[dim + 1 :])
        spots = itertools.product(*(indices if i == dim else range(size) for i, size in enumerate(self.shape)))
        return _Grid(shape, tuple(self.cells[self._flat(spot)] for spot in spots))

    def permute(self, order: Sequence[int]) -> _Grid:
        shape = tuple(self.shape[i] for i in order)
        spots = itertools.product(*(range(size) for size in shape))
        back = [list(order).index(i) for i in range(len(order))]
        return _Grid(shape, tuple(self.cells[self._flat([spot[i] for i in back])] for spot in spots))

    def each(self, change: Callable[[Term], Term]) -> _Grid:
        return _Grid(self.shape, tuple(tuple(change(term) for term in cell) for cell in self.cells))

    def _flat(self, spot: Sequence[int]) -> int:
        place = 0
        for size, at in zip(self.shape, spot, strict=True):
            place = place * size + at
        return place


def _joined(grids: Sequence[_Grid], dim: int) -> _Grid | None:
    first = grids[0].shape
    if any(g.shape[:dim] + g.shape[dim + 1 :] != first[:dim] + first[dim + 1 :] for g in grids):
        return None
    lead = 1
    for size in first[:dim]:
        lead *= size
    cells: list[tuple[Term, ...]] = []
    for row in range(lead):
        for grid in grids:
            length = len(grid.cells) // lead
            cells += grid.cells[row * length : (row + 1) * length]
    return _Grid((*first[:dim], sum(g.shape[dim] for g in grids), *first[dim + 1 :]), tuple(cells))


class _Elements:
    """Writes tensors as sums of elements of `base` times factors, along the last dimensions."""

    def __init__(self, base: fx.Node, size: Callable[[object], int]) -> None:
        self.base, self.size = base, size
        self.lead = len(shape_of(base)) - 1
        self.memo: dict[fx.Node, _Grid | None] = {}

    def of(self, node: object) -> _Grid | None:
        if not isinstance(node, fx.Node) or not is_tensor(node):
            return None
        if node not in self.memo:
            self.memo[node] = None  # a node that is on the way to itself is none
            self.memo[node] = self._read(node) if len(self.memo) < NODES else None
        return self.memo[node]

    def trail(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.size(size) for size in node.meta["val"].shape[self.lead :])

    def _read(self, node: fx.Node) -> _Grid | None:
        if node is self.base:
            (width,) = self.trail(node)
            return _Grid((width,), tuple(((i, 1, None),) for i in range(width)))
        args, target = node.args, node.target
        if target in _MUL:
            return self._times(args[0], args[1])
        if target in _ADD | _SUB and not node.kwargs:
            return self._sum(self.of(args[0]), self.of(args[1]), -1 if target in _SUB else 1)
        if target is aten.addcmul.default and not node.kwargs:
            return self._sum(self.of(args[0]), self._times(args[1], args[2]), 1)
        if target is aten.neg.default:
            grid = self.of(args[0])
            return grid and grid.each(lambda term: (term[0], -term[1], term[2]))
        if is_cast(node):
            return self.of(args[0])
        if target in _JOINS:
            return self._join(node)
        return self._layout(node)

    def _times(self, a: object, b: object) -> _Grid | None:
        one, other = self.of(a), self.of(b)
        if (one is None) == (other is None):
            return None
        grid, factor = (one, b) if one is not None else (other, a)
        if not isinstance(factor, fx.Node) or grid is None or any(t[2] is not None for c in grid.cells for t in c):
            return None
        root = _bare(factor)
        return grid.each(lambda term: (term[0], term[1], root))

    def _sum(self, one: _Grid | None, other: _Grid | None, sign: int) -> _Grid | None:
        if one is None or other is None or one.shape != other.shape:
            return None
        signed = other.each(lambda term: (term[0], sign * term[1], term[2]))
        return _Grid(one.shape, tuple(a + b for a, b in zip(one.cells, signed.cells, strict=True)))

    def _join(self, node: fx.Node) -> _Grid | None:
        stacked = node.target is aten.stack.default
        rank = len(shape_of(node))
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        at = int(dim) % rank - self.lead  # type: ignore[arg-type]
        grids = [self.of(tensor) for tensor in node.args[0]]  # type: ignore[union-attr]
        if at < 0 or any(grid is None for grid in grids):
            return None
        known: list[_Grid] = [grid for grid in grids if grid is not None]
        if stacked:
            known = [_Grid((*g.shape[:at], 1, *g.shape[at:]), g.cells) for g in known]
        return _joined(known, at)

    def _layout(self, node: fx.Node) -> _Grid | None:
        if node.target is aten.slice.Tensor and len(node.args) > 4 and node.args[4] != 1:
            return self._stride(node)
        step = layout_step(node)
        grid = self.of(step.source) if step is not None else None
        if step is None or grid is None:
            return None
        if isinstance(step, Part):
            at, start = step.dim - self.lead, self.size(step.start)
            if at < 0:
                return None
            taken = grid.pick(at, range(start, start + self.size(step.length)))
            return _Grid((*taken.shape[:at], *taken.shape[at + 1 :]), taken.cells) if step.drop else taken
        if isinstance(step, Permute):
            order = [i - self.lead for i in step.order[self.lead :]]
            if list(step.order[: self.lead]) != list(range(self.lead)):
                return None
            return grid.permute(order)
        if isinstance(step, View):
            before, after = step.before[: self.lead], step.after[: self.lead]
            if len(after) < self.lead or not all(map(same_size, before, after)):
                return None
            return _Grid(self.trail(node), grid.cells)
        return grid if shape_of(step.source) == shape_of(node) else None

    def _stride(self, node: fx.Node) -> _Grid | None:
        """x[.., a::n]."""
        grid = self.of(node.args[0])
        at = int(node.args[1]) % len(shape_of(node)) - self.lead  # type: ignore[arg-type]
        if grid is None or at < 0:
            return None
        start, stop, stride = (self.size(node.args[i]) for i in (2, 3, 4))
        return grid.pick(at, range(*slice(start, stop, stride).indices(grid.shape[at])))


# ** the pairs **


def _form(grid: _Grid | None) -> tuple[RopeForm, tuple[fx.Node, ...]] | None:
    """Which pairs a tensor rotates and by which factors, or None when it is no rotation."""
    if grid is None or not grid.cells or any(len(cell) != 2 for cell in grid.cells):
        return None
    factors = list(dict.fromkeys(term[2] for cell in grid.cells for term in cell))
    if len(factors) != 2 or None in factors:
        return None
    for cos, sin in (factors, factors[::-1]):
        form = _pairs(grid, cos, sin)
        if form is not None and function_of(cos) != "sin" and function_of(sin) != "cos":  # type: ignore[arg-type]
            return form, (cos, sin)  # type: ignore[return-value]
    return None


def _pairs(grid: _Grid, cos: fx.Node | None, sin: fx.Node | None) -> RopeForm | None:
    rows: dict[tuple[int, int], tuple[int, int]] = {}
    for cell in grid.cells:
        by = {factor: (element, sign) for element, sign, factor in cell}
        if cos not in by or sin not in by:
            return None
        (a, sign_a), (b, sign_b) = by[cos], by[sin]
        rows[a, b] = (sign_a, sign_b)
    width = len(grid.cells)
    if {a for a, _ in rows} != set(range(width)) or len(rows) != width:
        return None
    for (a, b), (sign_a, sign_b) in rows.items():
        if a == b or rows.get((b, a)) != (sign_a, -sign_b):
            return None
    if all(abs(a - b) * 2 == width for a, b in rows):
        return "half"
    return "interleaved" if all(a // 2 == b // 2 for a, b in rows) else "other"


# ** sizes **


def _sizes(node: fx.Node, factor: int) -> Callable[[object], int]:
    """Sizes as numbers: a symbol stands for a multiple of its example."""
    hints = size_hints([node, *node.all_input_nodes])

    def number(value: object) -> int:
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, int):
            return value
        expr = value if isinstance(value, sympy.Expr) else expr_of(value)
        return int(expr.subs({symbol: hints.get(symbol, 2) * factor for symbol in expr.free_symbols}))

    return number


def function_of(factor: fx.Node) -> str | None:
    """ "cos" or "sin" where a factor is seen to be one, through layouts, parts, joins, gathers and scales."""
    for _ in range(16):
        factor = _bare(factor, parts=True)
        if factor.target in (aten.cos.default, aten.sin.default):
            return "cos" if factor.target is aten.cos.default else "sin"
        given = factor.args[0] if factor.op == "call_function" and factor.args else None
        if factor.target in _JOINS and isinstance(given, list | tuple):
            given = given[0]
        elif factor.target not in _MUL | {aten.index.Tensor, aten.index_select.default, aten.mul.Scalar}:
            return None
        if not isinstance(given, fx.Node) or not is_tensor(given):
            return None
        factor = given
    return None


def _bare(node: fx.Node, parts: bool = False) -> fx.Node:
    while True:
        step = layout_step(node)
        if step is not None and (parts or not isinstance(step, Part)):
            node = step.source
        elif is_cast(node):
            node = node.args[0]  # type: ignore[assignment]
        else:
            return node
