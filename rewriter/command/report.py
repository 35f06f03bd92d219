"""`latent report`: what was found and done, as one HTML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    FromConfig,
    Json,
    Names,
    Phase,
    PhaseChoice,
    Spelling,
    SpellingChoice,
    Tokens,
    errors,
    load,
    stdout_is_for_us,
)
from .console import progress, show
from .targets import TargetError

if TYPE_CHECKING:
    from ..page.reading import Material

__all__ = ["report"]


def report(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="A Hugging Face folder, FILE.py:FACTORY, or a folder of `latent dump`."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page.")] = Path("latent.html"),
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Trace with dynamic shapes.")] = False,
    rewrite: Names = None,
    phase: PhaseChoice = Phase.prefill,
    tokens: Tokens = 32,
    attention: SpellingChoice = None,
    from_config: FromConfig = False,
    as_json: Json = False,
) -> None:
    """Write an HTML file that shows everything about one call of a model; it loads nothing, and can be mailed."""
    with errors(), stdout_is_for_us():
        if not out.absolute().parent.is_dir():
            raise TargetError(f"--out {out}: there is no folder {out.parent}.", "Make it, or name another.")
        with progress("importing torch"):
            from ..page.reading import is_dump
            from ..page.render import MissingJinja, require_jinja, write
        try:
            require_jinja()  # said before the work, not after it
        except MissingJinja as error:
            raise TargetError("a page needs jinja2.", str(error)) from error
        if is_dump(Path(target)):
            material = _read(Path(target))
        else:
            material = _looked_at(target, dynamic, rewrite, phase, tokens, attention, from_config)
        try:
            size = write(material, out)
        except OSError as error:
            raise TargetError(f"--out {out}: {error.strerror}.", "Name a file that can be written.") from error
    if as_json:
        print(json.dumps({"target": target, "out": str(out), "bytes": size}))
    else:
        show(f"{out}   {size / 1000:.0f} kB, opens in any browser")


def _read(folder: Path) -> Material:
    from ..page.reading import read_dump

    try:
        with progress(f"reading {folder}"):
            return read_dump(folder)
    except (ValueError, OSError) as error:
        raise TargetError(f"{folder} cannot be read: {error}.", "Write it again: `latent dump --out DIR`.") from error


def _looked_at(
    target: str,
    dynamic: bool,
    rewrite: list[str] | None,
    phase: Phase,
    tokens: int,
    attention: Spelling | None,
    from_config: bool,
) -> Material:
    found = load(target, from_config, phase, tokens, attention)
    import torch

    from ..environment import Run, environment
    from ..explain import record
    from ..page.reading import of_recorded

    with progress("tracing and rewriting"), torch.no_grad():
        look = record(found.model, rewrites=rewrite or None, dynamic=dynamic or None)
        report, graphs = look(*found.args, **found.kwargs)
    return of_recorded(report, graphs, Run(target, found.notes, environment()))
