"""`latent diff`: what differs between two stages, two dumps, or the same model in two versions of a library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..stages.compare import Comparison, compare
from ..stages.compare_html import render as html
from ..stages.compare_text import render, stat
from ..stages.view import STAGES, Stage
from .common import Json, errors
from .console import show
from .targets import TargetError

__all__ = ["diff"]


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="DIR/graph_0/captured, a graph's folder, or a dump's folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same for the other side.")],
    stage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--stage", help="For folders: only this stage; else each, up to the first that differs."),
    ] = None,
    brief: Annotated[bool, typer.Option("--stat", help="A line per module, with the numbers of operators.")] = False,
    full: Annotated[bool, typer.Option("--full", help="A line for each node, with its arguments.")] = False,
    page: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--html", metavar="FILE", help="Write a page with both sides (extra `report`)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two stages of dumps by module path: - only in A, + only in B, ~ reads something else."""
    if stage is not None and stage not in STAGES:
        raise typer.BadParameter(f"{stage!r} is none of {', '.join(STAGES)}", param_hint="--stage")
    with errors():
        differences = list(_compared(Path(a), Path(b), stage))
        if page is not None:
            _write(page, differences)
    if as_json:
        print(json.dumps([difference.to_dict() for difference in differences]))
    else:
        show("\n\n".join(stat(each) if brief else render(each, full) for each in differences))


def _compared(a: Path, b: Path, stage: str | None) -> Iterator[Comparison]:
    """All pairs; of one graph's stages those up to the first that differs, because the later ones follow from it."""
    for x, y in _graphs(a, b):
        for name in (stage,) if stage else STAGES:
            one, other = x if x.is_file() else x / f"{name}.json", y if y.is_file() else y / f"{name}.json"
            if x.is_dir() and y.is_dir() and not (one.exists() and other.exists()) and stage is None:
                continue
            difference = compare(_read(one), _read(other), (_name(one), _name(other)))
            yield difference
            if not difference.equal or x.is_file():
                break


def _graphs(a: Path, b: Path) -> Iterator[tuple[Path, Path]]:
    """The graphs of two dumps in pairs; graphs and stages as they are."""
    a, b = _found(a), _found(b)
    graphs_a, graphs_b = ({p.name: p for p in sorted(x.glob("graph_*")) if p.is_dir()} for x in (a, b))
    if not graphs_a and not graphs_b:
        if a.is_dir() != b.is_dir():
            raise TargetError(f"{a} and {b}: one is a stage, the other a folder.", "Name the stage on both sides.")
        yield a, b
        return
    if alone := sorted(graphs_a.keys() ^ graphs_b.keys()):
        raise TargetError(
            f"{a} and {b} do not hold the same graphs: {', '.join(alone)} is in one of them only.",
            f"Name two graphs: {a}/graph_0 {b}/graph_0.",
        )
    yield from ((path, graphs_b[name]) for name, path in graphs_a.items())


def _found(path: Path) -> Path:
    """The path itself, or a stage named without its ending."""
    file = path.with_name(f"{path.name}.json")
    if not path.exists() and not file.exists():
        raise TargetError(f"{path}: there is no such dump.", "Write one with `latent dump TARGET --out DIR`.")
    return path if path.exists() else file


def _read(path: Path) -> Stage:
    try:
        return Stage.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TargetError(f"{path}: there is no such file.", "Dump with --format json, or with all formats.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{path} cannot be read: {error}.", "Name a stage that `latent dump` wrote.") from error


def _name(path: Path) -> str:
    return str(path.with_suffix(""))


def _write(page: Path, differences: list[Comparison]) -> None:
    try:
        text = html(differences)
    except ImportError as error:
        raise TargetError(
            f"--html needs jinja2: {error}.", 'Install it with: pip install "torch-latent[report]"'
        ) from error
    if not page.absolute().parent.is_dir():
        raise TargetError(f"--html {page}: there is no folder {page.parent}.", "Make it, or name another.")
    page.write_text(text, encoding="utf-8")
