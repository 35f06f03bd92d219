"""What a drawing of a stage shows: the calls of one of several identical layers, row by row, and the edges between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .nesting import Module, nest
from .text import title
from .view import Node, Stage

__all__ = ["Edge", "Frame", "Picture", "picture"]


@dataclass(frozen=True)
class Frame:
    """A module: a title around the rows from `start` up to `stop`, `depth` modules deep."""

    title: str
    start: int
    stop: int
    depth: int


@dataclass(frozen=True)
class Edge:
    """The value of one row that another reads."""

    start: int
    stop: int
    type: str


@dataclass(frozen=True)
class Picture:
    rows: tuple[Node, ...]
    """Inputs that are no weights, calls and the output. A call's weights are part of its row."""

    frames: tuple[Frame, ...]
    edges: tuple[Edge, ...]
    weights: Mapping[str, tuple[Node, ...]]


def picture(stage: Stage, tree: Module | None = None) -> Picture:
    """The rows in the order in which they run."""
    rows = [node for node in stage.inputs if not node.weight]
    frames: list[Frame] = []
    twins: dict[str, str] = {}
    _lay(tree or nest(stage), 0, "", rows, frames, twins)
    rows += [node for node in stage.nodes if node.kind == "output"]
    place = {node.name: number for number, node in enumerate(rows)}
    edges: dict[tuple[int, int], Edge] = {}
    for number, node in enumerate(rows):
        for name in node.reads:
            start = place.get(_shown(name, twins))
            if start is not None and start < number:
                edges.setdefault((start, number), Edge(start, number, stage.by_name[name].type))
    weights = {node.name: tuple(given for name in node.reads if (given := stage.by_name[name]).weight) for node in rows}
    return Picture(tuple(rows), tuple(frames), tuple(edges.values()), weights)


def _lay(module: Module, depth: int, above: str, rows: list[Node], frames: list[Frame], twins: dict[str, str]) -> None:
    start = len(rows)
    twins.update(module.twins)
    for item in module.items:
        if isinstance(item, Module):
            _lay(item, depth + 1, module.path, rows, frames, twins)
        else:
            rows.append(item)
    if module.path:
        frames.append(Frame(title(module, above), start, len(rows), depth))


def _shown(name: str, twins: Mapping[str, str]) -> str:
    while name in twins:
        name = twins[name]
    return name


def label(node: Node, weights: tuple[Node, ...]) -> Iterator[str]:
    """A row in a few words: the call, the weights it reads."""
    if node.kind == "call":
        yield node.operator
        yield from (f"{given.target.rpartition('.')[2]} {given.type}" for given in weights)
    else:
        yield node.name if node.kind == "input" else "return"
