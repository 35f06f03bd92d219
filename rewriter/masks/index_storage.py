"""Which nodes share memory, and who writes to it, by the schemas of the operators."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_KEEPS_VALUES = {"detach_", "requires_grad_", "set_grad_enabled"}
"""In-place operators that change no element."""

_SAME_ELEMENTS = {"detach", "detach_", "alias", "lift_fresh", "requires_grad_"}

_COPIES_OR_VIEWS = {"to", "contiguous", "reshape", "flatten", "reshape_as", "type_as", "ravel", "float"}
"""Operators that give the same memory or new, which the schema leaves open."""

_INPLACE_NAMES = {"__iand__": "bitwise_and", "__ior__": "bitwise_or", "__ixor__": "bitwise_xor"}


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def is_in_place(write: fx.Node) -> bool:
    """Whether the operator writes to its first argument and to nothing else."""
    if (schema := _schema(write)) is None:
        return False
    arguments = schema.arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write] == [arguments[0].name]


class Storages:
    """The memory behind the nodes of one graph: a base per storage, and the writes to it in order."""

    def __init__(self, graph: fx.Graph) -> None:
        self._aliases: dict[fx.Node, fx.Node | None] = {}
        self._bases: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            for written in self._written(node):
                self._writes.setdefault(self.base(written), []).append(node)

    @staticmethod
    def operator(node: fx.Node) -> str:
        """The operator's name without namespace and overload."""
        if (name := getattr(node.target, "name", None)) is not None and callable(name):
            namespace, _, rest = str(name()).partition("::")
            return rest.partition(".")[0] if namespace == "aten" else f"{namespace}::{rest}"
        return getattr(node.target, "__name__", str(node.target))

    def functional(self, write: fx.Node) -> str:
        """The name of the operator that computes the same without writing."""
        name = self.operator(write)
        return _INPLACE_NAMES.get(name, name.removesuffix("_"))

    def writes_before(self, node: fx.Node, at: fx.Node | None) -> list[fx.Node]:
        """The writes to the storage of `node` that come before `at`."""
        writes = self._writes.get(self.base(node), [])
        return writes if at is None else [write for write in writes if write < at]

    def target(self, write: fx.Node) -> fx.Node:
        """The tensor that a node writes to."""
        return self.canonical(self._written(write)[0])

    def canonical(self, node: fx.Node) -> fx.Node:
        """The first node that names the same elements in the same layout."""
        while (source := self.alias(node)) is not None and (
            self._written(node) or self.operator(node) in _SAME_ELEMENTS
        ):
            node = source
        return node

    def base(self, node: fx.Node) -> fx.Node:
        if node not in self._bases:
            found = node
            while (source := self.alias(found)) is not None:
                found = source
            self._bases[node] = found
        return self._bases[node]

    def may_copy(self, node: fx.Node) -> bool:
        return self.operator(node) in _COPIES_OR_VIEWS

    def alias(self, node: fx.Node) -> fx.Node | None:
        """The argument whose memory the result shares, or may share."""
        if node not in self._aliases:
            self._aliases[node] = self._alias(node)
        return self._aliases[node]

    def _alias(self, node: fx.Node) -> fx.Node | None:
        if node.target is operator.getitem:
            source = node.args[0]
            return source if isinstance(source, fx.Node) else None
        schema = _schema(node)
        if schema is None or not any(result.alias_info is not None for result in schema.returns):
            return None
        shared = next((n for n, a in enumerate(schema.arguments) if a.alias_info is not None), None)
        if shared is None:
            return None
        source = node.args[shared] if shared < len(node.args) else node.kwargs.get(schema.arguments[shared].name)
        if not isinstance(source, fx.Node):
            return None
        if self.operator(node) == "to" and _dtype(node) is not _dtype(source):
            return None
        return source

    def _written(self, node: fx.Node) -> list[fx.Node]:
        """The arguments whose elements a node changes."""
        schema = _schema(node)
        if schema is None and node.op == "call_function" and "mutation" in self.operator(node):
            return list(node.all_input_nodes)  # a kernel of the user's
        if schema is None or not schema.is_mutable or self.operator(node) in _KEEPS_VALUES:
            return []
        written: list[fx.Node] = []
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                several = given if isinstance(given, list | tuple) else [given]
                written += [item for item in several if isinstance(item, fx.Node)]
        return written


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
