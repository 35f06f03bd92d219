"""`latent bisect`: the application of a rewrite at which a model's output leaves eager's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Iterator
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..units import error_text, plural
from .common import (
    EXPECTATION,
    HFChoices,
    Json,
    Names,
    TargetText,
    Verify,
    errors,
    load,
    stdout_is_for_us,
    takes_choices,
)
from .console import progress, show, table

if TYPE_CHECKING:
    from ..bisect import Bisection, Step

__all__ = ["bisect"]


class Inner(str, Enum):
    """What compiles the rewritten graphs."""

    eager = "eager"
    inductor = "inductor"


@takes_choices
def bisect(
    context: typer.Context,
    target: TargetText,
    rewrite: Names = None,
    verify: Annotated[Verify, typer.Option(help="Certificates as in the run that went wrong.")] = Verify.fast,
    inner: Annotated[Inner, typer.Option(help="What runs the rewritten graphs; eager compiles at once.")] = Inner.eager,
    tolerance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="ERROR", help="Largest relative error; without it, what the outputs' dtype allows."),
    ] = None,
    fuel: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Only measure, with this many applications of rewrites."),
    ] = None,
    *,
    choices: HFChoices,
    as_json: Json = False,
) -> None:
    """Find the first application of a rewrite at which the model's output leaves eager's tolerance (exit code 3)."""
    with errors(), stdout_is_for_us():
        found = load(target, choices)
        import torch

        from .. import bisect as search
        from ..options import read_options

        options = read_options(
            {"rewrites": rewrite or None, "verify": verify.value, "inner": inner.value, "fuel": fuel}
        )
        with torch.no_grad():
            if fuel is None:
                result = search.bisect(found.model, found.args, found.kwargs, options, tolerance, _says)
            else:
                with _says(fuel):
                    result = search.probe(found.model, found.args, found.kwargs, options, tolerance)
    if as_json:
        print(json.dumps({"target": target, "culprit": result.culprit, **dataclasses.asdict(result)}, default=vars))
    else:
        show(f"{target} · tolerance {result.tolerance:.0e}\n")
        table([_HEAD, *map(partial(_row, result), result.steps)])
        show("\n" + "\n".join(_conclusion(result, _command(context))))
    if result.verdict != "good":
        raise typer.Exit(EXPECTATION)


def _says(fuel: int | None) -> contextlib.AbstractContextManager[None]:
    return progress("compiling with every rewrite" if fuel is None else f"compiling with fuel {fuel}")


_HEAD = ("fuel", "error", "")


def _row(result: Bisection, step: Step) -> tuple[str, str, str]:
    fuel = "all" if step.fuel is None else f"{step.fuel:>4}"
    return fuel, _error(step), "✓" if step.error <= result.tolerance else "✗"


def _error(step: Step) -> str:
    return "raises" if step.failure else error_text(step.error)


def _conclusion(result: Bisection, command: str) -> Iterator[str]:
    last = result.steps[-1]
    if result.verdict == "good":
        number = len(last.applications)
        yield f"the output stays within the tolerance with {plural(number, 'application')} of rewrites"
    elif result.verdict == "bad":
        yield f"the output leaves the tolerance with {plural(len(last.applications), 'application')} of rewrites"
        yield from ([f"  {last.failure}"] if last.failure else [])
    elif result.verdict == "elsewhere":
        yield "no rewrite is to blame: without any (fuel 0) the output leaves the tolerance as well"
        yield from ([f"  {last.failure}"] if last.failure else [])
        yield "  what differs from eager is then the capture or inductor; --inner eager leaves inductor out"
    elif (culprit := result.culprit) and result.good and result.bad:
        yield f"first bad application: number {result.bad.fuel}"
        yield f"  {culprit.rewrite} at {culprit.path or 'the model itself'}   {culprit.line}"
        yield f"    {culprit.equation}"
        yield f"  error {_error(result.good)} without it (fuel {result.good.fuel}), {_error(result.bad)} with it"
        yield from ([f"  {result.bad.failure}"] if result.bad.failure else [])
        if result.bad.error < 10 * result.good.error:
            yield "  the error grows in small steps: rounding that adds up looks so, and --tolerance allows more of it"
        yield f"  reproduce: {command} --fuel {result.bad.fuel}"


def _command(context: typer.Context) -> str:
    """The command as it was given."""
    words = ["latent", "bisect"]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params[str(parameter.name)]
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name == "as_json":
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [*parameter.opts[:1]] if parameter.param_type_name == "option" else []
            words += [] if one is True else [str(getattr(one, "value", one))]
    return shlex.join(words)
