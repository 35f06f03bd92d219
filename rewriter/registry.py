"""Where patterns and rewrites are registered. The built-in ones come in by the same door as anybody's.

A distribution adds its own through entry points whose values are modules that register when imported:

    [project.entry-points."latent.patterns"]
    my_softmax = "my_package.patterns"

`@pattern(kind)` takes a function; `kind` says what it reads (see `KINDS`). `@rewrite(name, ...)` takes a class.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

log = logging.getLogger(__name__)

Kind = Literal["softmax", "score_step", "weight_step", "call", "producer", "closed_op"]

KINDS: dict[str, str] = {
    "softmax": "node -> SoftmaxSpelling | None: a softmax, however it is written",
    "score_step": "(node, scores) -> ScoreStep | None: what `node` does to the scores it reads",
    "weight_step": "(node, weights) -> WeightStep | None: what `node` does to the attention weights it reads",
    "call": "node -> AttentionCall | None: an operator that is attention by contract",
    "producer": "(node, reading) -> Found | None: a piece of what makes q, k or v (projection, norm, rope, cache)",
    "closed_op": "() -> dict[OpOverload, function]: operators opened into plain ATen while the graph is captured",
}

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class RewriteEntry:
    """A registered rewrite: its class, whether it is exact, and its place among the others."""

    name: str
    rule: type
    exact: bool
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    @property
    def doc(self) -> str:
        """The first line of the docstring: the equation."""
        return (self.rule.__doc__ or self.name).strip().splitlines()[0]


@dataclass(frozen=True)
class LibraryCall:
    """A form that is one call of an operator: it takes the node's place without being traced."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_lowerings: dict[str, Callable[..., Any]] = {}
_printers: dict[str, Callable[..., Any]] = {}
_patterns: dict[str, list[Callable[..., Any]]] = {kind: [] for kind in KINDS}
_rewrites: dict[str, RewriteEntry] = {}


def pattern(kind: Kind) -> Callable[[Function], Function]:
    """Register a function that reads one kind of thing. Later registrations are asked first."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of pattern {kind!r}; the kinds are {', '.join(KINDS)}")

    def register(function: Function) -> Function:
        _patterns[kind].insert(0, function)
        return function

    return register


def rewrite(
    name: str, *, exact: bool, after: tuple[str, ...] = (), before: tuple[str, ...] = ()
) -> Callable[[Class], Class]:
    """Register a rewrite: a class with `match`, `benefit` and `build` (see `rewriter.rules`)."""

    def register(rule: Class) -> Class:
        if name in _rewrites and _rewrites[name].rule.__qualname__ != rule.__qualname__:
            raise ValueError(f"a rewrite named {name!r} is registered already, by {_rewrites[name].rule.__module__}")
        _rewrites[name] = RewriteEntry(name, rule, exact, tuple(after), tuple(before))
        return rule

    return register


def lowering(operator: str) -> Callable[[Function], Function]:
    """Register what chooses the form of an operator.

    (node, whether gradients are needed) -> (LibraryCall, function of the arguments, or None for its body; the reason)
    """

    def register(function: Function) -> Function:
        _lowerings[operator] = function
        return function

    return register


def lowerings() -> dict[str, Callable[..., Any]]:
    """The choosers by operator, such as "latent::attention"."""
    return dict(_lowerings)


def source_printer(operator: str) -> Callable[[Function], Function]:
    """Register what prints the generated kernels that an operator runs: node -> KernelSources, from shapes alone."""

    def register(function: Function) -> Function:
        _printers[operator] = function
        return function

    return register


def source_printers() -> dict[str, Callable[..., Any]]:
    """The printers by operator."""
    return dict(_printers)


def unregister(name: str) -> None:
    """Forget a rewrite. Unknown names are ignored."""
    _rewrites.pop(name, None)


@functools.cache
def _load() -> None:
    for group in ("latent.patterns", "latent.rewrites"):
        for entry in sorted(importlib.metadata.entry_points(group=group), key=lambda e: e.value):
            try:
                importlib.import_module(entry.module)
            except Exception as error:  # a broken plug-in must not take the compiler down
                log.warning("latent: %s of group %s could not be imported: %s", entry.value, group, error)


def patterns(kind: Kind) -> tuple[Callable[..., Any], ...]:
    """The registered patterns of one kind, the newest first."""
    _load()
    return tuple(_patterns[kind])


def rewrites() -> tuple[RewriteEntry, ...]:
    """The registered rewrites in the order in which they run. Raises ValueError for a cycle of before/after."""
    import networkx

    _load()
    graph = networkx.DiGraph()
    graph.add_nodes_from(sorted(_rewrites))
    for entry in _rewrites.values():
        graph.add_edges_from((name, entry.name) for name in entry.after if name in _rewrites)
        graph.add_edges_from((entry.name, name) for name in entry.before if name in _rewrites)
    try:
        order = list(networkx.lexicographical_topological_sort(graph))
    except networkx.NetworkXUnfeasible:
        cycle = " -> ".join(a for a, _ in networkx.find_cycle(graph))
        raise ValueError(f"the rewrites' before/after make a cycle: {cycle}") from None
    return tuple(_rewrites[name] for name in order)
