"""`latent convert`: change a model by recipes, measure what that cost, and write it with a card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import EXPECTATION, USAGE, Json, errors, stdout_is_for_us, stop
from .console import counted, err, progress, show
from .eval import load_model, load_tokenizer
from .recipe_flags import parse_recipes
from .targets import TargetError

__all__ = ["SETTINGS", "convert"]

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""The flags of recipes are not known before the recipes are."""


def convert(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A Hugging Face folder, or FILE.py:FACTORY.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045  # typer reads it while running, on Python 3.10 too
        typer.Option("--out", "-o", metavar="DIR", help="Where to write the model; a folder that is not there yet."),
    ] = None,
    recipe: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--recipe", metavar="NAME", help="What to do; several are applied in order. See latent recipes."),
    ] = None,
    text: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--text", metavar="FILE|pkg:NAME", help="Calibrate on one half, score the other. Else pkg:pydoc."),
    ] = None,
    other: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--other", metavar="FILE|pkg:NAME", help="Score a text never calibrated on. Else pkg:stdlib."),
    ] = None,
    windows: Annotated[int, typer.Option("--calibration-windows", min=1, help="Windows to calibrate on.")] = 48,
    tokens: Annotated[int, typer.Option(min=0, help="Scored tokens of each text; 0: no perplexity.")] = 4096,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 512,
    limit: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--max-ppl-increase",
            metavar="PERCENT",
            help="If any text gets worse by more: exit with 3, write nothing.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the windows.")] = 0,
    tokenizer: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--tokenizer", metavar="DIR", help="A folder with the tokenizer, if TARGET has none."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Convert and show the layers; score and write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Change a model by recipes, compare it with the original, and write it with a card; the original stays.

    Each recipe has flags of its own, which `latent recipes NAME` shows: --recipe joint_latent --share 0.5.
    """
    allowed = _share(limit)
    if target.startswith("--"):
        stop(f"{target} stands where TARGET is expected.\nTARGET comes first, before the flags of recipes.", USAGE)
    if out is None and not dry_run:
        stop("there is nowhere to write to.\nName a folder with -o DIR, or look only with --dry-run.", USAGE)
    if allowed is not None and tokens == 0:
        stop("--max-ppl-increase needs perplexities.\nLeave out --tokens 0.", USAGE)
    with errors(), stdout_is_for_us():
        if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise TargetError(f"{out}: it is there already.", "Nothing is overwritten; name another folder.")
        with progress("importing torch"):
            asked = parse_recipes(recipe or [], context.args)
            from ..evaluate.texts import DEFAULT_TEXTS, read_text
            from .conversion import Request, carry_out, draw, write
            from .convert_card import card, summary
        learnt = [read_text(name) for name in dict.fromkeys(text or DEFAULT_TEXTS[:1])]
        names = {one.name for one in learnt}
        unseen = [read_text(name) for name in dict.fromkeys(other or DEFAULT_TEXTS[1:]) if name not in names]
        folder = tokenizer or (Path(target) if Path(target).is_dir() else None)
        request = Request(target, tuple(asked), tuple(learnt), tuple(unseen), windows, tokens, length, seed, dry_run)
        model, reader = load_model(target), load_tokenizer(folder)
        with progress(f"reading {', '.join(one.name for one in (*learnt, *unseen))}"):
            drawn = draw(request, reader)
        made, done = carry_out(request, model, drawn, counted)
        gains = {name: score.increase for name, score in done.scores.items()}
        worse = {name: more for name, more in gains.items() if allowed is not None and not more <= allowed}
        written = out is not None and not dry_run and not worse
        if out is not None and written:
            with progress(f"writing {out} and loading it again"):
                write(made, reader, lambda check: card(done, out, check), out, drawn.row)
    if as_json:
        print(json.dumps(done.to_dict() | {"written": str(out) if written else None}))
    else:
        show(summary(done) + (f"\n\nwrote {out}: loaded again, it gives the same logits and tokens" if written else ""))
    for name, increase in worse.items():
        said = f"expectation failed: perplexity on {name} {increase:+.1%}, allowed {limit}; nothing was written"
        err().print(said, style="latent.bad", markup=False)
    if worse:
        raise typer.Exit(EXPECTATION)


def _share(limit: str | None) -> float | None:
    """5 %, 5% or 0.05."""
    if limit is None:
        return None
    found = re.fullmatch(r"([0-9.]+)\s*(%?)", limit.strip())
    if found is None:
        stop(f"--max-ppl-increase {limit}: this is no percentage.\nWrite 5% or 0.05.", USAGE)
    return float(found[1]) / (100 if found[2] else 1)
