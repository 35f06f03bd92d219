"""What was found and done, as values and as text: identical layers once, reasons in words, source lines."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .describe import Shape, equation, shape
from .provenance import module_path, source_line
from .rules import Verdict
from .sites import AttentionSite, Miss


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
    failure: str = ""

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
    """Every graph of one call or of one process."""

    graphs: tuple[GraphReport, ...]

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
        return sum(graph.count(name) for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        return {"graphs": [dataclasses.asdict(graph) for graph in self.graphs]}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, default=str)

    def __str__(self) -> str:
        return "\n\n".join(render(graph) for graph in self.graphs) or "no graph was compiled"


def report_site(index: int, site: AttentionSite, mask: str) -> SiteReport:
    return SiteReport(
        index,
        module_path(site.anchor),
        short(site.anchor),
        site.spelling,
        equation(site),
        mask,
        shape(site),
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


def short(node: Any) -> str:
    line = source_line(node)
    return line.short() if line else ""


# ------------------------------------------------------------------ text


def collapse(paths: Sequence[str]) -> str:
    """model.layers.0.attn, model.layers.1.attn, ... -> model.layers.[0-29].attn × 30."""
    if not paths or not paths[0]:
        return f"× {len(paths)}" if len(paths) > 1 else ""
    if len(paths) == 1:
        return paths[0]
    pieces = [re.split(r"(\d+)", path) for path in paths]
    if len({len(p) for p in pieces}) != 1:
        return f"{paths[0]} … × {len(paths)}"
    columns = list(zip(*pieces, strict=True))
    text = ""
    for column in columns:
        values = list(dict.fromkeys(column))
        if len(values) == 1:
            text += values[0]
        elif all(value.isdigit() for value in values):
            text += f"[{_ranges(sorted(map(int, values)))}]"
        else:
            return f"{paths[0]} … × {len(paths)}"
    return f"{text} × {len(paths)}"


def _ranges(numbers: Sequence[int]) -> str:
    """0 1 2 5 -> 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def grouped(items: Iterable[Any], key: Any) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def render(graph: GraphReport) -> str:
    """One graph as text: sites by layer class, verdicts per rewrite, near misses."""
    total = sum(graph.seconds.values())
    head = f"{graph.name}   {graph.nodes} nodes   latent {total:.2f} s"
    lines = [head, "─" * len(head)]
    if graph.failure:
        lines.append(f"failed: {graph.failure}; the untouched graph was compiled")
    lines.append(f"sites       {len(graph.sites)} attention" + (" site" if len(graph.sites) == 1 else " sites"))
    for same in grouped(graph.sites, lambda s: (s.equation, s.line, s.spelling, s.mask, s.shape)):
        site = same[0]
        lines.append(f"  {collapse([s.path for s in same])}".rstrip() + f"   {site.line}")
        lines.append(f"    {site.equation}")
        lines.append(f"    {_shape_text(site)}")
    if graph.verdicts:
        lines.append("rewrites")
        width = max(len(v.rewrite) for v in graph.verdicts)
        for same in grouped(graph.verdicts, lambda v: (v.rewrite, v.outcome, v.reason)):
            first = same[0]
            count = f"{len(same)} of {sum(v.rewrite == first.rewrite for v in graph.verdicts)}"
            detail = first.reason
            errors = [v.error for v in same if v.error is not None]
            if first.outcome == "applied" and errors:
                detail = f"certified, relative error {max(errors):.0e} in fp64"
            place = f"   {first.line}" if first.line and first.outcome in ("undone", "failed") else ""
            lines.append(f"  {first.rewrite:<{width}}  {first.outcome:<10} {count:>9}   {detail}{place}".rstrip())
    lowered = grouped(graph.lowered, lambda text: text)
    for n, same in enumerate(lowered):
        lines.append(f"{'lowered' if n == 0 else '':<12}{same[0]} × {len(same)}")
    for miss in grouped(graph.near_misses, lambda m: (m.reason, m.line)):
        first = miss[0]
        lines.append(f"near miss   {collapse([m.path for m in miss])}   {first.line}".rstrip())
        if first.code:
            lines.append(f"    {first.code}")
        lines.append(f"    {first.reason}")
    others = [m for m in graph.misses if not m.reached]
    for same in grouped(others, lambda m: (m.reason, m.line)):
        lines.append(f"other softmax   {collapse([m.path for m in same])}   {same[0].line}: {same[0].reason}")
    return "\n".join(lines)


def _shape_text(site: SiteReport) -> str:
    s = site.shape
    heads = f"{s.heads} heads" + (f" in groups of {s.groups}" if s.groups != "1" else "")
    width = s.width if s.width == s.value_width else f"{s.width}/{s.value_width}"
    return f"{site.spelling}   {heads}, width {width}, {s.queries} queries × {s.keys} keys, {s.dtype}   mask: {site.mask}"
