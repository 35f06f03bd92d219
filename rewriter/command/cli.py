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
from .common import ERROR, EXPECTATION, Json, Phase, Spelling, Verify
from .common import errors as _errors
from .common import stdout_is_for_us as _stdout_is_for_us
from .console import err, progress, show, table
from .convert import SETTINGS as _OF_RECIPES
from .convert import convert
from .diff import diff
from .dump import dump
from .eval import evaluate
from .masks import masks
from .mlir import mlir
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
app.command()(dump)
app.command()(diff)
app.command()(report)
app.command()(bisect)
app.command()(masks)
app.command()(mlir)
app.command(name="eval")(evaluate)
app.command(context_settings=_OF_RECIPES)(convert)
app.command()(recipes)
app.add_typer(rewrites, name="rewrites")
app.add_typer(patterns, name="patterns")


class Contestant(str, Enum):
    """Who is timed."""

    eager = "eager"
    inductor = "inductor"
    latent = "latent"


class CacheKind(str, Enum):
    """Which of transformers' caches a decode step reads."""

    static = "static"
    dynamic = "dynamic"


@app.command()
def explain(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A Hugging Face folder, or FILE.py:FACTORY whose factory returns (model, args, kwargs).",
        ),
    ],
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Trace with dynamic shapes.")] = False,
    rewrite: Annotated[
        Optional[list[str]],  # noqa: UP045  # typer reads it while running, on Python 3.10 too
        typer.Option("--rewrite", metavar="NAME", help="Only this rewrite; may be given several times."),
    ] = None,
    verify: Annotated[Verify, typer.Option(help="Certify one of several identical sites, every site, or none.")] = (
        Verify.fast
    ),
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
    phase: Annotated[Phase, typer.Option(help="For folders: the first forward, or the one for the next token.")] = (
        Phase.prefill
    ),
    tokens: Annotated[int, typer.Option(min=1, help="For folders: how many tokens the prefill has.")] = 32,
    attention: Annotated[
        Optional[Spelling],  # noqa: UP045
        typer.Option(help="For folders: how the attention is spelled; without it, as the folder says."),
    ] = None,
    from_config: Annotated[bool, typer.Option("--from-config", help="For folders: random weights.")] = False,
    as_json: Json = False,
) -> None:
    """Show each attention of a model, and for each rewrite whether and why; nothing is changed."""
    counts = _counts(expect or [])
    with _errors(), _stdout_is_for_us():
        with progress("importing torch"):
            import torch

            from ..explain import explain as look
            from ..options import read_options
            from .targets import HFChoices, load_target

            read_options({"rewrites": rewrite or None, "expect": counts})
        choices = HFChoices(from_config, phase.value, tokens, attention.value if attention else None)
        with progress(f"loading {target}"):
            found = load_target(target, choices)
        with progress("tracing and recognising"), torch.no_grad():
            run = look(found.model, rewrites=rewrite or None, verify=verify.value, dynamic=dynamic or None)
            result = run(*found.args, **found.kwargs)
    short, result = result.shortfall(counts), result.only(site, near)
    if as_json:
        print(json.dumps({"target": target, "notes": found.notes, "unmet": short, **result.to_dict()}, default=str))
    else:
        show("\n".join([target, *(f"  {note}" for note in found.notes), "", str(result)]))
    if short:
        err().print("\n".join(f"expectation failed: {text}" for text in short), style="latent.bad", markup=False)
        raise typer.Exit(EXPECTATION)


@app.command()
def bench(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A Hugging Face folder, or FILE.py:FACTORY whose factory returns (model, args, kwargs).",
        ),
    ],
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
    attention: Annotated[
        Optional[Spelling],  # noqa: UP045
        typer.Option(help="For folders: how the attention is spelled; without it, as the folder says."),
    ] = None,
    from_config: Annotated[bool, typer.Option("--from-config", help="For folders: random weights.")] = False,
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
    with _errors(), _stdout_is_for_us():
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the start and stop of torch's profiler are no news
        with progress("importing torch"):
            from .bench import BenchChoices
            from .bench import bench as measure
            from .bench_text import import_matplotlib, render
            from .bench_text import plot as draw
            from .targets import HFChoices, TargetError, load_target

        if plot is not None:
            import_matplotlib()  # said before the work, not after it
        for option, file in (("--json", as_json), ("--plot", plot)):
            if file is not None and not file.absolute().parent.is_dir():
                raise TargetError(f"{option} {file}: there is no folder {file.parent}.", "Make it, or name another.")
        choices = HFChoices(from_config, "prefill", attention=attention.value if attention else None)
        with progress(f"loading {target}"):
            found = load_target(target, choices)
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


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=8, help="How many tokens to generate at most.")] = 48,
    attention: Annotated[Spelling, typer.Option(help="How the model spells its attention.")] = Spelling.eager,
    folder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Another causal language model with a tokenizer instead of SmolLM2."),
    ] = None,
) -> None:
    """Generate text with a real model (SmolLM2-135M-Instruct), eagerly and compiled, and compare."""
    with _errors():
        from .demo import run_demo

        same = run_demo(tokens, attention.value, folder)
    raise typer.Exit(0 if same else ERROR)


@app.command()
def env(as_json: Json = False) -> None:
    """Print the versions that a bug report needs."""
    with _errors():
        from ..environment import environment

        facts = environment()
    if as_json:
        print(json.dumps(facts))
    else:
        table(list(facts.items()), indent=0)


def _counts(texts: list[str]) -> dict[str, int]:
    """attention=30 -> {"attention": 30}."""
    counts = {}
    for text in texts:
        name, equals, number = text.partition("=")
        if not (name and equals and number.isdigit()):
            raise typer.BadParameter(f"{text!r} is not of the form NAME=COUNT, as attention=30", param_hint="--expect")
        counts[name] = int(number)
    return counts


if __name__ == "__main__":
    app()
