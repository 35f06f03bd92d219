"""What a page is made of, from a run of the stages or from a dump's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..describe import Shape
from ..environment import Run, environment
from ..report import Break, GraphReport, MissReport, Report, SiteReport
from ..rules import Estimate, Timing, Verdict
from ..stages.view import Stage

if TYPE_CHECKING:
    from ..dump import Recorded

__all__ = ["Graph", "Material", "is_dump", "of_recorded", "read_dump", "report_of"]

STAGES = ("captured", "normal_form", "rewritten")


@dataclass(frozen=True)
class Graph:
    """What is there of one graph, its report aside."""

    stages: Mapping[str, Stage] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)
    """Sources by file name."""


@dataclass(frozen=True)
class Material:
    report: Report
    run: Run
    graphs: Mapping[str, Graph] = field(default_factory=dict)
    """By the names of the reports; graphs that could not be rewritten are not among them."""


def of_recorded(report: Report, recorded: Sequence[Recorded], run: Run) -> Material:
    """From what `explain.record` gives."""
    graphs = {
        each.report.name: Graph(
            {name: stage for name, stage in each.stages.items() if name in STAGES},
            _plain(each.plan),
            dict(sorted((source.file, source.text) for sources in each.kernels.values() for source in sources)),
        )
        for each in recorded
    }
    return Material(report, run, graphs)


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """As it would be read from a file."""
    return json.loads(json.dumps(data, default=str))  # type: ignore[no-any-return]


# ** a dump's folder **


def is_dump(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and (folder / "index.md").is_file()


def read_dump(folder: Path) -> Material:
    """From the JSON of a dump, whether of `latent dump` or of the option. Raises ValueError for any other folder."""
    here = sorted(folder.glob("graph_*/report.json"), key=lambda path: int(path.parent.name.rpartition("_")[2]))
    whole = folder / "report.json"
    try:
        reports = tuple(_graph_report(_json(path)) for path in here)
        report = report_of(_json(whole)) if whole.is_file() else Report(reports)
        graphs = {each.name: _graph(path.parent) for each, path in zip(reports, here, strict=True)}
        return Material(report, _run(folder), graphs)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a report is not as this version writes it ({type(error).__name__}: {error})") from error


def _graph(folder: Path) -> Graph:
    stages = {name: folder / f"{name}.json" for name in STAGES}
    kernels = folder / "kernels"
    return Graph(
        {name: Stage.from_json(path.read_text(encoding="utf-8")) for name, path in stages.items() if path.is_file()},
        _json(folder / "plan.json"),
        {path.name: path.read_text(encoding="utf-8") for path in sorted(kernels.glob("*"))},
    )


def _run(folder: Path) -> Run:
    file = folder / "run.json"
    if not file.is_file():
        return Run(folder.name, ("from a dump that does not say where it was made",), environment())
    data = _json(file)
    return Run(data["target"], tuple(data["notes"]), data["environment"])


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ** reports **


def report_of(data: Mapping[str, Any]) -> Report:
    """The opposite of `Report.to_dict`."""
    breaks = data["breaks"]
    return Report(
        tuple(map(_graph_report, data["graphs"])),
        None if breaks is None else tuple(Break(**each) for each in breaks),
    )


def _graph_report(data: Mapping[str, Any]) -> GraphReport:
    parts = {
        "sites": tuple(map(_site, data["sites"])),
        "verdicts": tuple(map(_verdict, data["verdicts"])),
        "misses": tuple(MissReport(**each) for each in data["misses"]),
        "lowered": tuple(data["lowered"]),
    }
    return GraphReport(**{**data, **parts})


def _site(data: Mapping[str, Any]) -> SiteReport:
    lists = {"origins": tuple(data["origins"]), "picture": tuple(data["picture"])}
    lists["heads"] = tuple(map(tuple, data.get("heads", ())))
    return SiteReport(**{**data, **lists, "shape": Shape(**data["shape"])})


def _verdict(data: Mapping[str, Any]) -> Verdict:
    estimate, timing = data["estimate"], data.get("timing")
    return Verdict(**{**data, "estimate": estimate and Estimate(**estimate), "timing": timing and Timing(**timing)})
