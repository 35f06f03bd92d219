"""One layer before and after, side by side: what stayed stands in one row, what came knows what it came from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from ..report import GraphReport
from ..stages.layer import cut
from ..stages.nesting import shorten
from ..stages.view import Node, Stage
from .reading import Graph
from .tables import ROOT, classes, tone_of, verdicts_at

__all__ = ["Row", "Side", "Sides", "sides"]

LARGEST = 400
"""Calls of a layer that is shown."""


@dataclass(frozen=True)
class Side:
    """A node. `sources` are numbers of rows of the other side."""

    number: int
    text: str
    type: str
    line: str
    code: str
    rewrite: str
    ours: bool
    sources: tuple[int, ...] = ()
    elsewhere: int = 0
    """Nodes it stands for that lie outside of the layer."""


@dataclass(frozen=True)
class Row:
    """What stayed (both sides), or what went beside what came."""

    kept: bool
    left: Side | None
    right: Side | None
    module: str = ""
    """The module below the layer, where it is another than in the row above."""


@dataclass(frozen=True)
class Sides:
    path: str
    rows: tuple[Row, ...]
    before: int
    after: int


def sides(report: GraphReport, graph: Graph) -> Sides | None:
    """The layer of the most frequent kind of site, rewritten ones first; None where there is nothing to show."""
    if not {"captured", "normal_form", "rewritten"} <= graph.stages.keys() or not report.sites:
        return None
    captured, normal, rewritten = (graph.stages[name] for name in ("captured", "normal_form", "rewritten"))
    best = max(classes(report), key=lambda same: (tone_of(verdicts_at(report, same[0])) != "quiet", len(same)))
    for path in _paths(best[0].path):
        left, right = (_calls(stage, path) for stage in (captured, rewritten))
        if left and right and max(len(left), len(right)) <= LARGEST:
            rows = tuple(_rows(left, right, captured, normal, rewritten, path))
            return Sides(path or ROOT, rows, len(left), len(right))
    return None


def _paths(site: str) -> Iterator[str]:
    """The layer around a site, then the module of the site itself."""
    layer = re.match(r"(?:.*?\.)?\d+(?=\.|$)", site)
    if layer:
        yield layer[0]
    yield site


def _calls(stage: Stage, path: str) -> Sequence[Node]:
    return (cut(stage, path) if path else stage).calls


def _rows(
    left: Sequence[Node], right: Sequence[Node], captured: Stage, normal: Stage, rewritten: Stage, path: str
) -> Iterator[Row]:
    numbers = {node.name: number for number, node in enumerate(left)}
    places = {node.name: number for number, node in enumerate(right)}
    module = ""
    for a, b in _pairs(left, right):
        here = _part((b or a).module, path) if (b or a) else ""  # type: ignore[union-attr]
        one = _side(numbers[a.name], a, captured) if a else None
        two = _with_sources(_side(places[b.name], b, rewritten), b, numbers, normal) if b else None
        yield Row(a is not None and b is not None and a.name == b.name, one, two, here if here != module else "")
        module = here


def _part(module: str, path: str) -> str:
    """The part of the layer that a module belongs to: the first step below it."""
    return module.removeprefix(path).lstrip(".").partition(".")[0] or module or ROOT


def _pairs(left: Sequence[Node], right: Sequence[Node]) -> Iterator[tuple[Node | None, Node | None]]:
    """Nodes of the same name are the same node; what lies between two of them is what went, and what came."""
    numbers = {node.name: number for number, node in enumerate(left)}
    taken, new = 0, list[Node]()
    for node in right:
        number = numbers.get(node.name, -1)
        if number < taken:
            new.append(node)
            continue
        yield from zip_longest(left[taken:number], new)
        yield left[number], node
        taken, new = number + 1, []
    yield from zip_longest(left[taken:], new)


def _side(number: int, node: Node, stage: Stage) -> Side:
    call = f"{node.name} = {shorten(node, stage.by_name)}"
    return Side(number, call, node.type, node.line, node.code, node.rewrite, node.ours)


def _with_sources(side: Side, node: Node, numbers: Mapping[str, int], normal: Stage) -> Side:
    """With the captured nodes that the nodes of the normal form, which it came from, came from."""
    known = (normal.by_name[name] for name in node.origins if name in normal.by_name)
    names = dict.fromkeys(origin for each in known for origin in each.origins)
    inside = tuple(sorted(numbers[name] for name in names if name in numbers))
    return replace(side, sources=inside, elsewhere=len(names) - len(inside))
