"""The command `latent`. What needs torch is imported inside the commands, so that `latent --help` answers at once.

Exit codes: 0 fine, 1 error, 2 wrong usage, 3 an expectation failed.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from .bisect import bisect
from .common import (
    ERROR,
    FromConfig,
    HFChoices,
    Json,
    Phase,
    Spelling,
    SpellingChoice,
    TargetText,
    errors,
    in_a_folder,
    load,
    stdout_is_for_us,
)
from .console import progress, show, table
from .convert import SETTINGS as _OF_RECIPES
from .convert import convert
from .diff import diff
from .dump import dump
from .eval import evaluate
from .explain import explain
from .masks import masks
from .mlir import mlir
from .plan import plan
from .recipe_flags import recipes
from .report import report
from .rules import patterns, rewrites

__all__ = ["app"]

app = typer.Typer(
    help="Find every attention in a PyTorch model, see what can be rewritten, and why the rest cannot.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Contestant(str, Enum):
    """Who is timed."""

    eager = "eager"
    inductor = "inductor"
    latent = "latent"


class CacheKind(str, Enum):
    """Which of transformers' caches a decode step reads."""

    static = "static"
    dynamic = "dynamic"


def bench(
    target: TargetText,
    only: Annotated[
        Optional[list[Contestant]],  # noqa: UP045
        typer.Option("--only", help="Only this contestant; may be given several times. The first is the base."),
    ] = None,
    phase: Annotated[
        Optional[list[Phase]],  # noqa: UP045
        typer.Option("--phase", help="For language models: only this phase; may be given twice."),
    ] = None,
    cached: Annotated[int, typer.Option(min=2, help="How many tokens a decode step attends to.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens the prefill has.")] = 128,
    cache: Annotated[CacheKind, typer.Option(help="Which of transformers' caches a decode step reads.")] = (
        CacheKind.static
    ),
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="float32, bfloat16 or float16; without it, the target's own."),
    ] = None,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="How many threads torch computes with."),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="How many rounds; everyone has one turn in each.")] = 15,
    attention: SpellingChoice = None,
    from_config: FromConfig = False,
    as_json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="PATH", help="Write all numbers to this file; - is stdout, without the table."),
    ] = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--plot", metavar="PATH", help="Draw the times into this file (.png, .svg, .pdf)."),
    ] = None,
) -> None:
    """Time a model with eager, inductor and latent side by side: decode, prefill, memory, share of the roofline."""
    contestants = tuple(dict.fromkeys(c.value for c in only or Contestant))
    phases = tuple(dict.fromkeys(p.value for p in phase or (Phase.decode, Phase.prefill)))
    with errors(), stdout_is_for_us():
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the start and stop of torch's profiler are no news
        with progress("importing torch"):
            from .bench import BenchChoices
            from .bench import bench as measure
            from .bench_text import import_matplotlib, render
            from .bench_text import plot as draw

        if plot is not None:
            import_matplotlib()  # said before the work, not after it
        in_a_folder(as_json, "--json")
        in_a_folder(plot, "--plot")
        found = load(target, HFChoices(from_config, attention=attention.value if attention else None))
        found = replace(found, notes=tuple(note for note in found.notes if not note.startswith("one forward")))
        result = measure(
            target,
            found,
            BenchChoices(phases, contestants, tokens, cached, cache.value, dtype, threads, repeat),
        )
        numbers = json.dumps(result.to_dict(), indent=1)
        if as_json is not None and str(as_json) != "-":
            as_json.write_text(numbers + "\n", encoding="utf-8")
        if plot is not None:
            draw(result, plot)
    if as_json is not None and str(as_json) == "-":
        print(numbers)
    else:
        show(render(result))


def demo(
    tokens: Annotated[int, typer.Option(min=8, help="How many tokens to generate at most.")] = 48,
    attention: Annotated[Spelling, typer.Option(help="How the model spells its attention.")] = Spelling.eager,
    folder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Another causal language model with a tokenizer instead of SmolLM2."),
    ] = None,
) -> None:
    """Generate text with a real model (SmolLM2-135M-Instruct), eagerly and compiled, and compare."""
    with errors():
        from .demo import run_demo

        same = run_demo(tokens, attention.value, folder)
    raise typer.Exit(0 if same else ERROR)


def env(as_json: Json = False) -> None:
    """Print the versions that a bug report needs."""
    with errors():
        from ..environment import environment

        facts = environment()
    if as_json:
        print(json.dumps(facts))
    else:
        table(list(facts.items()), indent=0)


for command in (explain, report, dump, diff, masks, bench, bisect, mlir, env, demo):
    app.command()(command)
app.command(name="eval")(evaluate)
app.command(context_settings=_OF_RECIPES)(convert)
app.command()(recipes)
app.command()(plan)
app.add_typer(rewrites, name="rewrites")
app.add_typer(patterns, name="patterns")

if __name__ == "__main__":
    app()
