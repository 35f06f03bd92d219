"""What a graph in normal form is: a table of rules that every later stage relies on, and that can be run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from .compat import HigherOrderOperator, OpOverload, switches_mode
from .mutations import visible_writes
from .purity import is_pure, is_symbolic_arithmetic

__all__ = ["RULES", "Contract", "NormalFormError", "check_normal_form"]

CONTEXT = 3
"""Lines shown on each side of a node that breaks a rule."""


@dataclass(frozen=True)
class Contract:
    """What a rewritten graph shares with the captured one: its inputs and the writes that outlive a call, in order."""

    inputs: tuple[str, ...]
    writes: tuple[tuple[str, str], ...]
    traced_lines: bool
    """Whether the calls had source lines: graphs made by hand have none."""

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Contract:
        calls = [node for node in gm.graph.nodes if node.op == "call_function"]
        return cls(
            tuple(node.name for node in gm.graph.find_nodes(op="placeholder")),
            visible_writes(gm.graph),
            bool(calls) and all(node.meta.get("stack_trace") for node in calls),
        )


class NormalFormError(AssertionError):
    """A graph breaks a rule. The message names the rule and shows the node in context."""

    def __init__(self, rule: str, reason: str, node: fx.Node | None) -> None:
        super().__init__(f"{rule}: {reason}" + (f"\n{_context(node)}" if node is not None else ""))
        self.rule, self.reason, self.node = rule, reason, node


Broken = tuple[str, fx.Node | None]
Rule = Callable[[fx.Graph, Contract | None], Iterator[Broken]]


def check_normal_form(gm: fx.GraphModule, captured: fx.GraphModule | Contract | None = None) -> None:
    """Raise NormalFormError for the first rule that `gm` breaks.

    The rules about inputs, writes and lines compare with `captured`. `normalise` works in place: take the
    `Contract.of(captured)` before it.
    """
    contract = Contract.of(captured) if isinstance(captured, fx.GraphModule) else captured
    for rule in RULES:
        for reason, node in rule(gm.graph, contract):
            raise NormalFormError(rule.__name__, reason, node)


# ** rules **


def ordered(graph: fx.Graph, contract: Contract | None) -> Iterator[Broken]:
    """A node stands behind everything it reads, and inputs stand first."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if (late := next((given for given in node.all_input_nodes if given not in seen), None)) is not None:
            yield f"{node.name} reads {late.name}, which comes later", node
        if node.op == "placeholder" and any(other.op != "placeholder" for other in seen):
            yield f"input {node.name} stands behind a call", node
        seen.add(node)


def only_operators(graph: fx.Graph, contract: Contract | None) -> Iterator[Broken]:
    """A call is an operator, one of higher order, arithmetic on sizes, or a switch of grad mode or autocast."""
    for node in graph.nodes:
        if node.op in ("call_method", "call_module"):
            yield f"{node.op} {node.target}", node
        if node.op == "call_function" and not _is_legal(node.target):
            yield f"{node.target} is no operator", node


def _is_legal(target: object) -> bool:
    known = isinstance(target, OpOverload | HigherOrderOperator) or switches_mode(target)
    return known or is_symbolic_arithmetic(target)


def described(graph: fx.Graph, contract: Contract | None) -> Iterator[Broken]:
    """A call that gives something has its value in `meta["val"]`."""
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and _gives_something(node.target):
            yield f"{node.name} has no value", node


def _gives_something(target: object) -> bool:
    if isinstance(target, OpOverload):
        return bool(target._schema.returns)
    return not switches_mode(target)


def located(graph: fx.Graph, contract: Contract | None) -> Iterator[Broken]:
    """A call has a module or a source line, when the captured graph's calls had."""
    if contract is None or not contract.traced_lines:
        return
    for node in graph.nodes:
        if node.op == "call_function" and not (node.meta.get("stack_trace") or node.meta.get("nn_module_stack")):
            yield f"{node.name} has neither module nor source line", node


def alive(graph: fx.Graph, contract: Contract | None) -> Iterator[Broken]:
    """Whatever has no reader has an effect."""
    for node in graph.nodes:
        if not node.users and is_pure(node):
            yield f"nobody reads {node.name}", node


def same_inputs(graph: fx.Graph, contract: Contract | None) -> Iterator[Broken]:
    """The inputs are those of the captured graph, in number and order."""
    inputs = tuple(graph.find_nodes(op="placeholder"))
    names = tuple(node.name for node in inputs)
    if contract is not None and names != contract.inputs:
        pairs = zip(inputs, contract.inputs, strict=False)
        first = next((node for node, before in pairs if node.name != before), inputs[-1] if inputs else None)
        yield f"inputs are {', '.join(names)}; they were {', '.join(contract.inputs)}", first


def same_writes(graph: fx.Graph, contract: Contract | None) -> Iterator[Broken]:
    """The writes to inputs and module tensors are those of the captured graph, in order."""
    if contract is not None and (now := visible_writes(graph)) != contract.writes:
        position = next((i for i, (a, b) in enumerate(zip(now, contract.writes, strict=False)) if a != b), None)
        if position is None:
            position = min(len(now), len(contract.writes))
        before, after = (w[position] if position < len(w) else "none" for w in (contract.writes, now))
        yield f"write {position} was {before} and is {after}", graph.output_node()


RULES: tuple[Rule, ...] = (ordered, only_operators, described, located, alive, same_inputs, same_writes)


def _context(node: fx.Node) -> str:
    nodes = list(node.graph.nodes)
    position = nodes.index(node)
    lines = []
    for other in nodes[max(0, position - CONTEXT) : position + CONTEXT + 1]:
        text = other.format_node() or f"{other.name} = {other.op} {other.args}"
        lines.append(f"{'->' if other is node else '  '} {text}")
    return "\n".join(lines)
