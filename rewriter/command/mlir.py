"""`latent mlir`: the rewritten graphs as MLIR."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import HFChoices, Json, Names, TargetText, errors, in_a_folder, load, stdout_is_for_us, takes_choices
from .console import progress, table

__all__ = ["mlir"]


class Dialect(str, Enum):
    """How far torch-mlir lowers."""

    torch = "torch"
    linalg = "linalg"


@takes_choices
def mlir(
    target: TargetText,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", metavar="FILE", help="Write here; without it, or with -, to stdout."),
    ] = None,
    dialect: Annotated[Dialect, typer.Option(help="The torch dialect, or linalg on tensors.")] = Dialect.linalg,
    rewrite: Names = None,
    *,
    choices: HFChoices,
    as_json: Json = False,
) -> None:
    """Write the rewritten graphs through torch-mlir; weights are arguments (extra `mlir`)."""
    with errors(), stdout_is_for_us():
        file = None if out is None or str(out) == "-" else out
        in_a_folder(file)
        found = load(target, choices)
        import torch

        from ..mlir import to_mlir
        from ..options import read_options

        with progress("rewriting, and converting with torch-mlir"), torch.no_grad():
            options = read_options({"rewrites": rewrite or None})
            graphs, _ = to_mlir(found.model, found.args, found.kwargs, options, dialect.value)
        texts = {graph.name: str(graph.module) for graph in graphs}
        counts = {g.name: (len(g.report.sites), texts[g.name].count(" = ")) for g in graphs}
        if file is not None:
            file.write_text("\n".join(texts.values()) + "\n", encoding="utf-8")
    if as_json:
        rows = [{"graph": name, "sites": sites, "operations": number} for name, (sites, number) in counts.items()]
        print(json.dumps({"target": target, "dialect": dialect.value, "out": str(file or ""), "graphs": rows}))
    elif file is None:
        sys.stdout.write("\n".join(texts.values()) + "\n")
    else:
        table([(str(file), name, f"{s} sites", f"{number} operations") for name, (s, number) in counts.items()], 0)
