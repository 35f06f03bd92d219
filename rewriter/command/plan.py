"""`latent plan`: which tokens each head may forget, found on text and written as YAML for a person to edit."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .common import Json, errors, in_a_folder, stdout_is_for_us
from .console import aligned, counted, progress, show
from .eval import load_model, load_tokenizer

if TYPE_CHECKING:
    from ..convert.spans.allocation import Allocation

__all__ = ["plan"]


class Measure(str, Enum):
    influence = "influence"
    mass = "mass"


def plan(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A Hugging Face folder, or FILE.py:FACTORY.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.yaml", help="Where to write the plan.")],
    density: Annotated[
        Optional[list[float]],  # noqa: UP045  # typer reads it while running, on Python 3.10 too
        typer.Option(help="Share of the tokens that heads cache; several show what each costs, the first is written."),
    ] = None,
    lengths: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option("--at", metavar="TOKENS", help="Lengths at which the budget holds. Else that of the windows."),
    ] = None,
    measure: Annotated[Measure, typer.Option(help="What a head loses: by gradients, or by its attention.")] = (
        Measure.influence
    ),
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that every head keeps.")] = 4,
    classes: Annotated[int, typer.Option(min=0, help="Most kinds of spans in a layer; 0: no limit.")] = 2,
    text: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--text", metavar="FILE|pkg:NAME", help="Learn from one half of it. Else pkg:pydoc."),
    ] = None,
    windows: Annotated[int, typer.Option("--calibration-windows", min=1, help="Windows to learn from.")] = 8,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 512,
    seed: Annotated[int, typer.Option(help="Draws the windows.")] = 0,
    tokenizer: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--tokenizer", metavar="DIR", help="A folder with the tokenizer, if TARGET has none."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose a span for every key head, so that the heads of a cache hold no more than a share of the tokens."""
    with errors(), stdout_is_for_us():
        in_a_folder(out)
        with progress("importing torch"):
            from ..convert.calibrate import Calibration
            from ..convert.read_decoder import read_decoder
            from ..convert.spans.search import search
            from ..evaluate.texts import DEFAULT_TEXTS, calibration_tokens, read_text
            from .conversion import bars
        texts = [read_text(name) for name in dict.fromkeys(text or DEFAULT_TEXTS[:1])]
        model = load_model(target)
        reader = load_tokenizer(tokenizer or (Path(target) if Path(target).is_dir() else None))
        with progress("reading the model's attentions"):
            decoder = read_decoder(model)
        tokens = calibration_tokens(reader, texts, windows, length, seed)
        wanted = density or [0.5]
        with bars(counted) as tell:
            calibration = Calibration(model, tokens, batch=1, progress=tell)
            found = search(
                decoder, calibration, wanted, measure=measure.value, sinks=sinks, classes=classes, lengths=lengths or ()
            )
        chosen = [one for one in found if max(one.density.values()) <= wanted[0] + 1e-9][-1]
        chosen.plan.save(out)
    if as_json:
        rows = [{"density": one.density, "cost": one.cost, "gap": one.gap} for one in found]
        print(json.dumps({"written": str(out), "plans": rows, "plan": chosen.plan.to_yaml()}))
        return
    heads = sum(layer.groups for layer in decoder.layers)
    show(
        f"{len(decoder.layers)} layers · {heads} key heads · {measure.value} on {windows} × {length} tokens\n\n"
        + "\n".join(_table(found, chosen))
        + f"\n\nwrote {out}\n  draw it:  latent masks {out}\n"
        f"  apply it: latent convert {target} -o DIR --recipe head_spans --plan {out}"
    )


def _table(found: list[Allocation], chosen: Allocation) -> list[str]:
    """A line for each plan: what it caches at each length, and what it loses beside the dearest of them."""
    most = max(one.cost for one in found) or 1.0
    lengths = list(found[0].density)
    rows = [("", *(f"cached of {n}" for n in lengths), "mean span", "loses", "")]
    for one in found:
        shares = (f"{share:.1%}" for share in one.density.values())
        span = one.plan.mean_span(lengths[-1])
        written = "written" if one is chosen else ""
        rows.append(("", *shares, f"{span:.0f} tokens", f"{one.cost / most:.0%}", written))
    return aligned(rows, indent=0)
