"""Products of complex numbers become products of their real parts.

    (a + ib)(c + id) = (ac - bd) + i(ad + bc)

Rotations are written so in many models. Inductor fuses no complex operators: each is a call of its own, about a dozen
for a rotation that one fused loop makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from .emit import LOWERED
from .layouts import is_cast
from .mutations import Mutations
from .nodes import args_of
from .sizes import fake_mode_of_value

__all__ = ["in_real_parts"]

aten = torch.ops.aten

_MOVES = (
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.reshape.default, aten.view.default),
    *(aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int),
)
"""What moves complex numbers as it would move their parts."""


class Parts(NamedTuple):
    """The real and the imaginary part of a complex node."""

    real: fx.Node
    imaginary: fx.Node


def in_real_parts(graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """What reads the pairs of numbers of complex products reads real products, in place. Dead nodes stay."""
    made = _made(graph)
    read = [n for n in graph.nodes if n.target is aten.view_as_real.default and args_of(n)[0] in made]
    wanted = {args_of(node)[0] for node in read}
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(given for given in node.all_input_nodes if given in made)
    writer = _Writer(graph)
    for node in list(graph.nodes):
        if node in wanted:
            writer.add(node)
    for node in read:
        pairs = writer.call(node, node, aten.stack.default, list(writer.known[args_of(node)[0]]), -1)
        node.replace_all_uses_with(pairs)
    if read:
        yield "aten::view_as_real", f"complex products in real numbers: {len(read)} are read"


def _made(graph: fx.Graph) -> set[fx.Node]:
    """Complex products, and what moves them or casts them to what they are, that no one writes into."""
    made: set[fx.Node] = set()
    mutations = Mutations.of(graph)
    for node in graph.nodes:
        if node.op != "call_function" or not _is_complex(node) or mutations.writes.get(mutations.base_of(node)):
            continue
        if is_cast(node):
            fits = args_of(node)[0] in made and _form(node) == _form(args_of(node)[0])
        elif node.target in _MOVES:
            fits = args_of(node)[0] in made
        elif node.target is aten.mul.Tensor:
            fits = not any(isinstance(factor, complex) for factor in args_of(node))
        else:
            fits = node.target is aten.polar.default
        if fits:
            made.add(node)
    return made


def _form(node: fx.Node) -> tuple[torch.dtype, torch.device]:
    return node.meta["val"].dtype, node.meta["val"].device


def _is_complex(value: Any) -> bool:
    """Whether it is a node of complex64 or complex128. The parts of a complex32 would round earlier."""
    value = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.complex64, torch.complex128)


class _Writer:
    """Writes the parts of complex nodes, each where the node stands: there they read what the node reads."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.known: dict[fx.Node, Parts] = {}

    def call(self, before: fx.Node, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        """A new node in front of one, that says of itself what another says."""
        with self.graph.inserting_before(before):
            made = self.graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        with fake_mode_of_value(values):
            made.meta = {**like.meta, LOWERED: like.name, "val": target(*values)}
        return made

    def add(self, node: fx.Node) -> None:
        """The parts of a product, or of what moves one, whose complex factors have theirs or are no products."""

        def write(target: Callable[..., Any], *args: Any) -> fx.Node:
            return self.call(node, node, target, *args)

        x, *others = args_of(node)
        if node.target is aten.polar.default:
            turns = (write(turn, others[0]) for turn in (aten.cos.default, aten.sin.default))
            self.known[node] = Parts(*(write(aten.mul.Tensor, x, turn) for turn in turns))
        elif is_cast(node):
            self.known[node] = self.known[x]
        elif node.target in _MOVES:
            target = aten.reshape.default if node.target is aten.view.default else node.target
            self.known[node] = Parts(*(write(target, part, *others) for part in self.parts(x)))
        else:
            self.known[node] = _product(write, *(self.parts(y) if _is_complex(y) else y for y in (x, *others)))

    def parts(self, node: fx.Node) -> Parts:
        """Of a node that is no product: views of its numbers."""
        if node not in self.known:
            after = node.next
            while after.op in ("placeholder", "get_attr"):
                after = after.next
            if node.target is aten.view_as_complex.default:
                pairs = args_of(node)[0]
            else:
                pairs = self.call(after, node, aten.view_as_real.default, node)
            self.known[node] = Parts(*(self.call(after, node, aten.select.int, pairs, -1, i) for i in (0, 1)))
        return self.known[node]


def _product(write: Callable[..., fx.Node], x: Any, y: Any) -> Parts:
    """Of two pairs of parts, or of one and a real number or tensor."""
    if not isinstance(x, Parts):
        x, y = y, x
    if not isinstance(y, Parts):
        return Parts(*(write(aten.mul.Tensor, part, y) for part in x))
    (a, b), (c, d) = x, y
    ac, bd, ad, bc = (write(aten.mul.Tensor, *factors) for factors in ((a, c), (b, d), (a, d), (b, c)))
    return Parts(write(aten.sub.Tensor, ac, bd), write(aten.add.Tensor, ad, bc))
