"""Which nodes write to which storage, and when. A write is never lost or reordered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from .layouts import layout_step


def writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs that a node writes to, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return ()
    written = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        written += [n for n in (given if isinstance(given, list | tuple) else [given]) if isinstance(n, fx.Node)]
    return tuple(written)


def base_of(node: fx.Node) -> fx.Node:
    """The node whose storage this one may share: views and in-place results followed up."""
    while True:
        if written := writes(node):
            node = written[0]
        elif (step := layout_step(node)) is not None and node.target not in _COPIES:
            node = step.source
        else:
            return node


_COPIES = {torch.ops.aten.clone.default, torch.ops.aten.repeat.default, torch.ops.aten.lift_fresh_copy.default}


@dataclass(frozen=True)
class Mutations:
    """The writes of a graph: storage base -> writing nodes, in order."""

    writes: Mapping[fx.Node, tuple[fx.Node, ...]]
    graph: fx.Graph

    @classmethod
    def of(cls, graph: fx.Graph) -> Mutations:
        found: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in graph.nodes:
            for written in writes(node):
                base = base_of(written)
                found[base] = (*found.get(base, ()), node)
        return cls(found, graph)

    def write_between(self, tensor: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """A write to the tensor's storage after `first` and before `last`."""
        return next((w for w in self.writes.get(base_of(tensor), ()) if first < w < last), None)

    def epoch(self, node: fx.Node) -> int:
        """How many writes to the storage that `node` reads come before it."""
        return sum(w < node for w in self.writes.get(base_of(node), ()))
