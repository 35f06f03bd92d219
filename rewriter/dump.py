"""Graphs and reports for eyes and tools: a dump folder, and torch's structured trace."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from torch import fx

from .compat import emit_trace_artifact
from .report import GraphReport, render


def dump_graph(folder: Path | None, name: str, stage: str, gm: fx.GraphModule) -> None:
    """Write one stage of a graph as readable code. Existing files of the same compilation are replaced."""
    if folder is None:
        return
    target = folder / _slug(name)
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{stage}.py").write_text(gm.print_readable(print_output=False) + "\n")


def dump_report(folder: Path | None, report: GraphReport) -> None:
    if folder is None:
        return
    target = folder / _slug(report.name)
    target.mkdir(parents=True, exist_ok=True)
    (target / "report.txt").write_text(render(report) + "\n")
    (target / "report.json").write_text(json.dumps(dataclasses.asdict(report), indent=2, default=str) + "\n")


def trace_artifacts(report: GraphReport) -> None:
    """The report in TORCH_TRACE, where tlparse shows it."""
    emit_trace_artifact("latent_report", render(report))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")
