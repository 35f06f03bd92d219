"""The strip of layers, and the tables of a graph: sites, rewrites, masks, near misses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..report import GraphReport, MissReport, SiteReport
from ..report_text import MARKS, alike, collapse, grouped, merged, merged_origins, site_classes, timing_text
from ..rules import Verdict
from ..units import error_text, size_text
from .verdict import Tone

__all__ = ["Cell", "Ladder", "Mask", "RewriteRow", "SiteRow", "cells", "ladders", "masks", "rewrite_rows", "site_rows"]

MARK: dict[Tone, str] = {"good": "✓", "quiet": "–", "warn": "?", "bad": "✗"}
ROOT = "the model itself"


@dataclass(frozen=True)
class Cell:
    """One attention, or what nearly is one."""

    tone: Tone
    mark: str
    path: str
    text: str
    number: str
    """The layer's, where the path has one."""


@dataclass(frozen=True)
class SiteRow:
    """Sites that are the same, in layers that were treated the same."""

    place: str
    line: str
    tone: Tone
    mark: str
    equation: str
    facts: tuple[tuple[str, str], ...]
    origins: tuple[str, ...]
    applied: tuple[str, ...]


@dataclass(frozen=True)
class RewriteRow:
    name: str
    equation: str
    tone: Tone
    mark: str
    outcome: str
    times: str
    detail: str
    line: str
    saving: str
    measured: str


@dataclass(frozen=True)
class Mask:
    words: str
    places: str
    sizes: str
    side: tuple[int, int]
    """Columns and rows."""

    seen: str
    """SVG paths of what is seen, and of what a tensor decides."""

    unsure: str
    note: str
    heads: tuple[str, ...]
    """What each head sees, where they differ: SVG paths, in squares of `head_side`."""

    head_side: tuple[int, int]


@dataclass(frozen=True)
class Ladder:
    """How far recognition got: steps that hold, then the one condition that does not."""

    place: str
    line: str
    code: str
    steps: tuple[str, ...]
    reason: str


# ** strip **


def cells(graph: GraphReport) -> tuple[Cell, ...]:
    """In the order of the graph; near misses stand among the layers that they belong to."""
    found = [_cell_of_site(site, [v for v in graph.verdicts if v.site == site.index]) for site in graph.sites]
    missed = [_cell("warn", miss.path, f"not recognised: {miss.reason}") for miss in graph.near_misses]
    return tuple(sorted([*found, *missed], key=lambda cell: _natural(cell.path)) if missed else found)


def _cell_of_site(site: SiteReport, verdicts: Sequence[Verdict]) -> Cell:
    wrong = [f"{v.rewrite} {v.outcome}" for v in verdicts if v.outcome in ("undone", "failed")]
    done = [v.rewrite for v in verdicts if v.outcome == "applied"]
    text = ", ".join(wrong) or ", ".join(done) or "recognised, left as it is"
    return _cell(tone_of(verdicts), site.path, text)


def _cell(tone: Tone, path: str, text: str) -> Cell:
    layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return Cell(tone, MARK[tone], path or ROOT, text, layer[1] if layer else "")


def tone_of(verdicts: Sequence[Verdict]) -> Tone:
    outcomes = {v.outcome for v in verdicts}
    return "bad" if outcomes & {"undone", "failed"} else "good" if "applied" in outcomes else "quiet"


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


# ** sites **


def site_rows(graph: GraphReport) -> tuple[SiteRow, ...]:
    """Identical layers once."""
    return tuple(_site_row(same, verdicts_at(graph, same[0])) for same in classes(graph))


def classes(graph: GraphReport) -> list[list[SiteReport]]:
    """Sites that are the same and were treated the same."""

    def treated(site: SiteReport) -> tuple[object, ...]:
        return tuple((v.rewrite, v.outcome) for v in verdicts_at(graph, site))

    return [each for same in site_classes(graph.sites) for each in grouped(same, treated)]


def verdicts_at(graph: GraphReport, site: SiteReport) -> list[Verdict]:
    return [v for v in graph.verdicts if v.site == site.index]


def _site_row(same: Sequence[SiteReport], verdicts: Sequence[Verdict]) -> SiteRow:
    site, shape, tone = same[0], same[0].shape, tone_of(verdicts)
    groups = "" if shape.groups == "1" else f" in groups of {shape.groups}"
    width = shape.width if shape.width == shape.value_width else f"{shape.width} / {shape.value_width}"
    facts = (
        ("spelling", site.spelling),
        ("heads", f"{shape.heads}{groups}"),
        ("queries × keys", f"{shape.queries} × {shape.keys}"),
        ("width", width),
        ("dtype", shape.dtype),
        ("mask", merged([each.mask for each in same])),
    )
    done = tuple(v.rewrite for v in verdicts if v.outcome == "applied")
    place = collapse([each.path for each in same]) or ROOT
    return SiteRow(place, site.line, tone, MARK[tone], site.equation, facts, merged_origins(same), done)


# ** rewrites **

TONES: Mapping[str, Tone] = {"applied": "good", "undone": "bad", "failed": "bad"}


def rewrite_rows(graph: GraphReport, plan: Mapping[str, Any]) -> tuple[RewriteRow, ...]:
    """Equal verdicts once, in the order in which the rewrites run."""
    equations = {entry["name"]: entry["equation"] for entry in plan.get("rewrites", ())}
    total = {v.rewrite: sum(w.rewrite == v.rewrite for w in graph.verdicts) for v in graph.verdicts}
    rows, named = [], set()
    for same in grouped(graph.verdicts, lambda v: (v.rewrite, v.outcome, alike(v.reason))):
        v = same[0]
        equation = "" if v.rewrite in named else equations.get(v.rewrite, "")
        named.add(v.rewrite)
        lines = list(dict.fromkeys(w.line for w in same if w.line))
        rows.append(
            RewriteRow(
                v.rewrite,
                equation,
                TONES.get(v.outcome, "quiet"),
                MARKS[v.outcome],
                v.outcome,
                f"{len(same)} of {total[v.rewrite]}",
                _detail(same),
                lines[0] if len(lines) == 1 else "",
                _saving(same),
                timing_text(same),
            )
        )
    return tuple(rows)


def _detail(same: Sequence[Verdict]) -> str:
    if same[0].outcome != "applied":
        return merged([v.reason for v in same])
    errors = [v.error for v in same if v.error is not None]
    if not errors:
        return f"not certified ({same[0].reason})" if same[0].reason else "not certified"
    return f"certified in fp64, relative error {error_text(max(errors))}"


def _saving(same: Sequence[Verdict]) -> str:
    known = [v.estimate for v in same if v.estimate is not None and v.outcome == "applied"]
    return f"−{size_text(sum(e.bytes_before - e.bytes_after for e in known))}" if known else ""


# ** masks **


def masks(graph: GraphReport) -> tuple[Mask, ...]:
    """Every proven mask once."""
    drawn = [site for site in graph.sites if site.picture]
    groups = grouped(drawn, lambda s: (alike(s.mask), s.picture, s.heads, s.shape.queries, s.shape.keys))
    return tuple(map(_mask, groups))


def _mask(same: Sequence[SiteReport]) -> Mask:
    site, rows = same[0], same[0].picture
    side = (len(rows[0]), len(rows))
    sizes = f"{site.shape.queries} queries × {site.shape.keys} keys"
    places = collapse([each.path for each in same]) or ROOT
    heads = tuple(_path(each, "#") for each in site.heads)
    head_side = (len(site.heads[0][0]), len(site.heads[0])) if site.heads else (0, 0)
    symbolic = not (site.shape.queries + site.shape.keys).isdigit()
    whole = (str(side[1]), str(side[0])) == (site.shape.queries, site.shape.keys)
    note = "at the sizes of this call" if symbolic else "" if whole else "some of them shown"
    return Mask(
        merged([each.mask for each in same]),
        places,
        sizes,
        side,
        _path(rows, "#"),
        _path(rows, "?"),
        note,
        heads,
        head_side,
    )


def _path(rows: Sequence[str], letter: str) -> str:
    """A rectangle for every run of a letter."""

    def rectangles() -> Iterator[str]:
        for y, row in enumerate(rows):
            x = 0
            for each, run in groupby(row):
                length = len(list(run))
                if each == letter:
                    yield f"M{x} {y}h{length}v1h-{length}z"
                x += length

    return "".join(rectangles())


# ** near misses **

STEPS = (
    "one of the two products is there: queries times keys, or weights times values",
    "the other product is there too",
)


def ladders(graph: GraphReport) -> tuple[Ladder, ...]:
    """The nearest first, equal ones once."""
    return tuple(map(_ladder, grouped(graph.near_misses, lambda m: (m.reason, m.line, m.code, m.reached))))


def _ladder(same: Sequence[MissReport]) -> Ladder:
    miss = same[0]
    place = collapse([each.path for each in same]) or ROOT
    return Ladder(place, miss.line, miss.code, STEPS[: miss.reached], miss.reason)
