"""One operator of which an element is asked for, and the registry of the functions that answer.

A function gets a `Call` and returns the element `call.indices` of its result, or raises `UnreadError` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard

import sympy
import torch
from torch import fx

from .index_bounds import Ranges
from .index_numbers import as_dtype, exact, size_of
from .index_values import Bool, Comparison, Number, UnreadError, Value, as_number

if TYPE_CHECKING:
    from .index_algebra import IndexReader

Indices = tuple[sympy.Expr, ...]
Read = Callable[["Call"], Value]

READERS: dict[str, Read] = {}


def reads(*names: str) -> Callable[[Read], Read]:
    """Registers the function that reads these ATen operators, named without overload."""

    def register(function: Read) -> Read:
        READERS.update(dict.fromkeys(names, function))
        return function

    return register


def shape_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    return tuple(size_of(size) for size in node.meta["val"].shape)


def is_tensor(value: object) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


@dataclass(frozen=True)
class Call:
    """An operator and the element of its result; its arguments are read as they are `at` a node (None: at the end)."""

    reader: IndexReader
    node: fx.Node
    indices: Indices
    at: fx.Node | None

    @cached_property
    def arguments(self) -> Mapping[str, object]:
        """Every argument by its name in the schema, defaults included."""
        schema: Any = getattr(self.node.target, "_schema", None)
        if schema is None:
            return dict(self.node.kwargs)
        given = dict(zip((a.name for a in schema.arguments), self.node.args, strict=False))
        return {a.name: a.default_value for a in schema.arguments} | given | dict(self.node.kwargs)

    def argument(self, name: str, default: Any = None) -> Any:
        value = self.arguments.get(name)
        return default if value is None else value

    @property
    def ranges(self) -> Ranges:
        return self.reader.ranges

    @property
    def rank(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[sympy.Expr, ...]:
        return shape_of(self.node)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype

    def dim(self, name: str = "dim", rank: int | None = None) -> int:
        """A dimension argument, counted from the front."""
        rank = self.rank if rank is None else rank
        return int(self.argument(name, 0)) % rank if rank else 0

    def read(self, source: object, indices: Sequence[sympy.Expr]) -> Value:
        if not is_tensor(source):
            raise UnreadError("reads what is not a tensor")
        if source.meta["val"].dim() != len(indices):
            raise UnreadError("reads a tensor whose shape was changed in place")
        return self.reader.element(source, tuple(indices), self.at)

    def value(self, operand: object) -> Value:
        """The element of an operand that is broadcast to the result; operands may be numbers."""
        if not is_tensor(operand):
            return exact(operand)
        rank = operand.meta["val"].dim()
        return self.read(operand, self.indices[self.rank - rank :])

    def number(self, operand: object) -> Number:
        return as_number(self.value(operand))

    def fitted(self, value: Value) -> Value:
        """The value in the dtype of the result."""
        return as_dtype(value, self.dtype, self.ranges, self.reader.loads)

    def compare(self, op: Comparison, left: Number, right: Number) -> Bool:
        return self.reader.compare(op, left, right)

    def at_dim(self, dim: int, index: sympy.Expr) -> Indices:
        """The indices with the one of `dim` replaced."""
        return (*self.indices[:dim], index, *self.indices[dim + 1 :])


def position(given: object, size: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """A position in a dimension of that size: negative numbers count from the end."""
    index = size_of(given)
    if ranges.nonnegative(index):
        return index
    if ranges.nonnegative(-index - 1) and ranges.nonnegative(size + index):
        return sympy.expand(size + index)
    if index.is_Integer and size.is_Integer:
        return sympy.Integer(max(0, int(size + index)))
    raise UnreadError("starts at a position of unknown sign")
