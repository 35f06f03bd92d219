"""What the commands share: choices, exit codes, and errors in words.

Exit codes: 0 fine, 1 error, 2 wrong usage, 3 an expectation failed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, NoReturn, Optional

import typer

from .console import err, progress
from .targets import HFChoices, Target, load_target

__all__ = [
    "ERROR",
    "EXPECTATION",
    "USAGE",
    "FromConfig",
    "Json",
    "Names",
    "Phase",
    "PhaseChoice",
    "Spelling",
    "SpellingChoice",
    "TargetText",
    "Tokens",
    "Verify",
    "errors",
    "load",
    "stdout_is_for_us",
    "stop",
]

ERROR, USAGE, EXPECTATION = 1, 2, 3
IN_WORDS = (
    "TargetError",
    "DemoError",
    "BisectionError",
    "MlirError",
    "TextError",
    "ConversionError",
    "ConversionRefused",
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


def load(target: str, from_config: bool, phase: Phase, tokens: int, attention: Spelling | None) -> Target:
    """TARGET as the options of a command choose it. Raises TargetError."""
    with progress("importing torch"):
        import torch  # noqa: F401
    with progress(f"loading {target}"):
        return load_target(target, HFChoices(from_config, phase.value, tokens, attention.value if attention else None))


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
