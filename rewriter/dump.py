"""What is kept of a compilation for eyes and tools: a folder of files, and torch's structured trace.

A folder holds one folder for each graph, whose `index.md` says what is there. Everything that a report needs is in the
JSON: `report.json`, `plan.json`, `certificates.json` and the stages.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .certify import Certificate
from .compat import debug_folder, emit_trace_artifact, trace_enabled
from .environment import Run
from .kernel_sources import KernelSource, kernel_sources
from .options import Options
from .registry import rewrites
from .report import GraphReport, Report, render
from .rewrite import Rewritten
from .stages import dot, python, svg, text
from .stages.folder import Content, Folder
from .stages.index import describe_graph, describe_graphs
from .stages.layer import cut, layer_path
from .stages.nesting import nest
from .stages.record import Recorder
from .stages.view import STAGES, Stage

__all__ = [
    "FORMATS",
    "Choices",
    "Recorded",
    "folder_of",
    "graph_files",
    "recorded_of",
    "wants_stages",
    "write_dump",
    "write_recorded",
]

FORMATS = {"text": "txt", "py": "py", "json": "json", "svg": "svg", "dot": "dot"}
"""The forms of a stage, and the endings of their files."""


@dataclass(frozen=True)
class Choices:
    """What of a compilation is written."""

    stages: tuple[str, ...] = STAGES
    formats: tuple[str, ...] = tuple(FORMATS)
    layer: int | None = None
    """Only this layer of the model; None: the whole graph."""

    inputs: bool = False
    """Whether the inputs, weights included, are written too."""


@dataclass(frozen=True)
class Recorded:
    """Everything about one compiled graph."""

    report: GraphReport
    stages: Mapping[str, Stage]
    plan: Mapping[str, Any]
    certificates: tuple[Certificate, ...] = ()
    kernels: Mapping[str, tuple[KernelSource, ...]] = field(default_factory=dict)
    """By the node of the lowered graph that runs them."""

    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Those of the compilation, which the graph may write to when it runs."""

    def named(self, name: str) -> Recorded:
        """The same under another name of the graph."""
        stages = {stage: dataclasses.replace(view, graph=name) for stage, view in self.stages.items()}
        return dataclasses.replace(self, report=dataclasses.replace(self.report, name=name), stages=stages)

    def with_copied_inputs(self) -> Recorded:
        """The same with inputs that nobody writes to; weights are not copied."""
        weights = {node.name for stage in self.stages.values() for node in stage.inputs if node.weight}
        copies = {
            name: value.clone() if isinstance(value, torch.Tensor) and name not in weights else value
            for name, value in self.inputs.items()
        }
        return dataclasses.replace(self, inputs=copies)


def recorded_of(
    recorder: Recorder, lowered: fx.GraphModule, report: GraphReport, done: Rewritten, options: Options
) -> Recorded:
    """What was recorded on the way, with the outcome."""
    plan = {
        "options": dataclasses.asdict(options),
        "rewrites": [
            {"name": e.name, "exact": e.exact, "equation": e.doc, "after": e.after, "before": e.before}
            for e in rewrites()
        ],
    }
    return Recorded(
        report,
        recorder.stages,
        plan,
        tuple(done.certificates.values()),
        kernel_sources(lowered.graph),
        recorder.constants,
        recorder.input_values(),
    )


def wants_stages(options: Options) -> bool:
    """Whether anybody looks at the stages."""
    return options.dump is not None or trace_enabled() or debug_folder() is not None


def write_recorded(recorded: Recorded, options: Options) -> None:
    """Put a compilation where it was asked for: the option's folder, torch's debug folder, torch's trace."""
    if trace_enabled():
        for stage in recorded.stages.values():
            emit_trace_artifact(f"latent_{stage.name}", text.render(stage))
    for root in filter(None, (options.dump, debug_folder())):
        folder, here = Folder(root), folder_of(recorded.report.name)
        number = int(here.rpartition("_")[2])
        # Graphs are numbered from 0 in each process: later numbers are another process's, which came before.
        files = {f"{here}/{name}": content for name, content in graph_files(recorded, Choices()).items()}
        kept = {name for name in folder.written if (n := re.match(r"graph_(\d+)/", name)) and int(n[1]) < number}
        graphs = sorted({*(name.partition("/")[0] for name in kept), here}, key=lambda g: int(g.rpartition("_")[2]))
        files["index.md"] = describe_graphs([(graph, _title(root, graph, recorded)) for graph in graphs])
        folder.replace("", files, kept.__contains__)


def _title(root: Path, graph: str, recorded: Recorded) -> str:
    if graph == folder_of(recorded.report.name):
        return headline(recorded.report)
    return (root / graph / "index.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def trace_artifacts(report: GraphReport) -> None:
    """The report in TORCH_TRACE, where tlparse shows it."""
    emit_trace_artifact("latent_report", render(report))


def write_dump(
    root: Path, report: Report, graphs: Sequence[Recorded], choices: Choices, run: Run | None = None
) -> Folder:
    """All graphs of one run. What an earlier dump left in the folder goes. Raises DumpError."""
    folder = Folder(root)
    files: dict[str, Content] = {}
    for recorded in graphs:
        here = folder_of(recorded.report.name)
        files |= {f"{here}/{name}": content for name, content in graph_files(recorded, choices).items()}
    files["index.md"] = describe_graphs([(folder_of(r.report.name), headline(r.report)) for r in graphs])
    files["report.json"] = report.to_json() + "\n"
    if run is not None:
        files["run.json"] = _json(dataclasses.asdict(run))
    folder.replace("", files)
    return folder


def folder_of(name: str) -> str:
    """graph 0 [0/0] -> graph_0."""
    return "_".join(name.partition(" [")[0].split())


def headline(report: GraphReport) -> str:
    applied = sum(v.outcome == "applied" for v in report.verdicts)
    return f"{report.name}: {report.count('attention')} attention sites, {applied} rewrites applied"


def graph_files(recorded: Recorded, choices: Choices) -> dict[str, Content]:
    """The files of one graph by their path in its folder."""
    files: dict[str, Content] = {}
    for name in choices.stages:
        if name in recorded.stages:
            files |= stage_files(recorded.stages[name], choices)
    for source in dict.fromkeys(source for each in recorded.kernels.values() for source in each):
        files[f"kernels/{source.file}"] = source.text
    if recorded.constants and "py" in choices.formats:
        files["constants.pt"] = lambda path: torch.save(dict(recorded.constants), path)
    if choices.inputs:
        files["inputs.pt"] = lambda path: torch.save(dict(recorded.inputs), path)
    files["report.txt"] = render(recorded.report) + "\n"
    files["report.json"] = _json(dataclasses.asdict(recorded.report))
    files["plan.json"] = _json(recorded.plan)
    files["certificates.json"] = _json([dataclasses.asdict(certificate) for certificate in recorded.certificates])
    files["index.md"] = describe_graph(recorded, headline(recorded.report), sorted(files))
    return files


def stage_files(stage: Stage, choices: Choices) -> dict[str, Content]:
    """One stage in the forms that are asked for. Raises ValueError for a layer that is not there."""
    name, whole = stage.name, choices.layer is None
    if choices.layer is not None:
        stage, name = cut(stage, layer_path(stage, choices.layer)), f"{name}.layer_{choices.layer}"
    tree = nest(stage)
    renderers: dict[str, Callable[[], str]] = {
        "text": lambda: text.render(stage, tree),
        "py": lambda: python.render(stage, whole),
        "json": stage.to_json,
        "dot": lambda: dot.render(stage, tree),
        "svg": lambda: svg.render(stage, tree),
    }
    return {f"{name}.{FORMATS[form]}": renderers[form]() for form in choices.formats}


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, default=str, ensure_ascii=False) + "\n"
