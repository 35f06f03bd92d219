"""A comparison as text: by module path, identical layers once."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from ..report_text import WIDTH, collapse
from .compare import Comparison, Line, ModuleDiff

__all__ = ["render", "stat"]

SHOWN = 12
"""Inputs that are listed, at most."""


def render(difference: Comparison, full: bool = False) -> str:
    """Every difference: - only in the first, + only in the second, ~ in both, reading something else.

    Operators with the types of their results, in the order of the graph; with `full` a line for each, with arguments.
    """
    lines = [_head(difference)]
    for module in difference.modules:
        changes = (f"  {text}" for line in module.changes for text in _texts(line)) if full else _flow(module)
        lines += ["", _place(module), *changes]
    return "\n".join([*lines, *_inputs(difference), "", _same(difference)])


def stat(difference: Comparison) -> str:
    """A line per module: the operators that went and came, with their numbers."""
    places = [_place(module) for module in difference.modules]
    width = max(map(len, places), default=0)
    lines = [_head(difference)]
    for place, module in zip(places, difference.modules, strict=True):
        parts = [f"{sign} {_counted(counts)}" for sign in "-+~" if (counts := module.counts(sign))]  # type: ignore[arg-type]
        lines += [f"{place if n == 0 else '':<{width}}   {part}" for n, part in enumerate(parts)]
    return "\n".join([*lines, *_inputs(difference), _same(difference)])


def _head(difference: Comparison) -> str:
    return f"- {difference.names[0]}\n+ {difference.names[1]}"


def _place(module: ModuleDiff) -> str:
    return collapse(list(module.paths)) or "the model itself"


def _flow(module: ModuleDiff) -> Iterator[str]:
    for sign, run in groupby(module.changes, lambda line: line.sign):
        lines = list(run)
        if sign == "~":
            for same, group in groupby(lines, lambda line: (_short(line), line.note)):
                yield from _hanging("  ~ ", f"{_times(same[0], len(list(group)))}   {same[1]}")
            continue
        steps = [_times(text, len(list(group))) for text, group in groupby(lines, _short)]
        whole = "\N{NO-BREAK SPACE}· ".join(
            step.replace(" ", "\N{NO-BREAK SPACE}") for step in steps
        )  # lines break between steps
        yield from (text.replace("\N{NO-BREAK SPACE}", " ") for text in _hanging(f"  {sign} ", whole))
        if rewrites := list(dict.fromkeys(line.note for line in lines if line.note)):
            yield from _hanging("    ", f"by {', '.join(rewrites)}")


def _hanging(start: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


def _short(line: Line) -> str:
    node = line.after or line.before
    return f"{node.operator} {node.type}" if node else ""


def _times(text: str, number: int) -> str:
    return text if number == 1 else f"{text} × {number}"


def _texts(line: Line) -> Iterator[str]:
    if line.sign == "~":
        yield f"~ {line.text_after}   {line.note}"
    else:
        text = line.text_before or line.text_after
        yield f"{line.sign} {text}" + (f"   {line.note}" if line.note else "")


def _inputs(difference: Comparison) -> Iterator[str]:
    if difference.inputs:
        yield ""
        yield "inputs"
    for line in difference.inputs[:SHOWN]:
        yield f"  {line.sign} " + " → ".join(filter(None, (line.text_before, line.text_after)))
    if len(difference.inputs) > SHOWN:
        yield f"  and {len(difference.inputs) - SHOWN} more"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(name if number == 1 else f"{name} × {number}" for name, number in counts.items())


def _same(difference: Comparison) -> str:
    modules = sum(len(module.paths) for module in difference.modules)
    if difference.equal:
        return f"no difference in {difference.same} modules"
    return f"{modules} {'module differs' if modules == 1 else 'modules differ'}, {difference.same} the same"
