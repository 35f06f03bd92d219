"""What was found and done, as values. `report_text` says the same in words."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

from .describe import Shape, equation, shape
from .head_pictures import head_pictures
from .mask_pictures import mask_picture
from .masks_of_site import describe_masks
from .mutations import Mutations
from .origins.text import describe_origins
from .provenance import module_path, source_line, user_frames
from .report_text import render, render_report
from .rules import Timing, Verdict
from .sites import AttentionSite, Miss

__all__ = [
    "Break",
    "GraphReport",
    "MissReport",
    "Report",
    "SiteReport",
    "render",
    "report_miss",
    "report_site",
    "why_again",
]


@dataclass(frozen=True)
class SiteReport:
    """One attention site in words."""

    index: int
    path: str
    line: str
    spelling: str
    equation: str
    mask: str
    shape: Shape
    origins: tuple[str, ...] = ()
    """Where query, key and value come from, a line each."""

    picture: tuple[str, ...] = ()
    """What the mask was proven to do, see `mask_pictures`."""

    heads: tuple[tuple[str, ...], ...] = ()
    """The same for each head, where they differ, see `head_pictures`."""


@dataclass(frozen=True)
class MissReport:
    """One softmax that is no attention site: the reason, the user's line, and how far recognition got."""

    path: str
    line: str
    code: str
    reason: str
    node: str
    reached: int


@dataclass(frozen=True)
class Break:
    """A graph break: why the model was cut into several graphs, and at which of the user's lines."""

    reason: str
    line: str
    code: str


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph."""

    name: str
    nodes: int
    sites: tuple[SiteReport, ...]
    verdicts: tuple[Verdict, ...]
    misses: tuple[MissReport, ...]
    lowered: tuple[str, ...] = ()
    certificates: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    rewrite_seconds: Mapping[str, float] = field(default_factory=dict)
    """Of the stage "rewrite", by rewrite."""

    failure: str = ""
    again: str = ""
    """Why torch compiled this piece of the program once more, in its words: the guard that failed."""

    @property
    def compilation(self) -> str:
        """The compile id of torch's logs ("0/1": graph 0, compiled for the second time); "" when it is not known."""
        found = re.search(r"\[(\d+/\d+)\]$", self.name)
        return found[1] if found else ""

    @property
    def frame(self) -> str:
        """What all compilations of one piece of the program share."""
        return self.compilation.partition("/")[0] or self.name

    @property
    def near_misses(self) -> tuple[MissReport, ...]:
        """Softmaxes that have a product of queries and keys, or of weights and values, the nearest first."""
        return tuple(sorted((m for m in self.misses if m.reached), key=lambda m: -m.reached))

    def count(self, name: str) -> int:
        """How many sites there are ("attention"), or at how many a rewrite was applied."""
        if name == "attention":
            return len(self.sites)
        return sum(v.rewrite == name and v.outcome == "applied" for v in self.verdicts)


@dataclass(frozen=True)
class Report:
    """Every graph of one call or of one process. `print(report)` is the way to read it."""

    graphs: tuple[GraphReport, ...]
    breaks: tuple[Break, ...] | None = None
    """The graph breaks; None where nobody counted them."""

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(verdict for graph in self.graphs for verdict in graph.verdicts)

    @property
    def near_misses(self) -> tuple[MissReport, ...]:
        return tuple(miss for graph in self.graphs for miss in graph.near_misses)

    def count(self, name: str) -> int:
        """How many sites ("attention"), or applications of a rewrite, there are in all compilations together."""
        return sum(graph.count(name) for graph in self.graphs)

    def least(self, name: str) -> int:
        """The same for one run of the model: summed over its pieces, the fewest where one was compiled repeatedly."""
        counts: dict[str, list[int]] = {}
        for graph in self.graphs:
            if graph.sites or graph.near_misses or graph.failure:
                counts.setdefault(graph.frame, []).append(graph.count(name))
        return sum(min(each) for each in counts.values())

    def shortfall(self, expect: Mapping[str, int]) -> list[str]:
        """What is less than expected, in words: "attention: expected 30, found 29"."""
        return [f"{n}: expected {c}, found {self.least(n)}" for n, c in expect.items() if self.least(n) < c]

    def only(self, site: str = "", near: int | None = None) -> Report:
        """The sites and misses of the modules that match `site`, and of the near misses the `near` nearest alone."""
        return dataclasses.replace(self, graphs=tuple(_filtered(graph, site, near) for graph in self.graphs))

    def timed(self, timings: Mapping[str, Timing]) -> Report:
        """The same with what was measured, by the names of the certificates."""
        return dataclasses.replace(self, graphs=tuple(_timed(graph, timings) for graph in self.graphs))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, default=str, ensure_ascii=False)

    def to_html(self, path: str | Path) -> None:
        """One file that loads nothing (extra `report`); `latent report` adds graphs and kernels to it."""
        from .environment import Run, environment
        from .page.reading import Material
        from .page.render import write

        write(Material(self, Run(environment=environment())), Path(path))

    def __str__(self) -> str:
        return render_report(self)


def _timed(graph: GraphReport, timings: Mapping[str, Timing]) -> GraphReport:
    def timed(verdict: Verdict) -> Verdict:
        known = timings.get(verdict.certificate) if verdict.outcome == "applied" else None
        return dataclasses.replace(verdict, timing=known)

    return dataclasses.replace(graph, verdicts=tuple(map(timed, graph.verdicts)))


def _filtered(graph: GraphReport, pattern: str, near: int | None) -> GraphReport:
    def wanted(path: str) -> bool:
        return not pattern or fnmatch.fnmatchcase(path, pattern) or path.startswith(f"{pattern}.")

    kept = {site.index: n for n, site in enumerate(s for s in graph.sites if wanted(s.path))}
    misses = graph.misses if near is None else graph.near_misses[:near]
    return dataclasses.replace(
        graph,
        sites=tuple(dataclasses.replace(s, index=kept[s.index]) for s in graph.sites if s.index in kept),
        verdicts=tuple(dataclasses.replace(v, site=kept[v.site]) for v in graph.verdicts if v.site in kept),
        misses=tuple(miss for miss in misses if wanted(miss.path)),
    )


def report_site(
    index: int,
    site: AttentionSite,
    writes: Mutations,
    hints: Mapping[sympy.Symbol, int],
    buffers: Mapping[fx.Node, torch.Tensor],
) -> SiteReport:
    return SiteReport(
        index,
        module_path(site.anchor),
        short(site.anchor),
        site.spelling,
        equation(site),
        describe_masks(site),
        shape(site),
        tuple(describe_origins(site, writes).values()),
        mask_picture(site, hints),
        head_pictures(site, hints, buffers),
    )


def report_miss(miss: Miss) -> MissReport:
    line = source_line(miss.node) or source_line(miss.anchor)
    return MissReport(
        module_path(miss.anchor),
        short(miss.node) or short(miss.anchor),
        line.code if line else "",
        miss.reason,
        miss.node.name,
        miss.reached,
    )


def why_again(reason: str) -> str:
    """torch's reason for a recompilation in a line: the guard without what stands around it, and the user's line."""
    first = reason.partition("\n")[0].removeprefix(reason.partition(": ")[0] + ": ")
    guard = re.split(r"\s{2,}# ", first, maxsplit=1)[0].strip()
    line = next(reversed(user_frames(reason)), None)
    said = guard if "expected" in guard or not guard else f"no longer so: {guard}"
    return f"{said}   {line.short()}" if line else said


def short(node: Any) -> str:
    line = source_line(node)
    return line.short() if line else ""
