"""`latent explain`: every attention of a model, and for every rewrite whether and why."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from .common import (
    EXPECTATION,
    Dynamic,
    HFChoices,
    Json,
    Measure,
    Names,
    TargetOrDump,
    Verify,
    errors,
    import_torch,
    stdout_is_for_us,
    takes_choices,
)
from .console import err, show
from .looking import looked_at

__all__ = ["explain"]


@takes_choices
def explain(
    target: TargetOrDump,
    dynamic: Dynamic = False,
    rewrite: Names = None,
    verify: Annotated[Verify, typer.Option(help="Certify one of several identical sites, every site, or none.")] = (
        Verify.fast
    ),
    measure: Measure = False,
    expect: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="NAME=COUNT", help="Exit with 3 when there is less: attention=30, or a rewrite's name."),
    ] = None,
    site: Annotated[
        str, typer.Option(metavar="PATH", help="Show only modules below this path; * stands for anything.")
    ] = "",
    near: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Show only so many near misses, the nearest first, and no other softmax."),
    ] = None,
    *,
    choices: HFChoices,
    as_json: Json = False,
) -> None:
    """Show each attention of a model, and for each rewrite whether and why; nothing is changed."""
    counts = _counts(expect or [])
    with errors(), stdout_is_for_us():
        import_torch()
        from ..options import read_options

        read_options({"rewrites": rewrite or None, "expect": counts})  # said before the work, not after it
        material = looked_at(
            target,
            rewrites=rewrite or None,
            verify=verify.value,
            dynamic=dynamic,
            measure=measure,
            choices=choices,
            stages=False,
        )
    made = () if material.run.target == target else (f"a dump of {material.run.target}",)
    notes, short = [*made, *material.run.notes], material.report.shortfall(counts)
    result = material.report.only(site, near)
    if as_json:
        print(json.dumps({"target": target, "notes": notes, "unmet": short, **result.to_dict()}, default=str))
    else:
        show("\n".join([target, *(f"  {note}" for note in notes), "", str(result)]))
    if short:
        err().print("\n".join(f"expectation failed: {text}" for text in short), style="latent.bad", markup=False)
        raise typer.Exit(EXPECTATION)


def _counts(texts: list[str]) -> dict[str, int]:
    """attention=30 -> {"attention": 30}."""
    counts = {}
    for text in texts:
        name, equals, number = text.partition("=")
        if not (name and equals and number.isdigit()):
            raise typer.BadParameter(f"{text!r} is not of the form NAME=COUNT, as attention=30", param_hint="--expect")
        counts[name] = int(number)
    return counts
