"""Emits nodes for a rewrite: every new node carries its value, module path and source line, and the rewrite's name."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from .autocast import autocast_at
from .axes import Axis, AxisSpace, Dim, Layout, Size, flat
from .compat import FakeTensorMode, adopt_constants
from .layouts import shape_of, size_argument
from .sites import AttentionSite
from .sizes import as_fake, fake_mode_of_value

aten = torch.ops.aten

REWRITE, REPLACES, LOWERED = "latent_rewrite", "latent_replaces", "latent_lowered"
"""Keys of a node's meta: the rewrite that emitted it, the names of the nodes that it stands for, and of the operator
that it was lowered from."""


@dataclass
class Session:
    """What the emitters of one graph share: layers that need the same mask read one, not thirty."""

    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """The outputs of earlier sites, which later sites' operands may name, and what took their place."""

    written: Callable[[fx.Node], bool] = lambda node: False
    """Whether the storage of a node is written to somewhere in the graph: such reads are not shared."""

    made: dict[object, fx.Node] = field(default_factory=dict)

    def find(self, target: object, args: Any, kwargs: Any, before: fx.Node) -> fx.Node | None:
        """A node that computes the same and stands in front of `before`."""
        made = self.made.get(_key(target, args, kwargs))
        return made if made is not None and made < before else None

    def keep(self, node: fx.Node) -> None:
        if not any(self.written(operand) for operand in node.all_input_nodes):
            self.made.setdefault(_key(node.target, node.args, node.kwargs), node)

    def forget(self, node: fx.Node) -> None:
        self.made = {key: made for key, made in self.made.items() if made is not node}


def _key(target: object, args: Any, kwargs: Any) -> object:
    def frozen(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(frozen(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, frozen(v)) for k, v in value.items())
        return (type(value), value) if isinstance(value, bool | int | float) else value

    return target, frozen(args), frozen(kwargs)


class Emitter:
    """Appends nodes before `before`. The graph's other nodes are not touched."""

    def __init__(
        self,
        before: fx.Node,
        rewrite: str,
        space: AxisSpace,
        known: Iterable[tuple[fx.Node, Layout]],
        session: Session | None = None,
    ) -> None:
        self._session = session or Session()
        self._graph = before.graph
        self._before = before
        self._rewrite = rewrite
        self._space = space
        self._known = list(known)
        self._sizes: dict[Size, Any] = {}
        self.nodes: list[fx.Node] = []

    @classmethod
    def at(cls, site: AttentionSite, rewrite: str, session: Session) -> Emitter:
        """An emitter for a replacement of the site's output."""
        operands = [term.query for term in site.terms] + [term.key for term in site.terms] + [site.value]
        known = [entry for operand in operands for entry in reversed(operand.chain)]
        return cls(site.output, rewrite, site.space, known, session)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """One new node. Raises whatever the operator raises for arguments that do not fit."""
        return self.known(target, None, *args, **kwargs)

    def known(
        self, target: Callable[..., Any], shaped: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> fx.Node:
        """One new node whose value has the shape and dtype that `shaped` computes from the same arguments."""
        args, kwargs = fx.node.map_arg((args, kwargs), lambda node: self._session.replaced.get(node, node))
        if (made := self._session.find(target, args, kwargs, self._before)) is not None:
            return made
        values = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        with autocast_at(self._before), fake_mode_of_value((values, self._before.meta.get("val"))) as mode:
            if isinstance(mode, FakeTensorMode):  # constants of the graph are real tensors
                values = pytree.tree_map_only(torch.Tensor, lambda t: as_fake(t, mode), values)
            value = (shaped or target)(*values[0], **values[1])
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        for key in ("nn_module_stack", "stack_trace", "seq_nr", "source_fn_stack"):
            if key in self._before.meta:
                node.meta[key] = self._before.meta[key]
        node.meta[REWRITE] = self._rewrite
        self.nodes.append(node)
        self._session.keep(node)
        return node

    def constant(self, value: torch.Tensor) -> fx.Node:
        """A tensor that is part of the graph; identical layers share it."""
        owner = self._graph.owning_module
        if owner is None:
            raise ValueError("a graph without a module holds no tensors")
        names = (f"latent_constant_{number}" for number in itertools.count())
        name = next(name for name in names if getattr(owner, name, value) is value)
        if isinstance(value, torch.nn.Parameter):
            owner.register_parameter(name, value)
        else:
            owner.register_buffer(name, value)
        with self._graph.inserting_before(self._before):
            node = self._graph.get_attr(name)
        adopt_constants(owner)
        node.meta["val"] = value
        self.nodes.append(node)
        return node

    def behind(self, result: fx.Node) -> list[fx.Node]:
        """The emitted nodes that `result` is computed from, those shared with other sites included, in order."""
        emitted = {*self.nodes, *self._session.made.values()}
        found: set[fx.Node] = set()
        pending = [result]
        while pending:
            node = pending.pop()
            if node in emitted and node not in found:
                found.add(node)
                pending.extend(node.all_input_nodes)
        return sorted(found)

    def replaces(self, region: Iterable[fx.Node]) -> None:
        """Note on the emitted nodes what they stand for, in terms of the graph before any rewrite."""
        names = dict.fromkeys(name for node in region for name in node.meta.get(REPLACES, (node.name,)))
        for node in self.nodes:
            node.meta[REPLACES] = tuple(names)

    def discard(self) -> None:
        """Take the emitted nodes back."""
        for node in reversed(self.nodes):
            self._session.forget(node)
            self._graph.erase_node(node)
        self.nodes.clear()

    # -------------------------------------------------------------- layouts

    def learn(self, known: Iterable[tuple[fx.Node, Layout]]) -> None:
        """Tensors beside the site's operands whose layouts tell the sizes of axes."""
        self._known += known

    def size(self, axes: Dim) -> Any:
        """The size of a dimension as a number or as a node that computes it."""
        result: Any = 1
        for axis in axes:
            one = self._axis_size(axis)
            if isinstance(result, int) and isinstance(one, int):
                result = result * one
            elif isinstance(result, int) and result == 1:
                result = one
            else:
                result = self.call(operator.mul, result, one)
        return result

    def _axis_size(self, axis: Axis) -> Any:
        if isinstance(axis.size, int):
            return axis.size
        if axis.size in self._sizes:
            return self._sizes[axis.size]
        for node, layout in self._known:
            for i, dim in enumerate(self._space.resolve_layout(layout)):
                others = tuple(a for a in dim if a is not axis)
                if axis in dim and all(isinstance(a.size, int) for a in others):
                    whole = self.call(aten.sym_size.int, node, i)
                    known = 1
                    for other in others:
                        known *= other.size
                    size = whole if known == 1 else self.call(operator.floordiv, whole, known)
                    self._sizes[axis.size] = size
                    return size
        raise ValueError(f"the size of axis {axis} is not the size of any operand's dimension")

    def relayout(self, node: fx.Node, layout: Layout, target: Sequence[Dim]) -> fx.Node:
        """The tensor with its axes in the order of `target`.

        A target dimension of which the tensor has no axis becomes 1; one of which it has some is expanded.
        """
        layout = self._space.resolve_layout(layout)
        target = self._space.resolve_layout(tuple(target))
        have = flat(layout)
        if layout == target:
            return node
        order = [axis for axis in flat(target) if axis in have]
        if missing := set(have) - set(order):
            raise ValueError(f"the axes {missing} have no place in the new layout")
        if len(order) != len(have) or any(len(dim) != 1 for dim in layout):
            node = self._view(node, [(axis,) for axis in have])
        if order != list(have):
            node = self.call(aten.permute.default, node, [have.index(axis) for axis in order])
        partial = [dim for dim in target if any(a in have for a in dim) and any(a not in have for a in dim)]
        if partial:
            spread: list[Dim] = []
            for dim in target:
                spread += [(axis,) for axis in dim] if dim in partial else [tuple(a for a in dim if a in have)]
            holes = [tuple(a for a in dim if a in have) for dim in spread]
            node = self._view(node, holes)
            node = self.call(aten.expand.default, node, [self.size(dim) for dim in spread])
            present = {a for dim in spread for a in dim}
            return self._view(node, [tuple(a for a in dim if a in present) for dim in target])
        return self._view(node, [tuple(a for a in dim if a in have) for dim in target])

    def _view(self, node: fx.Node, dims: Sequence[Dim]) -> fx.Node:
        sizes = [self.size(dim) for dim in dims]
        symbolic = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
        if len(symbolic) == 1:  # one unknown is what view infers by itself
            sizes[symbolic[0]] = -1
        current = shape_of(node)
        wanted = [size_argument(size) for size in sizes]
        if len(current) == len(wanted) and all(a == b for a, b in zip(current, wanted, strict=True)):
            return node
        return self.call(aten.reshape.default, node, sizes)

    def expand(self, node: fx.Node, dims: Sequence[Dim]) -> fx.Node:
        """`node`, whose dimensions of size 1 become those of `dims` by repetition."""
        current = shape_of(node)
        sizes = [self.size(self._space.resolve(dim)) for dim in dims]
        if all(a == size_argument(b) for a, b in zip(current, sizes, strict=True)):
            return node
        return self.call(aten.expand.default, node, sizes)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else self.call(aten.to.dtype, node, dtype)
