"""Work on weights alone is done once and not at every call: it moves to a prologue whose results are inputs.

    linear(x, W2 @ W1)   ->   prologue: m = W2 @ W1     graph: linear(x, m)

Nothing guards the values of weights, so each call looks whether one of them was replaced or written to; their form is
guarded by Dynamo. What no version counter sees (`p.data.mul_()`, a write through numpy, fused optimizers on a CPU)
needs `invalidate(model)`. With gradients on nothing moves: gradients have to reach the weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .compat import WeightStates, add_input, autocast_switch, source_name
from .mutations import Mutations
from .purity import enables_grad, is_pure, is_random, is_symbolic_arithmetic

__all__ = ["Hoisted", "HoistedCall", "Prologue", "hoist", "invalidate"]

GROWTH = 2
"""A result may take at most this many times the bytes of the weights it is made from."""

_live: weakref.WeakSet[Prologue] = weakref.WeakSet()


class Prologue:
    """The work on weights, its results, and the state of the weights they were made from."""

    def __init__(self, gm: fx.GraphModule, positions: Sequence[int], inputs: Sequence[Any]) -> None:
        self.gm, self.positions, self.runs = gm, tuple(positions), 0
        self.derived: list[torch.Tensor] = []
        self._states: WeightStates | None = None
        self._weights: list[weakref.ref[torch.Tensor]] = []
        self.refresh(inputs)
        _live.add(self)

    def refresh(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """The results for these graph inputs, made anew when a weight changed."""
        weights = [inputs[i] for i in self.positions]
        if self._states is None or not self._states.still_hold(weights):
            self._run(weights)
            self._states = WeightStates(weights)
            self._weights = [weakref.ref(weight) for weight in weights]
        return self.derived

    def _run(self, weights: Sequence[torch.Tensor]) -> None:
        # Results made under inference mode could not be overwritten outside of it.
        with torch.inference_mode(False), torch.no_grad():
            results = [result.contiguous() if _scattered(result) else result for result in self.gm(*weights)]
            for position, result in enumerate(results):
                if position < len(self.derived) and _same_form(self.derived[position], result):
                    # the graph was promised that its static inputs keep their address
                    self.derived[position].copy_(result)
                elif position < len(self.derived):
                    self.derived[position] = result
                else:
                    self.derived.append(result)
        self.runs += 1

    def invalidate(self) -> None:
        """Make the results anew at the next call, whatever the weights look like."""
        self._states = None

    def reads(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether the results were made from one of these tensors."""
        wanted = {id(tensor) for tensor in tensors}
        return any(id(weight) in wanted for ref in self._weights if (weight := ref()) is not None)


def _scattered(result: torch.Tensor) -> bool:
    """Elements that share memory can not be overwritten one by one."""
    return any(stride == 0 and size > 1 for stride, size in zip(result.stride(), result.shape, strict=True))


def _same_form(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype, other.device)


class HoistedCall:
    """A compiled graph that gets the prologue's results behind its own inputs."""

    def __init__(self, compiled: Callable[..., Any], prologue: Prologue) -> None:
        self.compiled, self.prologue = compiled, prologue

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args, *self.prologue.refresh(args))

    def invalidate(self) -> None:
        self.prologue.invalidate()


@dataclass(frozen=True)
class Hoisted:
    """A graph without its work on weights. Compile `gm` with `[*inputs, *extra_inputs]`, then `wrap` the result."""

    gm: fx.GraphModule
    prologue: Prologue | None = None
    extra_inputs: list[torch.Tensor] = field(default_factory=list)

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        return compiled if self.prologue is None else HoistedCall(compiled, self.prologue)


def invalidate(model: nn.Module) -> int:
    """Forget what was computed from the model's weights, after a change that no version counter sees.

    -> how many compiled graphs will compute it again at their next call.
    """
    tensors = [*model.parameters(), *model.buffers()]
    found = [prologue for prologue in _live if prologue.reads(tensors)]
    for prologue in found:
        prologue.invalidate()
    return len(found)


def hoist(gm: fx.GraphModule, inputs: Sequence[Any]) -> Hoisted:
    """Move the work on weights out of `gm`, in place. Leaves it as it is when gradients are on."""
    if torch.is_grad_enabled() or enables_grad(gm.graph):
        return Hoisted(gm)
    derived = _derived(gm, inputs)
    if not derived:
        return Hoisted(gm)
    body, positions = _body(gm, derived)
    prologue = Prologue(body, positions, inputs)
    last = gm.graph.find_nodes(op="placeholder")[-1]
    for node, value in zip(derived, prologue.derived, strict=True):
        last = add_input(gm, f"derived_{node.name}", value, last)
        node.replace_all_uses_with(last, propagate_meta=False)
    _erase(gm, derived)
    return Hoisted(gm, prologue, list(prologue.derived))


# ** what can be computed from weights alone **


@dataclass
class _WeightOnly:
    """Nodes that weights alone determine -> the weights; constants of the program have none."""

    weights: dict[fx.Node, frozenset[fx.Node]]
    mutations: Mutations

    def admits(self, node: fx.Node) -> bool:
        """Whether a call may run in the prologue."""
        known = all(given in self.weights for given in node.all_input_nodes)
        if not known or not is_pure(node) or is_random(node) or self.mutations.base_of(node) in self.mutations.writes:
            return False
        if is_symbolic_arithmetic(node.target):  # sizes do not move; a member of a list of tensors does
            return isinstance(node.meta.get("val"), torch.Tensor)
        return self._stays_small(node)

    def _stays_small(self, node: fx.Node) -> bool:
        if self.mutations.base_of(node) is not node:  # a view takes no memory
            return True
        allowed = GROWTH * sum(_bytes(weight) for weight in self.of(node))
        return _bytes(node) <= allowed or not self.of(node)

    def of(self, node: fx.Node) -> frozenset[fx.Node]:
        return frozenset().union(*(self.weights[given] for given in node.all_input_nodes))


def _derived(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[fx.Node]:
    """The results worth moving: computed from weights alone, and read by what is not. Views stay where they are."""
    mutations = Mutations.of(gm.graph)
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = {n: frozenset([n]) for n, value in zip(placeholders, inputs, strict=True) if _is_weight(n, value)}
    known = _WeightOnly(
        {n: own for n, own in weights.items() if mutations.base_of(n) not in mutations.writes}, mutations
    )
    in_autocast = 0
    for node in gm.graph.nodes:
        if (entering := autocast_switch(node.target)) is not None:
            in_autocast += 1 if entering else -1
        elif node.op == "call_function" and not in_autocast and known.admits(node):
            known.weights[node] = known.of(node)
    read = [n for n in known.weights if any(user not in known.weights for user in n.users)]
    bases = dict.fromkeys(mutations.base_of(node) for node in read if known.weights[node])
    returned = {mutations.base_of(node) for node in gm.graph.output_node().all_input_nodes}
    # a caller may write to what it is given, so results are not shared with it
    tensors = (n for n in bases if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor))
    return sorted(n for n in tensors if n not in returned)


def _is_weight(node: fx.Node, value: object) -> bool:
    """A parameter, or a buffer of a module, that shows when it changes: wrapped and inference tensors do not."""
    if type(value) not in (torch.Tensor, nn.Parameter) or not isinstance(value, torch.Tensor):
        return False
    if value.device.type == "meta" or value.is_inference():
        return False
    return isinstance(value, nn.Parameter) or "._buffers[" in source_name(node)


def _bytes(node: fx.Node) -> int:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return sum(int(v.numel()) * v.element_size() for v in leaves if isinstance(v, torch.Tensor))


# ** taking it out **


def _body(gm: fx.GraphModule, derived: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[int]]:
    """The prologue's graph, and the positions of the weights that it reads among the inputs."""
    needed: set[fx.Node] = set()
    stack = list(derived)
    while stack:
        if (node := stack.pop()) not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    placeholders = gm.graph.find_nodes(op="placeholder")
    body = fx.Graph()
    placed: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in needed:
            placed[node] = body.node_copy(node, placed.__getitem__)
    body.output(tuple(placed[node] for node in derived))
    return fx.GraphModule({}, body), [i for i, node in enumerate(placeholders) if node in needed]


def _erase(gm: fx.GraphModule, derived: Sequence[fx.Node]) -> None:
    """Erase the moved nodes and what only they read. Writes and everything else stay."""
    stack = list(derived)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and not node.users and is_pure(node) and node.graph is gm.graph:
            stack += node.all_input_nodes
            gm.graph.erase_node(node)
    gm.recompile()
