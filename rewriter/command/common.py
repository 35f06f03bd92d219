"""What the commands share: choices, exit codes, and errors in words.

Exit codes: 0 fine, 1 error, 2 wrong usage, 3 an expectation failed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from .console import err, progress
from .targets import HFChoices, Target, TargetError, load_target

__all__ = [
    "ERROR",
    "EXPECTATION",
    "USAGE",
    "Dynamic",
    "FromConfig",
    "HFChoices",
    "Json",
    "Measure",
    "Names",
    "Phase",
    "PhaseChoice",
    "Spelling",
    "SpellingChoice",
    "TargetOrDump",
    "TargetText",
    "Verify",
    "errors",
    "import_torch",
    "in_a_folder",
    "load",
    "stdout_is_for_us",
    "stop",
    "takes_choices",
]

ERROR, USAGE, EXPECTATION = 1, 2, 3
IN_WORDS = (
    *("TargetError", "DemoError", "BisectionError", "MlirError", "TextError", "PlanError"),
    *("ConversionError", "ConversionRefused"),
)
"""Exceptions whose text says all; by name, because their modules import torch."""


class Verify(str, Enum):
    """How many of several identical sites are certified."""

    fast = "fast"
    full = "full"
    off = "off"


class Phase(str, Enum):
    """Which call of a language model is looked at."""

    prefill = "prefill"
    decode = "decode"


class Spelling(str, Enum):
    """How transformers spells attention."""

    eager = "eager"
    sdpa = "sdpa"


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
TargetText = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A Hugging Face folder, or FILE.py:FACTORY whose factory returns (model, args, kwargs).",
    ),
]
TargetOrDump = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="A Hugging Face folder, FILE.py:FACTORY, or a folder of `latent dump`."),
]
Dynamic = Annotated[bool, typer.Option("--dynamic", help="Trace with dynamic shapes.")]
Measure = Annotated[
    bool, typer.Option("--measure", help="Time what each rewrite replaces and what replaces it, both compiled.")
]
PhaseChoice = Annotated[Phase, typer.Option("--phase", help="For folders: the first forward, or the next token's.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="For folders: how many tokens the prefill has.")]
SpellingChoice = Annotated[
    Optional[Spelling],  # noqa: UP045  # typer reads it while running, on Python 3.10 too
    typer.Option("--attention", help="For folders: how the attention is spelled; without it, as the folder says."),
]
FromConfig = Annotated[bool, typer.Option("--from-config", help="For folders: random weights.")]
Names = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--rewrite", metavar="NAME", help="Only this rewrite; may be given several times."),
]


def import_torch() -> None:
    """Once, and saying so: it takes seconds."""
    if "torch" not in sys.modules:
        with progress("importing torch"):
            import torch  # noqa: F401


def load(target: str, choices: HFChoices) -> Target:
    """TARGET as the options of a command choose it. Raises TargetError."""
    import_torch()
    with progress(f"loading {target}"):
        return load_target(target, choices)


def takes_choices(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes `choices` the options that make them: how a Hugging Face folder is called.

    typer reads options off a signature; this writes one, so that the four stand in one place and not in every command.
    """

    def options(
        phase: PhaseChoice = Phase.prefill,
        tokens: Tokens = HFChoices.tokens,
        attention: SpellingChoice = None,
        from_config: FromConfig = False,
    ) -> HFChoices:
        return HFChoices(from_config, phase.value, tokens, attention.value if attention else None)

    added = inspect.signature(options, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(choices=options(**{name: given.pop(name) for name in added}), **given)

    parameters: list[inspect.Parameter] = []
    for name, own in inspect.signature(command, eval_str=True).parameters.items():
        parameters += added.values() if name == "choices" else [own]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return run


def in_a_folder(file: Path | None, option: str = "--out") -> None:
    """Raises TargetError unless a file that an option names can be made: said before the work, not after it."""
    if file is not None and not file.absolute().parent.is_dir():
        raise TargetError(f"{option} {file}: there is no folder {file.parent}.", "Make it, or name another.")


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Errors in words, with their exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        raise
    except Exception as error:
        kind = type(error).__name__
        if kind == "OptionError":
            stop(str(error), USAGE)
        stop(str(error) if kind in IN_WORDS else f"{kind}: {error}", ERROR)


def stop(text: str, code: int) -> NoReturn:
    first, *rest = text.splitlines() or ["unknown error"]
    console = err()
    console.print(f"error: {first}", style="latent.bad", markup=False)
    for line in rest:
        console.print(f"  {line}", markup=False)
    raise typer.Exit(code)


@contextlib.contextmanager
def stdout_is_for_us() -> Iterator[None]:
    """What models and libraries print goes to stderr, so that stdout holds the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
