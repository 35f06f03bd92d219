"""A stage as a picture that any browser shows: one row per call in the order in which they run, values as arcs."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from .nesting import Module
from .picture import Picture, label, picture
from .view import Stage

__all__ = ["render"]

ROW, TOP, INDENT, LEFT, TEXT, WIDTH = 20, 50, 14, 150, 420, 1000
"""Pixels: height of a row, of the heading, a module's indent, room for arcs, width of a call, of the picture."""

STYLE = """
text { font: 12px ui-monospace, monospace; fill: #1d2733 } .quiet { fill: #6b7785 } .title { font-weight: bold }
.frame { fill: #8aa0b8; fill-opacity: .07; stroke: #b9c6d4 } .arc { fill: none; stroke: #7a8da3; stroke-opacity: .55 }
.row { fill: none } .emitted { fill: #fff3d0 } .ours { fill: #ffd166 }
"""


def render(stage: Stage, tree: Module | None = None) -> str:
    """SVG. What a rewrite emitted is pale yellow, operators of this package yellow."""
    shown = picture(stage, tree)
    height = TOP + ROW * (len(shown.rows) + 1)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}">',
            f'<style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>',
            f'<text class="title" x="12" y="24">{escape(f"{stage.graph} · {stage.name}")}</text>',
            *_frames(shown),
            *_arcs(shown),
            *_rows(shown),
            "</svg>\n",
        ]
    )


def _y(row: int) -> int:
    return TOP + ROW * row


def _depths(shown: Picture) -> list[int]:
    depths = [0] * len(shown.rows)
    for frame in shown.frames:
        for row in range(frame.start, frame.stop):
            depths[row] = max(depths[row], frame.depth)
    return depths


def _frames(shown: Picture) -> Iterator[str]:
    right = WIDTH - 8
    for frame in sorted(shown.frames, key=lambda frame: frame.depth):
        x = LEFT + INDENT * (frame.depth - 1)
        width, height = right - x - 4 * frame.depth, ROW * (frame.stop - frame.start) - 2
        yield f'<rect class="frame" rx="4" x="{x}" y="{_y(frame.start) + 1}" width="{width}" height="{height}"/>'
    named: dict[int, list[str]] = {}
    for frame in sorted(shown.frames, key=lambda frame: frame.depth):
        named.setdefault(frame.start, []).append(frame.title)
    for start, titles in named.items():
        x, y = WIDTH - 24, _y(start) + 14
        yield f'<text class="quiet" text-anchor="end" x="{x}" y="{y}">{escape(" / ".join(titles))}</text>'


def _arcs(shown: Picture) -> Iterator[str]:
    depths = _depths(shown)
    for edge in shown.edges:
        x0, x1 = (LEFT + INDENT * depths[row] for row in (edge.start, edge.stop))
        y0, y1 = _y(edge.start) + ROW // 2, _y(edge.stop) + ROW // 2
        bend = min(x0, x1) - min(LEFT - 16 + INDENT * min(depths[edge.start], depths[edge.stop]), 8 + (y1 - y0) // 4)
        path = f"M{x0} {y0} C{bend} {y0} {bend} {y1} {x1} {y1}"
        yield f'<path class="arc" d="{path}"><title>{escape(edge.type)}</title></path>'


def _rows(shown: Picture) -> Iterator[str]:
    for row, (node, depth) in enumerate(zip(shown.rows, _depths(shown), strict=True)):
        x, y = LEFT + INDENT * depth, _y(row)
        kind = "ours" if node.ours else "emitted" if node.rewrite else "row"
        call, *weights = label(node, shown.weights[node.name])
        yield f'<rect class="{kind}" rx="3" x="{x}" y="{y + 2}" width="{TEXT - INDENT * depth}" height="{ROW - 4}"/>'
        more = f' <tspan class="quiet">{escape("  ".join(weights))}</tspan>' if weights else ""
        hover = " ".join(filter(None, (node.name, node.line, node.code, node.rewrite)))
        yield f'<text x="{x + 6}" y="{y + 14}">{escape(call)}{more}<title>{escape(hover)}</title></text>'
        yield f'<text class="quiet" x="{LEFT + TEXT + 12}" y="{y + 14}">{escape(node.type)}</text>'
