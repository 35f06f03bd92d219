"""A stage for Graphviz: modules are clusters, identical layers one of them, shapes stand on the edges."""

from __future__ import annotations

from collections.abc import Iterator

from .nesting import Module
from .picture import Frame, Picture, label, picture
from .view import Node, Stage

__all__ = ["render"]


def render(stage: Stage, tree: Module | None = None) -> str:
    """DOT: `dot -Tsvg rewritten.dot > rewritten.svg`."""
    shown = picture(stage, tree)
    lines = [
        f"digraph {_quoted(f'{stage.graph}, {stage.name}')} {{",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica, fontsize=10];',
        "  edge [fontname=Helvetica, fontsize=8, color=gray40];",
        *_rows(shown, 0, len(shown.rows), 1, "  "),
    ]
    lines += [f"  n{edge.start} -> n{edge.stop} [label={_quoted(edge.type)}];" for edge in shown.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _rows(shown: Picture, start: int, stop: int, depth: int, margin: str) -> Iterator[str]:
    number = start
    frames = {frame.start: frame for frame in shown.frames if frame.depth == depth}
    while number < stop:
        frame: Frame | None = frames.get(number)
        if frame is None or frame.stop == frame.start:
            yield f"{margin}n{number} [{_attributes(shown.rows[number], shown)}];"
            number += 1
            continue
        yield f"{margin}subgraph cluster_{frame.start}_{depth} {{"
        yield f'{margin}  label={_quoted(frame.title)}; labeljust=l; fontname=Helvetica; color=gray60; style="rounded";'
        yield from _rows(shown, frame.start, frame.stop, depth + 1, f"{margin}  ")
        yield f"{margin}}}"
        number = frame.stop


def _attributes(node: Node, shown: Picture) -> str:
    text = "label=" + _quoted("\n".join(label(node, shown.weights[node.name])))
    if node.ours:
        return f'{text}, fillcolor="#ffd166"'
    return f'{text}, fillcolor="#fff3d0"' if node.rewrite else text


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
