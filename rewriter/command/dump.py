"""`latent dump`: every stage of a model's graphs, as text, Python, JSON and drawings."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .common import Dynamic, HFChoices, Json, Names, TargetText, errors, load, stdout_is_for_us, takes_choices
from .console import progress, table
from .targets import TargetError

if TYPE_CHECKING:
    from ..dump import Choices, Recorded

__all__ = ["dump"]


class StageName(str, Enum):
    """Where on its way a graph is looked at."""

    captured = "captured"
    normal_form = "normal_form"
    rewritten = "rewritten"
    lowered = "lowered"


class Form(str, Enum):
    """How a stage is written."""

    text = "text"
    py = "py"
    json = "json"
    dot = "dot"
    svg = "svg"


@takes_choices
def dump(
    target: TargetText,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", metavar="DIR", help="The folder. Without it, one stage is printed."),
    ] = None,
    stage: Annotated[
        Optional[list[StageName]],  # noqa: UP045
        typer.Option("--stage", help="Only this stage; may be given several times. Printed: rewritten, if not said."),
    ] = None,
    form: Annotated[
        Optional[list[Form]],  # noqa: UP045
        typer.Option("--format", help="Only this form; may be given several times. Printed: text, if not said."),
    ] = None,
    layer: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--layer", min=0, help="Only this layer; what it reads from others are its inputs."),
    ] = None,
    inputs: Annotated[bool, typer.Option("--inputs", help="Write the inputs too, weights included.")] = False,
    dynamic: Dynamic = False,
    rewrite: Names = None,
    *,
    choices: HFChoices,
    as_json: Json = False,
) -> None:
    """Write every stage of a model's graphs, with plan, certificates and kernels; the model is left as it was."""
    if out is None and (inputs or max(len(stage or ()), len(form or ())) > 1):
        raise typer.BadParameter("several stages or forms, and inputs, need a folder: --out DIR", param_hint="--out")
    if inputs and layer is not None:
        raise typer.BadParameter("inputs are kept for whole graphs only; leave out --layer", param_hint="--inputs")
    with errors(), stdout_is_for_us():
        if out is not None and out.is_file():
            raise TargetError(f"--out {out}: that is a file.", "Name a folder.")
        found = load(target, choices)
        import torch

        from ..dump import FORMATS, Choices, write_dump
        from ..environment import Run, environment
        from ..explain import record
        from ..stages.folder import DumpError
        from ..stages.view import STAGES

        with progress("tracing and rewriting"), torch.no_grad():
            look = record(found.model, rewrites=rewrite or None, dynamic=dynamic or None, inputs=inputs)
            report, graphs = look(*found.args, **found.kwargs)
        stages = tuple(s.value for s in stage or ()) or (STAGES if out else ("rewritten",))
        forms = tuple(f.value for f in form or ()) or (tuple(FORMATS) if out else ("text",))
        wanted = Choices(stages, forms, layer, inputs)
        try:
            if out is None:
                printed = _printed(graphs, wanted)
            else:
                with progress(f"writing {out}"):
                    run = Run(target, found.notes, environment())
                    folder = write_dump(out, report, graphs, wanted, run)
        except DumpError as error:
            what, _, todo = str(error).partition("\n")
            raise TargetError(what, todo) from error
        except ValueError as error:  # a layer that is not there
            raise TargetError(f"--layer {layer}: {error}.", "Leave it out for the whole graph.") from error
    if out is None:
        sys.stdout.write(printed)
    elif as_json:
        print(json.dumps({"target": target, "out": str(out), "files": sorted(folder.written)}))
    else:
        _summary(out, graphs)


def _printed(graphs: Sequence[Recorded], choices: Choices) -> str:
    from ..dump import stage_files

    stages = [graph.stages[name] for graph in graphs for name in choices.stages if name in graph.stages]
    return "\n".join(str(text) for stage in stages for text in stage_files(stage, choices).values())


def _summary(out: Path, graphs: Sequence[Recorded]) -> None:
    from ..dump import folder_of, headline
    from ..stages.text import head

    rows = [(str(out / "index.md"), "start here")]
    for graph in graphs:
        here = out / folder_of(graph.report.name)
        rows.append((str(here), headline(graph.report)))
        rows += [(f"  {name}", head(stage)) for name, stage in graph.stages.items()]
    table(rows, indent=0)
