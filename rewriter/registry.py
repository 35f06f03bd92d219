"""Where patterns and rewrites are registered. The built-in ones come in by the same door as anybody's.

A distribution adds its own through entry points whose values are modules that register when imported:

    [project.entry-points."latent.patterns"]
    my_softmax = "my_package.patterns"

`@pattern(kind)` takes a function; `kind` says what it reads (see `KINDS`). `@rewrite(name, ...)` takes a class.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
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
Rule = TypeVar("Rule")
Examples = tuple[tuple[Callable[..., Any], Mapping[str, str | float]], ...]
"""Functions with the dimensions of their arguments: ((attend, dict(q="B H S D", k="B H T D", v="B H T E")),)."""

ALL = "*"
"""In `before` or `after`: all others, except those of which something else is said."""


@dataclass(frozen=True)
class RewriteEntry:
    """A registered rewrite: its class or ready rule, whether it is exact, and its place among the others."""

    name: str
    rule: Any
    exact: bool
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    def make(self) -> Any:
        """A rule to ask: `match`, `benefit`, `build`."""
        return self.rule() if isinstance(self.rule, type) else self.rule

    @property
    def doc(self) -> str:
        """The equation: a class gives it in the first line of its docstring."""
        return getattr(self.rule, "equation", "") or (self.rule.__doc__ or self.name).strip().splitlines()[0]

    @property
    def origin(self) -> str:
        """Where it was written: a rule that is run again from there takes the old one's place."""
        written = self.rule if isinstance(self.rule, type) else self.rule.pattern
        return f"{written.__module__}.{written.__qualname__}"


@dataclass(frozen=True)
class LibraryCall:
    """A form that is one call of an operator: it takes the node's place without being traced."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_lowerings: dict[str, Callable[..., Any]] = {}
_joint_lowerings: list[Callable[..., Any]] = []
_printers: dict[str, Callable[..., Any]] = {}
_patterns: dict[str, list[Callable[..., Any]]] = {kind: [] for kind in KINDS}
_examples: dict[Callable[..., Any], Examples] = {}
_rewrites: dict[str, RewriteEntry] = {}
_listeners: list[Callable[[], None]] = []


def pattern(kind: Kind, *, examples: Examples = ()) -> Callable[[Function], Function]:
    """Register a function that reads one kind of thing. Later registrations are asked first.

    `examples` are functions that are read as attention, or read further, with it alone, for its check.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of pattern {kind!r}; the kinds are {', '.join(KINDS)}")

    def register(function: Function) -> Function:
        _patterns[kind].insert(0, function)
        _examples[function] = examples
        _changed()
        return function

    return register


def rewrite(
    name: str, *, exact: bool, after: tuple[str, ...] = (), before: tuple[str, ...] = ()
) -> Callable[[Rule], Rule]:
    """Register a rewrite: a class with `match`, `benefit` and `build` (see `rewriter.rules`), or such an object.

    `before` and `after` name other rewrites; "*" stands for all. Raises ValueError for a name that is taken.
    """

    def register(rule: Rule) -> Rule:
        entry = RewriteEntry(name, rule, exact, tuple(after), tuple(before))
        if name in _rewrites and (taken := _rewrites[name].origin) != entry.origin:
            raise ValueError(f"a rewrite named {name!r} is registered already, by {taken}")
        _rewrites[name] = entry
        _changed()
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


def joint_lowering(function: Function) -> Function:
    """Register what finds forms for several nodes together, once all `latent::` operators have theirs.

    (graph, whether gradients are needed) -> (operator, the reason) of each form that it has put in.
    """
    _joint_lowerings.append(function)
    return function


def joint_lowerings() -> tuple[Callable[..., Any], ...]:
    """In the order of their registration."""
    return tuple(_joint_lowerings)


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
    if _rewrites.pop(name, None) is not None:
        _changed()


def unregister_pattern(function: Callable[..., Any]) -> None:
    """Forget a pattern. Unknown ones are ignored."""
    for known in _patterns.values():
        if function in known:
            known.remove(function)
            _changed()
    _examples.pop(function, None)


@contextlib.contextmanager
def left_out(function: Callable[..., Any]) -> Iterator[None]:
    """As if a pattern were not registered, until the block ends; what is compiled already stays."""
    _load()
    places = [(known, known.index(function)) for known in _patterns.values() if function in known]
    for known, place in places:
        del known[place]
    try:
        yield
    finally:
        for known, place in places:
            known.insert(place, function)


def on_change(listener: Callable[[], None]) -> None:
    """Call `listener` whenever a pattern or a rewrite comes or goes."""
    _listeners.append(listener)


def _changed() -> None:
    for listener in _listeners:
        listener()


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


def examples_of(function: Callable[..., Any]) -> Examples:
    """What a registered pattern declares that it reads."""
    return _examples.get(function, ())


def rewrites() -> tuple[RewriteEntry, ...]:
    """The registered rewrites in the order in which they run. Raises ValueError for a cycle of before/after."""
    import networkx

    _load()
    graph = networkx.DiGraph()
    graph.add_nodes_from(sorted(_rewrites))
    said: set[tuple[str, str]] = set()
    for entry in _rewrites.values():
        said |= {(name, entry.name) for name in entry.after if name in _rewrites}
        said |= {(entry.name, name) for name in entry.before if name in _rewrites}
    graph.add_edges_from(said)
    for entry, other in itertools.permutations(_rewrites.values(), 2):
        first, last = ALL in entry.before and ALL not in other.before, ALL in other.after and ALL not in entry.after
        if (first or last) and (other.name, entry.name) not in said:
            graph.add_edge(entry.name, other.name)
    try:
        order = list(networkx.lexicographical_topological_sort(graph))
    except networkx.NetworkXUnfeasible:
        cycle = " -> ".join(a for a, _ in networkx.find_cycle(graph))
        raise ValueError(f"the rewrites' before/after make a cycle: {cycle}") from None
    return tuple(_rewrites[name] for name in order)
