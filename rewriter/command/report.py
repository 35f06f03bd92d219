"""`latent report`: what was found and done, as one HTML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Dynamic,
    HFChoices,
    Json,
    Measure,
    Names,
    TargetOrDump,
    errors,
    import_torch,
    in_a_folder,
    stdout_is_for_us,
    takes_choices,
)
from .console import show
from .looking import looked_at
from .targets import TargetError

__all__ = ["report"]


@takes_choices
def report(
    target: TargetOrDump,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page.")] = Path("latent.html"),
    dynamic: Dynamic = False,
    rewrite: Names = None,
    measure: Measure = False,
    *,
    choices: HFChoices,
    as_json: Json = False,
) -> None:
    """Write an HTML file that shows everything about one call of a model; it loads nothing, and can be mailed."""
    with errors(), stdout_is_for_us():
        in_a_folder(out)
        import_torch()
        from ..page.render import MissingJinja, require_jinja, write

        try:
            require_jinja()  # said before the work, not after it
        except MissingJinja as error:
            raise TargetError("a page needs jinja2.", str(error)) from error
        material = looked_at(
            target,
            rewrites=rewrite or None,
            dynamic=dynamic,
            measure=measure,
            choices=choices,
            stages=True,
        )
        try:
            size = write(material, out)
        except OSError as error:
            raise TargetError(f"--out {out}: {error.strerror}.", "Name a file that can be written.") from error
    if as_json:
        print(json.dumps({"target": target, "out": str(out), "bytes": size}))
    else:
        show(f"{out}   {size / 1000:.0f} kB, opens in any browser")
