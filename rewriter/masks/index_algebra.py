"""Reads a tensor of a graph as a function of its index variables.

`IndexReader.element(node, (i, j))` is the value that `node[i, j]` has, as an expression in i, j, sizes and loads.
Layout operations change the indices alone, arithmetic acts on the values, and whatever is not understood is a Load that
keeps the node and the reason. Nothing is evaluated, nothing is guarded on, no graph is changed.

Writes count: an element is read at a point of the graph, after the writes to its storage that come before. Integers in
float32 are exact below 2^24; positions in a sequence are taken to stay below that, sizes that are known are checked.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from . import index_layouts, index_pointwise  # they register what they read
from .index_bounds import Ranges
from .index_call import READERS, Call, Indices, position, shape_of
from .index_storage import Storages, is_in_place
from .index_values import (
    FALSE,
    TRUE,
    Bool,
    Comparison,
    Const,
    Load,
    Number,
    Truth,
    UnreadError,
    Value,
    choose_value,
    compare,
    conjunction,
)

__all__ = ["IndexReader", "index_layouts", "index_pointwise"]

MAX_DEPTH = 120
"""Operations followed from one element, so that a residual stream is not read to its beginning."""

RESHAPES = {"t", "transpose", "squeeze", "unsqueeze", "swapaxes", "swapdims", "as_strided", "resize", "set"}
"""In place these change a tensor's shape and not its memory."""


class IndexReader:
    """Reads the tensors of one graph, each element once. To be made anew when the graph has changed."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.ranges = Ranges()
        self.loads: dict[sympy.Symbol, Load] = {}
        self.storages = Storages(graph)
        self._symbols: dict[tuple[fx.Node, Indices, int], sympy.Symbol] = {}
        self._memo: dict[tuple[fx.Node, Indices, int], Value] = {}
        self._depth = 0

    def element(self, node: fx.Node, indices: Indices, at: fx.Node | None = None) -> Value:
        """`node[indices]` as the node `at` sees it; without `at`, after everything."""
        sizes = node.meta["val"].shape
        if len(sizes) != len(indices):
            raise ValueError(f"{node.name} has {len(sizes)} dimensions, {len(indices)} indices given")
        indices = tuple(
            sympy.S.Zero if isinstance(size, int) and size == 1 else index
            for size, index in zip(sizes, indices, strict=True)
        )
        epoch = len(self.storages.writes_before(node, at))
        if (key := (node, indices, epoch)) not in self._memo:
            self._depth += 1
            try:
                self._memo[key] = self._read(node, indices, at)
            except UnreadError as unread:
                self._memo[key] = self.load(node, indices, epoch, str(unread))
            finally:
                self._depth -= 1
        return self._memo[key]

    def compare(self, op: Comparison, left: Number, right: Number) -> Bool:
        """left op right, decided where the ranges of the index variables decide it."""
        if op in ("le", "gt"):
            return self.compare("ge" if op == "le" else "lt", right, left)
        if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr) and op in ("ge", "lt"):
            if self.ranges.nonnegative(left - right):
                return Const(op == "ge")
            if self.ranges.nonnegative(right - left - 1):
                return Const(op == "lt")
        return compare(op, left, right)

    def load(self, node: fx.Node, indices: Indices, epoch: int, reason: str) -> Value:
        """The element as it is, without looking inside."""
        dtype = node.meta["val"].dtype
        load = Load(node, indices, epoch, reason)
        if dtype is torch.bool:
            return Truth(load)
        symbol = self._symbols.get((node, indices, epoch))
        if symbol is None:
            whole = not (dtype.is_floating_point or dtype.is_complex)
            symbol = sympy.Dummy(node.name, integer=True) if whole else sympy.Dummy(node.name)
            self._symbols[node, indices, epoch] = symbol
            self.loads[symbol] = load
        return symbol

    # ** one operator **

    def _read(self, node: fx.Node, indices: Indices, at: fx.Node | None) -> Value:
        if self._depth > MAX_DEPTH:
            raise UnreadError("is the result of too many operations")
        storages = self.storages
        same = storages.canonical(node)
        writes = storages.writes_before(node, at)
        if writes:
            written = storages.target(writes[-1])
            if written is same:
                return self._written(writes[-1], indices)
            if storages.base(node) is node:
                return self._partly_written(node, indices, writes[-1], written)
        if same is not node:
            return self.element(same, indices, at)
        if storages.alias(node) is None:
            return self._apply(Call(self, node, indices, node))
        if storages.may_copy(node) and any(node < write for write in writes):
            raise UnreadError("may share memory with a tensor that is written to")
        return self._apply(Call(self, node, indices, at))

    def _apply(self, call: Call, name: str | None = None) -> Value:
        node = call.node
        if node.op == "placeholder":
            raise UnreadError("is an input of the graph, so its values are not known when compiling")
        if node.op == "get_attr":
            raise UnreadError("is a buffer, whose values may change without a new compilation")
        name = name or self.storages.operator(node)
        if (read := READERS.get(name)) is None:
            raise UnreadError(f"is a result of {name}, which is not followed")
        try:
            return call.fitted(read(call))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UnreadError(f"could not be read as {name}: {type(error).__name__}") from error

    def _written(self, write: fx.Node, indices: Indices) -> Value:
        """The element after an in-place operator: what the operator computes from the element before."""
        if not is_in_place(write) or self.storages.functional(write) in RESHAPES:
            raise UnreadError(f"is written to by {self.storages.operator(write)}, which is not followed")
        return self._apply(Call(self, write, indices, write), self.storages.functional(write))

    def _partly_written(self, base: fx.Node, indices: Indices, write: fx.Node, written: fx.Node) -> Value:
        """base[indices] where a slice of it was written to: the new value inside of the slice, the old one outside."""
        inside, inner = self._inside(written, base, indices)
        old = self.element(base, indices, write)
        if inside == FALSE:
            return old
        return choose_value(inside, self._written(write, inner), old)

    def _inside(self, view: fx.Node, base: fx.Node, indices: Indices) -> tuple[Bool, Indices]:
        """Whether base[indices] is an element of a view of it, and which."""
        view = self.storages.canonical(view)
        if view is base:
            return TRUE, indices
        source = self.storages.alias(view)
        if source is None:
            raise UnreadError("is written to through another tensor")
        inside, outer = self._inside(source, base, indices)
        call, name = Call(self, view, outer, None), self.storages.operator(view)
        dim = call.dim()
        before, after = outer[:dim], outer[dim + 1 :]
        if name == "slice" and call.argument("step", 1) == 1:
            index = outer[dim] - position(call.argument("start", 0), shape_of(source)[dim], self.ranges)
            begun = self.compare("ge", index, sympy.S.Zero)
            ended = self.compare("lt", index, shape_of(view)[dim])
            return conjunction(inside, begun, ended), (*before, index, *after)
        if name == "select":
            chosen = position(call.argument("index"), shape_of(source)[dim], self.ranges)
            return conjunction(inside, compare("eq", outer[dim], chosen)), (*before, *after)
        raise UnreadError("is written to through a view that is not a slice")
