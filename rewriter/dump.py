"""Graphs and reports for eyes and tools: a dump folder, and torch's structured trace."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from torch import fx

from .compat import emit_trace_artifact
from .report import GraphReport, render


def readable(gm: fx.GraphModule) -> str:
    """A graph as code with shapes in comments."""
    return str(gm.print_readable(print_output=False)) + "\n"


def dump_report(folder: Path | None, report: GraphReport, stages: Mapping[str, str]) -> None:
    """Write the report and the stages of a graph. Existing files of the same compilation are replaced."""
    if folder is None:
        return
    target = folder / _slug(report.name)
    target.mkdir(parents=True, exist_ok=True)
    for stage, text in stages.items():
        (target / f"{stage}.py").write_text(text)
    (target / "report.txt").write_text(render(report) + "\n")
    (target / "report.json").write_text(json.dumps(dataclasses.asdict(report), indent=2, default=str) + "\n")


def trace_artifacts(report: GraphReport) -> None:
    """The report in TORCH_TRACE, where tlparse shows it."""
    emit_trace_artifact("latent_report", render(report))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")
