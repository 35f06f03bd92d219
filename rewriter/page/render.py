"""From material to the page. Needs jinja2, of the extra `report`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report import GraphReport
from ..report_text import collapse, grouped
from ..units import plural
from .plots import Bar, Cache, Roofline, bars, cache, roofline
from .reading import Graph, Material
from .sides import Sides, sides
from .tables import (
    Cell,
    Ladder,
    Mask,
    RewriteRow,
    SiteRow,
    cells,
    ladders,
    masks,
    rewrite_rows,
    site_rows,
)
from .verdict import figures, verdict

if TYPE_CHECKING:
    import jinja2

__all__ = ["MissingJinja", "render", "require_jinja", "write"]

TEMPLATES = Path(__file__).with_name("templates")
SHOWN = 8
"""Graphs that are shown in full; a model cut into more has them in the table of graphs."""
RAW = 3_000_000
"""Bytes of kernels and plans in a page."""


class MissingJinja(ImportError):
    """jinja2 is not installed."""


@dataclass(frozen=True)
class Section:
    """One graph, as the templates want it."""

    report: GraphReport
    title: str
    again: bool
    cells: tuple[Cell, ...]
    sites: tuple[SiteRow, ...]
    rewrites: tuple[RewriteRow, ...]
    masks: tuple[Mask, ...]
    bars: tuple[Bar, ...]
    roofline: Roofline | None
    cache: Cache | None
    sides: Sides | None
    ladders: tuple[Ladder, ...]
    others: tuple[tuple[str, str], ...]
    lowered: tuple[tuple[str, int], ...]
    seconds: tuple[tuple[str, str], ...]
    kernels: Mapping[str, str]
    plan: str


def write(material: Material, path: Path) -> int:
    """Write the page, and say how many bytes it has. Raises MissingJinja before anything is written, and OSError."""
    data = render(material).encode("utf-8")
    path.write_bytes(data)
    return len(data)


def render(material: Material) -> str:
    """The page. Raises MissingJinja."""
    report = material.report
    shown = [g for g in report.graphs if g.sites or g.near_misses or g.failure] or list(report.graphs)
    frames: set[str] = set()
    sections = []
    room = RAW
    for graph in shown[:SHOWN]:
        section = _section(graph, material.graphs.get(graph.name, Graph()), graph.frame in frames, room)
        room -= sum(map(_bytes, (*section.kernels.values(), section.plan)))
        frames.add(graph.frame)
        sections.append(section)
    return (
        _templates()
        .get_template("page.html")
        .render(
            run=material.run,
            verdict=verdict(report),
            figures=figures(report),
            sections=sections,
            hidden=len(shown) - len(sections),
            report=report,
            breaks=[(same[0], len(same)) for same in grouped(report.breaks or (), lambda b: b)],
            bug_report=_bug_report(material),
            plural=plural,
        )
    )


def require_jinja() -> None:
    """Raises MissingJinja."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingJinja('a report as HTML needs jinja2: pip install "torch-latent[report]"') from error


def _templates() -> jinja2.Environment:
    require_jinja()
    import jinja2

    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _section(report: GraphReport, graph: Graph, again: bool, room: int) -> Section:
    others = grouped([m for m in report.misses if not m.reached], lambda m: (m.reason, m.line))
    return Section(
        report,
        _title(report),
        again,
        cells(report),
        site_rows(report),
        rewrite_rows(report, graph.plan),
        masks(report),
        bars(report),
        roofline(report),
        cache(report, graph.stages.get("rewritten")),
        sides(report, graph),
        ladders(report),
        tuple((collapse([m.path for m in same]) or same[0].line, same[0].reason) for same in others),
        tuple((same[0], len(same)) for same in grouped(report.lowered, str)),
        tuple((name, f"{seconds:.3f}") for name, seconds in _seconds(report).items()),
        _within(graph.kernels, room),
        _json(graph.plan) if graph.plan else "",
    )


def _title(report: GraphReport) -> str:
    """What the graph is, as its sites tell: the queries and keys of most."""
    sizes = grouped(report.sites, lambda s: (s.shape.queries, s.shape.keys))
    if not sizes:
        return report.name
    shape = max(sizes, key=len)[0].shape
    return f"{report.name} · {'1 query' if shape.queries == '1' else f'{shape.queries} queries'} × {shape.keys} keys"


def _seconds(report: GraphReport) -> dict[str, float]:
    return {**report.seconds, **{f"rewrite: {name}": value for name, value in report.rewrite_seconds.items()}}


def _within(texts: Mapping[str, str], room: int) -> dict[str, str]:
    """Texts as long as there is room for them."""
    kept = {}
    for name, text in texts.items():
        room -= _bytes(text)
        kept[name] = text if room >= 0 else f"{len(text)} characters are left out here; `latent dump` writes them."
    return kept


def _bytes(text: str) -> int:
    return len(escape(text).encode("utf-8"))


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False)


def _bug_report(material: Material) -> str:
    """The report as text, and where it was made: what a maintainer asks for."""
    facts = [f"{name}: {value}" for name, value in material.run.environment.items()]
    notes = [f"  {note}" for note in material.run.notes]
    return "\n".join([material.run.target, *notes, "", *facts, "", str(material.report)])
