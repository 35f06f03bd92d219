"""What the command line prints with: colours where a terminal has them, progress on stderr, plain text when piped."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.theme import Theme

__all__ = ["aligned", "counted", "err", "out", "progress", "show", "table"]

THEME = Theme(
    {
        "latent.head": "bold",
        "latent.rule": "dim",
        "latent.good": "green",
        "latent.bad": "bold red",
        "latent.quiet": "dim",
        "latent.miss": "yellow",
        "latent.place": "cyan",
        "latent.times": "bold",
    }
)


class ReportHighlighter(RegexHighlighter):
    """Colours for the text of a report, found by its marks."""

    base_style = "latent."
    highlights = (
        r"(?m)^(?P<head>graph \d+ \[.*|attention   .*|rewrites.*|lowered.*|other softmax.*)$",
        r"(?m)^(?P<rule>─+)$",
        r"(?m)^ *(?P<good>✓ \S+ +applied)",
        r"(?m)^ *(?P<bad>✗ .*)$",
        r"(?m)^ *(?P<quiet>[–·] .*)$",
        r"(?m)^(?P<miss>near miss.*|  graph break.*)$",
        r"(?m)^ *(?P<miss>→ .*)$",
        r"   (?P<place>[\w./-]+\.py:\d+)",
        r"(?P<times>× \d+)$",
    )


def out() -> Console:
    """Standard output as it is now."""
    return _console(sys.stdout)


def err() -> Console:
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    if hasattr(stream, "reconfigure"):
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors="replace")  # a terminal that cannot write × or ✓ still gets the rest
    return Console(file=stream, theme=THEME, highlight=False, soft_wrap=True)


def show(text: str) -> None:
    """A report or a piece of one."""
    console = out()
    console.print(ReportHighlighter()(text) if console.is_terminal else text, markup=False)


def table(rows: Sequence[tuple[str, ...]], indent: int = 2) -> None:
    """Left-aligned columns, three spaces apart."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))] if rows else []
    for row in rows:
        show(" " * indent + "   ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())


def aligned(rows: Sequence[tuple[str, ...]], indent: int = 2) -> list[str]:
    """A line for each row: names on the left, numbers right-aligned below their heads."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for name, *numbers in rows:
        cells = [f"{name:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(numbers, widths[1:], strict=True))]
        lines.append(" " * indent + "   ".join(cells).rstrip())
    return lines


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Says on stderr what is going on: a spinner in a terminal, else one line with the time it took."""
    console, start = err(), time.perf_counter()
    spinner = console.status(f"{what} …") if console.is_terminal else contextlib.nullcontext()
    with spinner:
        yield
    console.print(f"{what} … {time.perf_counter() - start:.1f} s", style="latent.quiet", markup=False)


@contextlib.contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr that the caller moves on by one; without a terminal, one line with the time it took."""
    console, start = err(), time.perf_counter()
    if console.is_terminal:
        columns = (TextColumn("{task.description} …"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
    else:
        yield lambda: None
    console.print(f"{what} … {time.perf_counter() - start:.1f} s", style="latent.quiet", markup=False)
