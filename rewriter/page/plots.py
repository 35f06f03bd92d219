"""Predictions as drawings: what each rewrite saves, where it stands below the roofline, what attention reads per token.

Coordinates are ready for SVG; the templates only write them down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..report import GraphReport, SiteReport
from ..report_text import grouped
from ..rules import RIDGE, Estimate
from ..stages.view import Ref, Stage
from ..units import flops_text, less, number_text, size_text

__all__ = ["Bar", "Cache", "Pair", "Roofline", "Tick", "bars", "cache", "roofline"]

WIDTH, HEIGHT = 460, 220
"""Of a plot's inside, in pixels."""


@dataclass(frozen=True)
class Bar:
    """What a rewrite's pieces of the graph cost before and after, in one measure; widths are per cent."""

    rewrite: str
    measure: str
    before: str
    after: str
    change: str
    before_width: float
    after_width: float


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Pair:
    """A rewrite before and after, as points."""

    rewrite: str
    x0: float
    y0: float
    x1: float
    y1: float
    text: str


@dataclass(frozen=True)
class Roofline:
    roof: str
    pairs: tuple[Pair, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    ridge: int


@dataclass(frozen=True)
class Cache:
    """What attention reads, over the length of the context."""

    before: str
    after: str
    change: str
    line_before: str
    line_after: str
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]


# ** bars **


def bars(graph: GraphReport) -> tuple[Bar, ...]:
    """Of the applied rewrites, all sites together."""
    totals = _totals(graph)
    most_bytes = max((max(e.bytes_before, e.bytes_after) for _, e in totals), default=0)
    most_flops = max((max(e.flops_before, e.flops_after) for _, e in totals), default=0)
    found = []
    for name, e in totals:
        found.append(_bar(name, "bytes moved", e.bytes_before, e.bytes_after, most_bytes, size_text))
        if e.flops_before != e.flops_after:
            found.append(_bar(name, "operations", e.flops_before, e.flops_after, most_flops, flops_text))
    return tuple(found)


def _bar(name: str, measure: str, before: float, after: float, most: float, text: object) -> Bar:
    assert callable(text)
    widths = (round(100 * value / most, 2) if most else 0 for value in (before, after))
    return Bar(name, measure, text(before), text(after), less(before, after), *widths)


def _totals(graph: GraphReport) -> list[tuple[str, Estimate]]:
    """Of each applied rewrite, summed over its sites."""
    applied = [v for v in graph.verdicts if v.outcome == "applied" and v.estimate is not None]
    return [(s[0].rewrite, _sum([v.estimate for v in s if v.estimate])) for s in grouped(applied, lambda v: v.rewrite)]


def _sum(estimates: Sequence[Estimate]) -> Estimate:
    return Estimate(
        sum(e.flops_before for e in estimates),
        sum(e.bytes_before for e in estimates),
        sum(e.flops_after for e in estimates),
        sum(e.bytes_after for e in estimates),
    )


# ** roofline **


def roofline(graph: GraphReport) -> Roofline | None:
    """FLOP per byte, and the share of the arithmetic peak that it allows, both to powers of two."""
    pairs = [
        (name, e.flops_before / e.bytes_before, e.flops_after / e.bytes_after)
        for name, e in _totals(graph)
        if min(e.flops_before, e.flops_after, e.bytes_before, e.bytes_after) > 0
    ]
    if not pairs:
        return None
    values = [RIDGE, *(x for _, before, after in pairs for x in (before, after))]
    least, most = math.floor(math.log2(min(values))) - 1, math.ceil(math.log2(max(values))) + 1
    bottom = math.floor(math.log2(2**least / RIDGE))

    def x(intensity: float) -> float:
        return round(WIDTH * (math.log2(intensity) - least) / (most - least), 1)

    def y(intensity: float) -> float:
        share = min(0.0, math.log2(intensity / RIDGE))
        return round(HEIGHT * share / bottom, 1)

    step = max(1, (most - least) // 6)
    corners = (2.0**least, float(RIDGE), 2.0**most)
    return Roofline(
        " ".join(f"{x(c)},{y(c)}" for c in corners),
        tuple(
            Pair(n, x(a), y(a), x(b), y(b), f"{n}: {a:.3g} → {b:.3g} FLOP per byte, {_share(a)} → {_share(b)} of peak")
            for n, a, b in pairs
        ),
        tuple(Tick(x(2.0**n), f"{2.0**n:g}") for n in range(least, most + 1, step)),
        tuple(Tick(round(HEIGHT * n / bottom, 1), _percent(2.0**n)) for n in range(0, bottom - 1, -2)),
        RIDGE,
    )


def _share(intensity: float) -> str:
    return _percent(min(1.0, intensity / RIDGE))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1g} %"


# ** what attention reads of every earlier token **

ITEM = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
OPERANDS = {"latent::attention": (1, 2), "latent::latent_attention": (2, 3, 4)}
"""Where the operators of this package have what they read for every key."""

LENGTHS = (1024, 131072)


def cache(graph: GraphReport, rewritten: Stage | None) -> Cache | None:
    """None where a size is not known."""
    before = [_bytes_of_site(site) for site in graph.sites]
    if not before or None in before or rewritten is None:
        return None
    old = sum(value for value in before if value)
    ours = list(_bytes_of_operators(rewritten))
    untouched = len(before) - len(ours)
    if untouched and len(set(before)) > 1:
        return None  # which of the sites became operators is not known
    new = min(old, sum(ours) + untouched * (before[0] or 0))  # copies of heads are made from what is read once
    most = max(old, new) * LENGTHS[1]

    def y(value: float) -> float:
        return round(HEIGHT * (1 - value / most), 1)

    def line(each: float) -> str:
        return f"0,{y(each * LENGTHS[0])} {WIDTH},{y(each * LENGTHS[1])}"

    lengths = (1024, 32768, 65536, 98304, 131072)
    span = LENGTHS[1] - LENGTHS[0]
    return Cache(
        f"{number_text(round(old))} B",
        f"{number_text(round(new))} B",
        less(old, new),
        line(old),
        line(new),
        tuple(Tick(round(WIDTH * (n - LENGTHS[0]) / span, 1), f"{n // 1024}k") for n in lengths),
        tuple(Tick(y(most * share), size_text(most * share)) for share in (0, 0.5, 1)),
    )


def _bytes_of_site(site: SiteReport) -> float | None:
    """Keys and values of one token, repeated heads once."""
    s = site.shape
    sizes = (s.batch, s.heads, s.groups, s.width, s.value_width)
    if s.dtype not in ITEM or not all(each.isdigit() for each in sizes):
        return None
    batch, heads, groups, width, value_width = map(int, sizes)
    return batch * heads / groups * (width + value_width) * ITEM[s.dtype]


def _bytes_of_operators(stage: Stage) -> Iterator[float]:
    for node in stage.calls:
        if node.operator in OPERANDS:
            given = [node.args[n] for n in OPERANDS[node.operator] if n < len(node.args)]
            types = [stage.by_name[ref.name].types[0] for ref in given if isinstance(ref, Ref)]
            tokens = types[0].sizes[-2]
            yield sum(math.prod(t.sizes) * ITEM.get(t.dtype, 4) / tokens for t in types)
