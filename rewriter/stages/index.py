"""The front pages of a dump, in Markdown: what was found, what was done, and which file shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..report_text import collapse, grouped
from .text import head

if TYPE_CHECKING:
    from ..dump import Recorded

__all__ = ["describe_graph", "describe_graphs"]

STAGES = {
    "captured": "the model as torch.compile traced it, in ATen",
    "normal_form": "the few spellings that tracing leaves resolved; what the rewrites look at",
    "rewritten": "after every rewrite that was applied",
    "lowered": "what inductor compiles: each operator of `latent::` in the form chosen for it",
}


def describe_graphs(graphs: Sequence[tuple[str, str]]) -> str:
    """The front page: a line per graph."""
    lines = [f"- [{title}]({folder}/index.md)" for folder, title in graphs]
    return "\n".join(["# Graphs compiled by latent", "", *(lines or ["none"]), ""])


def describe_graph(recorded: Recorded, title: str, files: Sequence[str]) -> str:
    """The page of one graph."""
    parts = (
        _stages(recorded, files),
        _sites(recorded),
        _verdicts(recorded),
        _kernels(recorded),
        _certificates(recorded),
    )
    return "\n".join([f"# {title}", "", *(line for part in (*parts, _times(recorded)) for line in part)])


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if rows:
        yield from (f"## {title}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads))
        yield from (f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)
        yield ""


def _stages(recorded: Recorded, files: Sequence[str]) -> Iterator[str]:
    rows = []
    for name, stage in recorded.stages.items():
        links = [f"[{file.rpartition('.')[2]}]({file})" for file in files if file.startswith(f"{name}.")]
        if links:
            rows.append((name, " ".join(links), head(stage), STAGES.get(name, "")))
    yield from _table("Stages", ("stage", "files", "size", "what it is"), rows)
    yield "Each `.py` runs by itself: on `inputs.pt` if that is here, else on random inputs like those seen. The whole"
    yield "report is in [report.txt](report.txt); options and the order of rewrites are in [plan.json](plan.json)."
    yield ""


def _sites(recorded: Recorded) -> Iterator[str]:
    rows = []
    for same in grouped(recorded.report.sites, lambda s: (s.equation, s.line, s.spelling, s.mask, s.shape)):
        site, s = same[0], same[0].shape
        shape = f"{s.heads} heads, {s.queries} × {s.keys}, width {s.width}, {s.dtype}"
        place = collapse([each.path for each in same]) or "the model itself"
        rows.append((place, site.line, f"`{site.equation}`", shape, site.mask))
    yield from _table("Attention", ("module", "line", "what it computes", "shape", "mask"), rows)


def _verdicts(recorded: Recorded) -> Iterator[str]:
    verdicts = recorded.report.verdicts
    rows = [
        (v.rewrite, v.outcome, str(len(same)), v.reason)
        for same in grouped(verdicts, lambda v: (v.rewrite, v.outcome, v.reason))
        for v in same[:1]
    ]
    yield from _table("Rewrites", ("rewrite", "verdict", "sites", "reason"), rows)


def _kernels(recorded: Recorded) -> Iterator[str]:
    known = recorded.stages["lowered"].by_name if "lowered" in recorded.stages else {}
    pairs = [(known[name].module, source) for name, each in recorded.kernels.items() for source in each]
    rows = []
    for same in grouped(pairs, lambda pair: pair[1]):
        source = same[0][1]
        place = collapse(list(dict.fromkeys(module for module, _ in same))) or "the model itself"
        rows.append((place, f"[{source.name}](kernels/{source.file})", source.use))
    yield from _table("Generated kernels", ("module", "source", "when"), rows)
    lowered = [(same[0], str(len(same))) for same in grouped(recorded.report.lowered, str)]
    yield from _table("Lowered", ("operator and form", "times"), lowered)


def _certificates(recorded: Recorded) -> Iterator[str]:
    served: dict[str, int] = {}
    for verdict in recorded.report.verdicts:
        served[verdict.certificate] = served.get(verdict.certificate, 0) + 1
    rows = [
        (f"`{c.name}`", f"{c.error:.1e}", str(c.compared), str(served.get(c.name, 0)), c.note)
        for c in recorded.certificates
    ]
    yield from _table("Certificates", ("certificate", "relative error", "numbers compared", "sites", "note"), rows)


def _times(recorded: Recorded) -> Iterator[str]:
    report = recorded.report
    rows = [(name, f"{seconds:.3f}") for name, seconds in report.seconds.items()]
    rows += [(f"rewrite: {name}", f"{seconds:.3f}") for name, seconds in report.rewrite_seconds.items()]
    yield from _table("Seconds", ("stage", "seconds"), rows)
