"""Numeric proof of one application: the region cut out and its replacement run side by side on random inputs.

Everything floating point runs in fp64, so an exact rewrite agrees to rounding: 1e-9 of the result's size. The inputs
are the nodes that both sides read, but for those that others of them determine; what the match relies on (a proven
mask) is computed from the graph's own inputs. Rows for which the original has no finite answer (no visible key under a
fill of -inf) are not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .compat import expr_of
from .layouts import layout_step
from .sizes import concrete
from .structure import signature

aten = torch.ops.aten

TOLERANCE = 1e-9
LIMIT = 1 << 28
"""Elements of the largest intermediate tensor that a certificate may compute."""

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_NARROW = {torch.float16, torch.bfloat16, torch.float32}


@dataclass(frozen=True)
class Certificate:
    """The largest error relative to the size of the original's result, over all elements compared."""

    error: float
    compared: int
    note: str = ""
    name: str = ""
    """The rewrite and the signature of what was compared."""

    @property
    def holds(self) -> bool:
        return self.error <= TOLERANCE and (self.compared > 0 or bool(self.note))


@dataclass(frozen=True)
class Comparison:
    """What a certificate runs: both sides down to the inputs that they share."""

    original: fx.Node
    replacement: fx.Node
    nodes: tuple[fx.Node, ...]
    """Everything that is computed, in graph order, inputs included."""
    inputs: frozenset[fx.Node]

    @classmethod
    def of(
        cls, original: fx.Node, replacement: fx.Node, new: Iterable[fx.Node], evaluate: Iterable[fx.Node]
    ) -> Comparison:
        """`new` are the nodes that were built for `replacement`, `evaluate` those whose values the match relies on."""
        new = set(new)
        read = {node for added in new for node in _made_of(added)}
        inputs = {_bare(node) for node in read - new - {original}} - _ancestors(evaluate) - {original}
        inputs -= _determined(inputs)
        needed = _needed(original, inputs) | _needed(replacement, inputs)
        return cls(original, replacement, tuple(sorted(needed)), frozenset(inputs))

    @property
    def signature(self) -> str:
        """Equal for two comparisons that compute the same, such as those of two identical layers."""
        return signature((self.original, self.replacement), self.inputs)

    def run(self) -> Certificate:
        if (size := max((_elements(node) for node in self.nodes), default=0)) > LIMIT:
            return Certificate(0.0, 0, f"not run: {size} elements in one tensor")
        values = _run(self.nodes, self.inputs)
        return _compare(values[self.original], values[self.replacement])


def _bare(node: fx.Node) -> fx.Node:
    """The tensor that a node is a view of: the two sides may reach it through different views."""
    while (step := layout_step(node)) is not None:
        node = step.source
    return node


def _made_of(node: fx.Node) -> list[fx.Node]:
    """What has to be computed before a node: not a tensor of which it takes the size alone, which is known."""
    return [] if _is_known(node) else node.all_input_nodes


def _is_known(node: fx.Node) -> bool:
    """Whether a node is a size, or a number that the guards leave no choice."""
    value = node.meta.get("val")
    bound = isinstance(value, torch.SymInt | torch.SymFloat) and expr_of(value).is_number
    return bound or node.target is aten.sym_size.int


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(_made_of(node))
    return {node for node in found if node.op != "placeholder"}


def _needed(node: fx.Node, inputs: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        top = pending.pop()
        if top in found:
            continue
        found.add(top)
        if top not in inputs:
            pending.extend(_made_of(top))
    return found


def _determined(inputs: set[fx.Node]) -> set[fx.Node]:
    """Inputs that others among them determine: drawn at random they would contradict them, so they are computed.

    With k = W c and scores k kᵀ, a replacement that absorbs W reads k as the query, and W and c beside it.
    """
    found: dict[fx.Node, bool] = {}

    def determined(node: fx.Node) -> bool | None:
        """None for what has not been looked at yet."""
        if node in inputs or node.op == "get_attr" or isinstance(node.meta.get("val"), _NUMBERS):
            return True
        return found.get(node) if _made_of(node) else False

    for node in inputs:
        pending = [node]
        while pending:
            parts = [(part, determined(part)) for part in _made_of(pending[-1])]
            unknown = next((part for part, is_determined in parts if is_determined is None), None)
            refuted = not parts or any(is_determined is False for _, is_determined in parts)
            if unknown is None or refuted:
                found[pending.pop()] = not refuted
            else:
                pending.append(unknown)
    return {node for node in inputs if found[node]}


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in value.shape:
        count *= concrete(size)
    return count


def _run(nodes: Iterable[fx.Node], inputs: frozenset[fx.Node]) -> dict[fx.Node, Any]:
    generator = torch.Generator().manual_seed(0)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for node in nodes:
            if _is_known(node) or node in inputs or node.op == "placeholder":
                values[node] = _random(node.meta.get("val"), generator)
            elif node.op == "get_attr":
                values[node] = _widened(getattr(node.graph.owning_module, str(node.target)))
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = _widened(node.target(*_wide(args), **_wide(kwargs)))  # type: ignore[operator]
    return values


def _random(example: Any, generator: torch.Generator) -> Any:
    if not isinstance(example, torch.Tensor):
        return concrete(example)
    shape = [concrete(size) for size in example.shape]
    if example.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.7
    if example.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if example.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128)
    return torch.randint(0, 4, shape, generator=generator).to(example.dtype)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in _NARROW:
        return value.double()
    return value


def _wide(arguments: Any) -> Any:
    """Arguments with fp64 in place of narrower floating point dtypes, and the CPU for devices."""

    def wide(value: Any) -> Any:
        if isinstance(value, torch.dtype) and value in _NARROW:
            return torch.float64
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return value

    if isinstance(arguments, Mapping):
        return {key: _wide(value) for key, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return type(arguments)(_wide(value) for value in arguments)
    return wide(arguments)


def _compare(expected: torch.Tensor, actual: torch.Tensor) -> Certificate:
    if expected.shape != actual.shape:
        return Certificate(float("inf"), 1, f"shapes differ: {tuple(expected.shape)} and {tuple(actual.shape)}")
    finite = expected.isfinite()
    if not finite.any():
        return Certificate(float("inf"), 0)
    size = expected[finite].abs().max().clamp(min=1e-30)
    error = (expected - actual)[finite].abs().max() / size
    return Certificate(float(error) if error == error else float("inf"), int(finite.sum()))
