"""The verdict on a whole model: one sentence, and the figures behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..report import GraphReport, Report
from ..rules import Verdict as Judged
from ..units import error_text, plural, seconds_text, size_text

__all__ = ["Figure", "Tone", "Verdict", "figures", "first_compilations", "verdict"]

Tone = Literal["good", "quiet", "warn", "bad"]
"""How a thing is coloured: rewritten, left as it is, nearly attention, went wrong."""


@dataclass(frozen=True)
class Verdict:
    tone: Tone
    sentence: str
    details: tuple[str, ...] = ()
    """What must not be missed besides."""


@dataclass(frozen=True)
class Figure:
    name: str
    value: str
    note: str = ""


def first_compilations(report: Report) -> tuple[GraphReport, ...]:
    """One graph for every piece of the program: the first time that it was compiled without a failure."""
    first: dict[str, GraphReport] = {}
    for graph in report.graphs:
        if graph.frame not in first or first[graph.frame].failure:
            first[graph.frame] = graph
    return tuple(first.values())


def verdict(report: Report) -> Verdict:
    tone, sentence = _sentence(report)
    return Verdict(tone, sentence, tuple(_details(report)))


def _sentence(report: Report) -> tuple[Tone, str]:
    graphs = first_compilations(report)
    if not graphs:
        return "quiet", "Nothing was compiled: the call ran no tensor operation that torch.compile saw."
    if all(graph.failure for graph in graphs):
        stage = graphs[0].failure.partition(":")[0]
        return "bad", f"latent could not read this model (the stage “{stage}” failed), so it runs as it is."
    sites = sum(len(graph.sites) for graph in graphs)
    near = sum(len(graph.near_misses) for graph in graphs)
    if not sites:
        if near:
            places = "One place comes" if near == 1 else f"{near} places come"
            return "warn", f"No attention was recognised, so nothing was changed. {places} close; the reason is below."
        return "quiet", "This model has no attention, so there was nothing to rewrite and nothing was changed."
    rewritten = sum(len(_rewritten(graph)) for graph in graphs)
    layers = {1: "The one attention layer", 2: "Both attention layers"}.get(sites, f"All {sites} attention layers")
    were, they = ("was", "it is") if sites == 1 else ("were", "they are")
    if not rewritten:
        return "quiet", f"{layers} of this model {were} recognised and left as {they}: no rewrite holds and pays here."
    if rewritten < sites:
        return "warn", f"{rewritten} of {sites} attention layers of this model were rewritten; {_proof(report)}."
    if near:
        nearly = "one place that is nearly attention" if near == 1 else f"{near} places that are nearly attention"
        return "warn", f"{layers} found in this model {were} rewritten, but {nearly} could not be; {_proof(report)}."
    tone: Tone = "warn" if _went_wrong(report) else "good"
    return tone, f"{layers} of this model {were} recognised and rewritten; {_proof(report)}."


def _proof(report: Report) -> str:
    applied = [v for v in report.verdicts if v.outcome == "applied"]
    proven = sum(bool(v.certificate) and v.error is not None for v in applied)
    if proven == len(applied):
        return "every rewrite was checked in double precision to give the same result"
    return f"{proven} of {plural(len(applied), 'rewrite')} were checked in double precision to give the same result"


def _details(report: Report) -> Iterator[str]:
    graphs = first_compilations(report)
    failed = [graph for graph in report.graphs if graph.failure]
    if failed and not all(graph.failure for graph in graphs):
        verb = "was" if len(failed) == 1 else "were"
        yield f"{plural(len(failed), 'graph')} of {len(report.graphs)} could not be read and {verb} left as it is."
    if wrong := _went_wrong(report):
        yield f"{plural(len(wrong), 'rewrite')} went wrong and the nodes were put back: please report it."
    if report.breaks:
        yield f"{plural(len(report.breaks), 'graph break')} cut the model; attention is not seen across a break."


def _went_wrong(report: Report) -> list[Judged]:
    return [v for v in report.verdicts if v.outcome in ("undone", "failed")]


def _rewritten(graph: GraphReport) -> set[int]:
    return {v.site for v in graph.verdicts if v.outcome == "applied"}


def figures(report: Report) -> tuple[Figure, ...]:
    """The numbers that everybody asks for."""
    return tuple(_figures(report))


def _figures(report: Report) -> Iterator[Figure]:
    graphs = first_compilations(report)
    sites = sum(len(graph.sites) for graph in graphs)
    near = sum(len(graph.near_misses) for graph in graphs)
    yield Figure(
        "attention", str(sites), "1 near miss" if near == 1 else f"{near} near misses" if near else "recognised"
    )
    yield Figure("rewritten", str(sum(len(_rewritten(graph)) for graph in graphs)), _classes(graphs))
    errors = [v.error for graph in graphs for v in graph.verdicts if v.error is not None and v.outcome == "applied"]
    if errors:
        count = sum(graph.certificates for graph in graphs)
        yield Figure("certificates", str(count), f"relative error {error_text(max(errors))}")
    estimates = [v.estimate for graph in graphs for v in graph.verdicts if v.estimate and v.outcome == "applied"]
    if estimates:
        saved = sum(e.bytes_before - e.bytes_after for e in estimates)
        yield Figure("memory traffic", f"−{size_text(saved)}", "predicted, in each call")
    timings = [v.timing for graph in graphs for v in graph.verdicts if v.timing]
    if timings:
        change = sum(t.after - t.before for t in timings)
        yield Figure("time", f"{'+' if change > 0 else '−'}{seconds_text(abs(change))}", "measured, in each call")
    frames = len({graph.frame for graph in report.graphs})
    breaks = "" if report.breaks is None else plural(len(report.breaks), "break") + ", "
    yield Figure("graphs", str(frames), breaks + plural(len(report.graphs), "compilation"))
    seconds = sum(sum(graph.seconds.values()) for graph in report.graphs)
    if seconds:
        yield Figure("latent took", f"{seconds:.2f} s", "compilation by inductor not counted")


def _classes(graphs: tuple[GraphReport, ...]) -> str:
    names = {v.rewrite for graph in graphs for v in graph.verdicts if v.outcome == "applied"}
    return f"by {plural(len(names), 'rewrite')}" if names else "no rewrite applied"
