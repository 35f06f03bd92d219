"""Which nodes write to which storage, and when. A write is never lost or reordered.

Two tensors share a storage when the trace says so: the fake tensors in `meta["val"]` are views of one another exactly
where the real ones are, also where a schema leaves it open (`reshape`, `contiguous`, `einsum`). Nodes without values
are judged by their schema, which may report sharing that is none, never the reverse.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from .compat import HigherOrderOperator, OpOverload, storage_of

__all__ = ["Mutations", "base_of", "mutations", "visible_writes", "writes"]


def writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs that a node writes to. A higher-order operator may write to any tensor it is given."""
    if node.op != "call_function":
        return ()
    if isinstance(node.target, HigherOrderOperator):
        return tuple(n for n in node.all_input_nodes if storage_of(n.meta.get("val")) is not None)
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return ()
    return tuple(_annotated(node, write=True))


def _annotated(node: fx.Node, write: bool) -> Iterator[fx.Node]:
    """Arguments that the schema marks as written to, or as shared with a result."""
    schema = node.target._schema  # type: ignore[union-attr]
    shared = {name for result in schema.returns if result.alias_info for name in result.alias_info.before_set}
    for position, argument in enumerate(schema.arguments):
        info = argument.alias_info
        if info is None or not (info.is_write if write else info.before_set & shared):
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        yield from (n for n in (given if isinstance(given, list | tuple) else [given]) if isinstance(n, fx.Node))


def _shared_input(node: fx.Node) -> fx.Node | None:
    """The input whose storage the result of a node lies in, or None when it has its own."""
    if node.op != "call_function":
        return None
    mine = _storages(node)
    maker = node.args[0] if node.target is operator.getitem else None
    # one member of a list lies where the maker's own input does, which need not be the first of them
    inputs = [*(maker.all_input_nodes if isinstance(maker, fx.Node) else ()), *node.all_input_nodes]
    same: fx.Node | None = next((given for given in inputs if mine & _storages(given)), None)
    if same is not None:
        return same
    if isinstance(maker, fx.Node):
        return maker
    if isinstance(node.target, OpOverload):
        marked = next(_annotated(node, write=False), None)
        if marked is not None and not (mine and _storages(marked)):
            return marked
        if torch.Tag.maybe_aliasing_or_mutating in node.target.tags:  # dropout in eval returns its input
            return next((given for given in inputs if _storages(given)), None)
    return None


def _storages(node: fx.Node) -> set[int]:
    value = node.meta.get("val")
    members = value if isinstance(value, list | tuple) else [value]
    return {storage for member in members if (storage := storage_of(member)) is not None}


def base_of(node: fx.Node) -> fx.Node:
    """The node whose storage this one lies in: views and in-place results followed up, aliased inputs united."""
    root = _root(node)
    return _inputs_by_storage(root.graph).get(_storage(root), root) if root.op == "placeholder" else root


def _root(node: fx.Node) -> fx.Node:
    while (source := _shared_input(node)) is not None:
        node = source
    return node


def _storage(node: fx.Node) -> int | None:
    return storage_of(node.meta.get("val"))


def _inputs_by_storage(graph: fx.Graph) -> dict[int | None, fx.Node]:
    """Storage -> the first input that lies in it."""
    inputs = reversed(graph.find_nodes(op="placeholder"))
    return {storage: node for node in inputs if (storage := _storage(node)) is not None}


@dataclass(frozen=True)
class Mutations:
    """The writes of a graph: storage base -> writing nodes, in order. `Mutations.of(graph)` makes it."""

    writes: Mapping[fx.Node, tuple[fx.Node, ...]]
    graph: fx.Graph
    inputs: Mapping[int | None, fx.Node] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, graph: fx.Graph) -> Mutations:
        found: dict[fx.Node, tuple[fx.Node, ...]] = {}
        made = cls(found, graph, _inputs_by_storage(graph))
        for node in graph.nodes:
            for base in dict.fromkeys(made.base_of(written) for written in writes(node)):
                found[base] = (*found.get(base, ()), node)
        return made

    def base_of(self, node: fx.Node) -> fx.Node:
        """As the function of this name, without looking through the inputs each time."""
        root = _root(node)
        return self.inputs.get(_storage(root), root) if root.op == "placeholder" else root

    def write_between(self, tensor: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """A write to the tensor's storage after `first` and before `last`."""
        return next((w for w in self.writes.get(self.base_of(tensor), ()) if first < w < last), None)

    def epoch(self, node: fx.Node, tensor: fx.Node | None = None) -> int:
        """How many writes come before `node` to the storage of `tensor`, by default to the one that `node` lies in.

        Two reads of one tensor give the same values when their epochs are equal.
        """
        return sum(w < node for w in self.writes.get(self.base_of(node if tensor is None else tensor), ()))


def mutations(graph: fx.Graph) -> Mutations:
    """The writes of a graph. Valid until the graph is edited."""
    return Mutations.of(graph)


def visible_writes(graph: fx.Graph) -> tuple[tuple[str, str], ...]:
    """(operator, input written to) in order, for the writes that outlive a call: to inputs and to module tensors."""
    found = []
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            continue  # what it writes is not known, and it is itself never removed
        bases = (base_of(written) for written in writes(node))
        found += [(str(node.target), base.name) for base in bases if base.op in ("placeholder", "get_attr")]
    return tuple(found)
