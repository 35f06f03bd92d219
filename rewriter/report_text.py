"""Reports as text: identical layers once, columns aligned, reasons in words, and a second compilation told apart."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from .units import error_text, plural, seconds_text, size_text, times_text

if TYPE_CHECKING:
    from .report import GraphReport, MissReport, Report, SiteReport
    from .rules import Verdict

__all__ = [
    "MARKS",
    "alike",
    "collapse",
    "grouped",
    "hanging",
    "merged",
    "merged_origins",
    "render",
    "render_report",
    "site_classes",
    "timing_text",
]

Item = TypeVar("Item")
Block = tuple[str, ...]
"""Lines that belong together."""

MARKS = {"applied": "✓", "refused": "–", "not paying": "–", "off": "·", "undone": "✗", "failed": "✗"}
WIDTH = 110
_NO_BREAK = "\N{NO-BREAK SPACE}"


def render_report(report: Report) -> str:
    """All graphs. Another compilation of a graph shows only what differs from the first."""
    if not report.graphs:
        breaks = "".join(f"\n{line}" for line in _breaks(report))
        return f"no graph was compiled: the call ran no tensor operation that torch.compile saw{breaks}"
    first: dict[str, GraphReport] = {}
    parts = []
    for graph in report.graphs:
        parts.append(render(graph, first.get(graph.frame)))
        first.setdefault(graph.frame, graph)
    summary = [_summary(report), *_breaks(report)] if report.breaks is not None or len(parts) > 1 else []
    return "\n\n".join([*(["\n".join(summary)] if summary else []), *parts])


def render(graph: GraphReport, first: GraphReport | None = None) -> str:
    """One graph: sites by layer class, verdicts per rewrite, near misses; with `first`, what is not as there."""
    again = f" · {first.name.partition(' [')[0]} once more" if first else ""
    total = sum(graph.seconds.values())
    head = f"{graph.name}{again} · {graph.nodes} nodes" + (f" · latent took {total:.2f} s" if total else "")
    lines = [head, "─" * len(head), *(hanging("compiled again, torch says: ", graph.again) if graph.again else ())]
    if graph.failure:
        return "\n".join([*lines, f"✗ failed      {graph.failure}", "              the graph stays as it is"])
    known = {block for _, blocks in _sections(first) for block in blocks} if first else set()
    for title, blocks in _sections(graph):
        new = [block for block in blocks if block not in known]
        if blocks and not new:
            lines.append(f"{title}: as before")
        elif title.startswith("attention") or new:
            lines.append(title + (" · others as before" if len(new) < len(blocks) else ""))
            lines += [f"  {line}".rstrip() for block in new for line in block]
    return "\n".join(lines)


def _sections(graph: GraphReport) -> Iterator[tuple[str, list[Block]]]:
    sites = len(graph.sites)
    yield f"attention   {sites} {'site' if sites == 1 else 'sites'}", list(_sites(graph.sites))
    yield "rewrites", list(_verdicts(graph))
    yield "lowered", [(f"{same[0]}{_times(same)}",) for same in grouped(graph.lowered, str)]
    near = graph.near_misses
    yield f"near {'miss' if len(near) == 1 else 'misses'}   {len(near)}", list(_misses(near))
    yield "other softmax", list(_misses([miss for miss in graph.misses if not miss.reached], code=False))


def _sites(sites: Sequence[SiteReport]) -> Iterator[Block]:
    groups = site_classes(sites)
    places = [collapse([site.path for site in same]) or "the model itself" for same in groups]
    width = max(map(len, places), default=0)
    for place, same in zip(places, groups, strict=True):
        site = same[0]
        origins = [line for each in merged_origins(same) for line in hanging("  ", each)]
        mask = merged([s.mask for s in same])
        yield f"{place:<{width}}   {site.line}", f"  {site.equation}", *hanging("  ", _shape(site, mask)), *origins


def site_classes(sites: Sequence[SiteReport]) -> list[list[SiteReport]]:
    """Sites that are the same, layer numbers in their words aside."""

    def key(site: SiteReport) -> Hashable:
        return (site.equation, site.line, site.spelling, alike(site.mask), site.shape, tuple(map(alike, site.origins)))

    return grouped(sites, key)


def merged_origins(same: Sequence[SiteReport]) -> tuple[str, ...]:
    return tuple(merged(each) for each in zip(*(site.origins for site in same), strict=True))


def _shape(site: SiteReport, mask: str) -> str:
    s = site.shape
    heads = "1 head" if s.heads == "1" else f"{s.heads} heads"
    heads += f" in groups of {s.groups}" if s.groups != "1" else ""
    width = f"width {s.width}" if s.width == s.value_width else f"widths {s.width} and {s.value_width}"
    queries = "1 query" if s.queries == "1" else f"{s.queries} queries"
    mask = "no mask" if mask == "none" else f"mask {mask}"
    return " · ".join([site.spelling, heads, width, f"{queries} × {s.keys} keys", s.dtype, mask])


def _verdicts(graph: GraphReport) -> Iterator[Block]:
    verdicts = graph.verdicts
    taken = {v.site for v in verdicts if v.outcome == "applied"}
    groups = grouped(verdicts, lambda v: (v.rewrite, v.outcome, alike(v.reason)))
    sites = {v.rewrite: sum(w.rewrite == v.rewrite for w in verdicts) for v in verdicts}
    name = max((len(v.rewrite) for v in verdicts), default=0)
    outcome = max((len(v.outcome) for v in verdicts), default=0)
    counts = [f"{len(same)} of {sites[same[0].rewrite]}" for same in groups]
    number = max(map(len, counts), default=0)
    for count, same in zip(counts, groups, strict=True):
        v = same[0]
        text = f"{MARKS[v.outcome]} {v.rewrite:<{name}}  {v.outcome:<{outcome}}  {count:>{number}}   "
        own = {graph.sites[v.site].line for v in same}
        detail = _detail(same, {v.line for v in same if v.site not in taken} - own)
        yield tuple(hanging(text, detail)) if detail else (text.rstrip(),)


def _detail(same: Sequence[Verdict], places: Collection[str]) -> str:
    """What there is to say about equal verdicts; a refusal has its place where nothing else was applied there."""
    errors = [v.error for v in same if v.error is not None]
    known = [v.estimate for v in same if v.estimate is not None]
    before, after = sum(e.bytes_before for e in known), sum(e.bytes_after for e in known)
    traffic = f"moves {size_text(before)} → {size_text(after)}" if before or after else ""
    if same[0].outcome == "applied":
        uncertified = f"not certified ({same[0].reason})" if same[0].reason else "not certified"
        certified = f"certified, relative error {error_text(max(errors))} in fp64" if errors else uncertified
        timing = timing_text(same)
        parts = (certified, _whole(traffic), _whole(f"takes {timing}") if timing else "")
        return " · ".join(filter(None, parts))
    if same[0].outcome == "not paying":
        return " · ".join(filter(None, (same[0].reason, traffic)))
    places = {same[0].line} if same[0].outcome in ("undone", "failed") else places
    return merged([v.reason for v in same]) + (f"   {next(iter(places))}" if len(places) == 1 else "")


def timing_text(same: Sequence[Verdict]) -> str:
    """What equal verdicts save together, where it was measured: "81.2 µs → 57 µs, 1.4 × as fast"."""
    timings = [v.timing for v in same if v.timing is not None]
    if not timings:
        return ""
    before, after = sum(t.before for t in timings), sum(t.after for t in timings)
    return f"{seconds_text(before)} → {seconds_text(after)}, {times_text(before / after)}"


def _misses(misses: Sequence[MissReport], code: bool = True) -> Iterator[Block]:
    """The module and the line, the line's code, the reason."""
    for same in grouped(misses, lambda m: (m.reason, m.line)):
        miss = same[0]
        place = collapse([m.path for m in same]) or f"the model itself{_times(same)}"
        lines = [f"{place}   {miss.line}"]
        if code and miss.code:
            lines.append("    " + textwrap.shorten(miss.code, WIDTH - 4, placeholder=" …"))
        yield tuple(lines + hanging("  → " if code else "  ", miss.reason)[:7])


def _summary(report: Report) -> str:
    frames, compilations = len({graph.frame for graph in report.graphs}), len(report.graphs)
    counts = [plural(frames, "graph")]
    if report.breaks is not None:
        counts.append(plural(len(report.breaks), "graph break"))
    return " · ".join([*counts, plural(compilations, "compilation")])


def _breaks(report: Report) -> Iterator[str]:
    for same in grouped(report.breaks or (), lambda b: b):
        place = " ".join(filter(None, [same[0].line, same[0].code]))
        yield f"  graph break{_times(same)}   {place}".rstrip()
        yield from hanging("    → ", same[0].reason)[:4]


# ** pieces of text **


def collapse(paths: Sequence[str]) -> str:
    """model.layers.0.attn, model.layers.1.attn, ... -> model.layers.[0-29].attn × 30."""
    if not paths or not paths[0]:
        return ""
    if len(paths) == 1:
        return paths[0]
    text = _over(paths, r"(\d+)")
    return f"{paths[0]} … × {len(paths)}" if text is None else f"{text} × {len(paths)}"


_LAYER = r"(?<=[A-Za-z_]\.)(\d+)\b"
"""A number as a step of a path: no decimals."""


def alike(text: str) -> str:
    """The text without numbers of layers: equal for what differs in them alone."""
    return re.sub(_LAYER, "#", text)


def merged(texts: Sequence[str]) -> str:
    """Texts that are alike as one: layers.0.seen is given, layers.1.seen is given -> layers.[0-1].seen is given."""
    return _over(texts, _LAYER) or texts[0]


def _over(texts: Sequence[str], number: str) -> str | None:
    """The texts as one, with ranges of numbers where they differ; None where they differ elsewhere."""
    pieces = [re.split(number, text) for text in texts]
    if len({len(p) for p in pieces}) != 1:
        return None
    text = ""
    for column in zip(*pieces, strict=True):
        values = list(dict.fromkeys(column))
        if len(values) == 1:
            text += values[0]
        elif all(value.isdigit() for value in values):
            text += f"[{_ranges(sorted(map(int, values)))}]"
        else:
            return None
    return text


def _ranges(numbers: Sequence[int]) -> str:
    """0 1 2 5 -> 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items of equal key together, in the order of their first."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def hanging(start: str, text: str) -> list[str]:
    """`text` behind `start`, further lines below its beginning."""
    width = max(WIDTH, len(start) + 40)
    lines = textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * len(start)) or [start.rstrip()]
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _whole(text: str) -> str:
    """A part of a text for `hanging` that stays on one line."""
    return text.replace(" ", _NO_BREAK)


def _times(same: Sequence[object]) -> str:
    return f" × {len(same)}" if len(same) > 1 else ""
