"""`latent rewrites` and `latent patterns`: list, show, test, new."""

from __future__ import annotations

import dataclasses
import difflib
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from .common import EXPECTATION, Json, errors, stdout_is_for_us
from .console import err, progress, show, table
from .scaffold import PATTERN, REWRITE, write_scaffold
from .targets import TargetError, import_file

if TYPE_CHECKING:
    from ..rule_facts import PatternFacts, RewriteFacts

__all__ = ["patterns", "rewrites"]

Named = TypeVar("Named", "RewriteFacts", "PatternFacts")

rewrites = typer.Typer(help="List the rewrites in the order in which they run.", invoke_without_command=True)
patterns = typer.Typer(help="List the patterns: what reads softmaxes, masks, projections.", invoke_without_command=True)

Which = Annotated[str, typer.Argument(metavar="NAME", help="A name from the list, or a FILE.py that registers some.")]
New = Annotated[str, typer.Argument(metavar="NAME", help="Its name, and that of its file.")]
Folder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write the two files.")]
WIDTH = 110

REWRITE_EXAMPLE = 'Give its class examples = ((function, dict(q="B H S D", k="B H T D", v="B H T E")),).'
PATTERN_EXAMPLE = 'Register it with examples=((function, dict(q="B H S D", k="B H T D", v="B H T E")),).'


@rewrites.callback()
def list_rewrites(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is not None:
        return
    with errors():
        found = _rewrites()
    if as_json:
        print(json.dumps([_row(facts) for facts in found]))
    else:
        table([(f"{n}", f.name, _class(f), f.equation) for n, f in enumerate(found, 1)], indent=0)


@rewrites.command("show")
def show_rewrite(name: Which, as_json: Json = False) -> None:
    """What it does, when it refuses, what it matches, where it is written, and what runs before it."""
    with errors(), stdout_is_for_us():
        chosen = _chosen(name, _rewrites)
    if as_json:
        print(json.dumps([dataclasses.asdict(facts) for facts in chosen]))
    else:
        show("\n\n".join("\n".join(_rewrite_text(facts)) for facts in chosen))


@rewrites.command("test")
def test_rewrite(name: Which, as_json: Json = False) -> None:
    """Check it on its own examples: random sizes, certificates, gradients, symbolic shapes (exit code 3 if wrong)."""
    with errors(), stdout_is_for_us():
        chosen = _chosen(name, _rewrites)
        from ..custom.testing import check_rewrite

        rows = _checked(chosen, check_rewrite, REWRITE_EXAMPLE)
    _show_checked(rows, as_json)


@rewrites.command("new")
def new_rewrite(name: New, out: Folder = Path()) -> None:
    """Write a rewrite that works as it stands, and its test; nothing is overwritten."""
    with errors():
        files = write_scaffold(REWRITE, name, out, [facts.name for facts in _rewrites()])
    _show_written(files)


@patterns.callback()
def list_patterns(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is not None:
        return
    with errors():
        found = _patterns()
    if as_json:
        print(json.dumps([{"name": f.name, "kind": f.kind, "equation": f.equation} for f in found]))
        return
    for kind in dict.fromkeys(facts.kind for facts in found):
        same = [facts for facts in found if facts.kind == kind]
        show(f"{kind}   {same[0].reads}")
        table([(facts.name, facts.equation) for facts in same])


@patterns.command("show")
def show_pattern(name: Which, as_json: Json = False) -> None:
    """What it reads, where it is written, and its source."""
    with errors(), stdout_is_for_us():
        chosen = _chosen(name, _patterns)
    if as_json:
        print(json.dumps([dataclasses.asdict(facts) for facts in chosen]))
    else:
        show("\n\n".join("\n".join(_pattern_text(facts)) for facts in chosen))


@patterns.command("test")
def test_pattern(name: Which, as_json: Json = False) -> None:
    """Check it on its own examples: what is found without it and with it, and certificates (exit code 3 if wrong)."""
    with errors(), stdout_is_for_us():
        chosen = _chosen(name, _patterns)
        from ..custom.testing import check_pattern

        rows = _checked(chosen, check_pattern, PATTERN_EXAMPLE)
    _show_checked(rows, as_json)


@patterns.command("new")
def new_pattern(name: New, out: Folder = Path()) -> None:
    """Write a pattern that works as it stands, and its test; nothing is overwritten."""
    with errors():
        files = write_scaffold(PATTERN, name, out, [facts.name for facts in _patterns()])
    _show_written(files)


def _rewrites() -> list[RewriteFacts]:
    from ..rule_facts import rewrite_facts

    return rewrite_facts()


def _patterns() -> list[PatternFacts]:
    from ..rule_facts import pattern_facts

    return pattern_facts()


def _chosen(name: str, every: Callable[[], list[Named]]) -> list[Named]:
    """What has this name, or is written in this file. Raises TargetError."""
    if name.endswith(".py"):
        import_file(Path(name))
        written = Path(name).resolve()
        found = [facts for facts in every() if Path(facts.defined.rpartition(":")[0]).resolve() == written]
        if not found:
            raise TargetError(f"{name}: importing it registers none.", "It needs @latent.rewrite or @latent.pattern.")
        return found
    known = every()
    found = [facts for facts in known if facts.name == name]
    if not found:
        names = [facts.name for facts in known]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(names)}."
        raise TargetError(f"nothing is named {name!r}.", hint)
    return found


def _checked(chosen: Sequence[Named], check: Callable[[str], object], example: str) -> list[tuple[str, bool, str]]:
    """For each its name, whether it holds on its examples, and the report. Raises TargetError where there is none."""
    rows = []
    for facts in chosen:
        if not facts.examples:
            raise TargetError(f"{facts.name} declares no example.", example)
        try:
            with progress(f"checking {facts.name}"):
                rows.append((facts.name, True, str(check(facts.name))))
        except AssertionError as error:  # what a check says is wrong
            rows.append((facts.name, False, str(error)))
    return rows


def _show_checked(rows: Sequence[tuple[str, bool, str]], as_json: bool) -> None:
    """Print what was checked. Exits with 3 where something is wrong."""
    if as_json:
        print(json.dumps([{"name": name, "holds": holds, "report": said} for name, holds, said in rows]))
    else:
        show("\n".join(f"{'✓' if holds else '✗'} {said}" for _, holds, said in rows))
    if wrong := [name for name, holds, _ in rows if not holds]:
        err().print(f"expectation failed: {', '.join(wrong)}", style="latent.bad", markup=False)
        raise typer.Exit(EXPECTATION)


def _show_written(files: tuple[Path, Path]) -> None:
    show("\n".join(f"wrote {file}" for file in files))
    show(f"run it with: pytest {files[1]}")


def _row(facts: RewriteFacts) -> dict[str, object]:
    return {"name": facts.name, "class": _class(facts), "equation": facts.equation, "after": facts.before}


def _class(facts: RewriteFacts) -> str:
    return "exact" if facts.exact else "lossy"


def _rewrite_text(facts: RewriteFacts) -> Iterator[str]:
    place = len(facts.before) + 1
    yield f"{facts.name}   {_class(facts)}   {place} of {place + len(facts.after)}"
    yield f"  {facts.equation}"
    yield from (f"  {line}".rstrip() for line in ("", *facts.more.splitlines()) if facts.more)
    yield ""
    yield from _entry("defined", [facts.defined])
    yield from _entry("runs after", [", ".join(facts.before) or "nothing"])
    yield from _entry("runs before", [", ".join(facts.after) or "nothing"])
    yield from _entry("matches", facts.examples or ["no example is declared"])
    yield from _entry("for sizes", [f"{name} from {low} to {high}" for name, (low, high) in facts.sizes.items()])
    yield from _entry("refuses", facts.conditions or ["nothing that its source spells out"])


def _pattern_text(facts: PatternFacts) -> Iterator[str]:
    yield f"{facts.name}   {facts.kind}"
    yield f"  {facts.equation}"
    yield from (f"  {line}".rstrip() for line in ("", *facts.more.splitlines()) if facts.more)
    yield ""
    yield from _entry("reads", [facts.reads])
    yield from _entry("defined", [facts.defined])
    yield from _entry("examples", facts.examples or ["none is declared"])
    yield ""
    yield from (f"  {line}".rstrip() for line in facts.source.splitlines())


def _entry(title: str, texts: Sequence[str]) -> Iterator[str]:
    """A title and what belongs to it, aligned."""
    for n, text in enumerate(texts):
        start = f"  {title if n == 0 else '':<13}"
        yield from textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * (len(start) + 2))
