"""What there is to know about a registered rewrite or pattern without running it, read from its own source."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .registry import KINDS, Examples, RewriteEntry, examples_of, patterns, rewrites

__all__ = ["PatternFacts", "RewriteFacts", "pattern_facts", "rewrite_facts"]


@dataclass(frozen=True)
class RewriteFacts:
    """A rewrite as its author wrote it, and its place among the others."""

    name: str
    exact: bool
    equation: str
    more: str
    """The docstring after its first line."""
    defined: str
    before: tuple[str, ...]
    """What runs before it."""
    after: tuple[str, ...]
    conditions: tuple[str, ...]
    """The short form's condition, or the reasons for which a class refuses; what is put in at run time is "…"."""
    examples: tuple[str, ...]
    """What it declares that it matches: the dimensions of the arguments."""
    sizes: Mapping[str, tuple[int, int]]
    """Least and largest sizes of the dimensions in its examples, where it declares them (`example_sizes`)."""


@dataclass(frozen=True)
class PatternFacts:
    """A function that reads a spelling."""

    name: str
    kind: str
    reads: str
    equation: str
    more: str
    defined: str
    source: str
    examples: tuple[str, ...]
    """What it declares that it reads: functions, with the dimensions of their arguments."""


def rewrite_facts() -> list[RewriteFacts]:
    """Every registered rewrite, in the order in which they run."""
    entries = rewrites()
    names = [entry.name for entry in entries]
    return [_rewrite(entry, names) for entry in entries]


def _rewrite(entry: RewriteEntry, names: list[str]) -> RewriteFacts:
    function = getattr(entry.rule, "pattern", None)
    written = function if callable(function) and not isinstance(entry.rule, type) else entry.rule
    place = names.index(entry.name)
    return RewriteFacts(
        entry.name,
        entry.exact,
        entry.doc,
        _more(written),
        _defined(written),
        tuple(names[:place]),
        tuple(names[place + 1 :]),
        tuple(_conditions(entry.rule)),
        tuple(_examples(entry.rule)),
        getattr(entry.rule, "example_sizes", {}),
    )


def pattern_facts() -> list[PatternFacts]:
    """Every registered pattern by kind, in the order in which they are asked."""
    return [_pattern(kind, function) for kind in KINDS for function in patterns(kind)]  # type: ignore[arg-type]


def _pattern(kind: str, function: Callable[..., Any]) -> PatternFacts:
    text = inspect.getdoc(function) or ""
    return PatternFacts(
        getattr(function, "__name__", str(function)),
        kind,
        KINDS[kind],
        text.partition("\n")[0],
        _more(function),
        _defined(function),
        _source(function),
        tuple(_declared(examples_of(function))),
    )


def _more(written: object) -> str:
    return (inspect.getdoc(written) or "").partition("\n")[2].strip()


def _defined(written: Any) -> str:
    """file:line, below the folder that holds the package where it is in one."""
    try:
        file, line = Path(inspect.getsourcefile(written) or ""), inspect.getsourcelines(written)[1]
    except (OSError, TypeError):
        return f"{getattr(written, '__module__', '?')}.{getattr(written, '__qualname__', '?')}"
    package = str(written.__module__).partition(".")[0]
    spec = importlib.util.find_spec(package) if "." in str(written.__module__) else None
    if spec is not None and spec.origin and file.is_relative_to(Path(spec.origin).parent):
        return f"{package}/{file.relative_to(Path(spec.origin).parent)}:{line}"
    return f"{file}:{line}"


def _source(written: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(written)).rstrip()
    except (OSError, TypeError):
        return ""


def _conditions(rule: Any) -> Iterator[str]:
    if not isinstance(rule, type):
        if (where := getattr(rule, "where", None)) is not None:
            from .custom.conditions import text_of

            yield f"only where {text_of(where)}"
        return
    seen: set[str] = set()
    for part in rule.__mro__[:-1]:
        for reason in _refusals(part):
            if reason not in seen:
                seen.add(reason)
                yield reason


def _refusals(rule: type) -> Iterator[str]:
    """The reasons that are spelled in the class and in the functions beside it."""
    try:
        module = ast.parse(Path(inspect.getsourcefile(rule) or "").read_text(encoding="utf-8"))
    except (OSError, TypeError, SyntaxError):
        return
    for part in module.body:
        if isinstance(part, ast.ClassDef) and part.name != rule.__name__:
            continue
        for call in ast.walk(part):
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "Refusal" and call.args:
                yield from _literal(call.args[0])


def _literal(text: ast.expr) -> Iterator[str]:
    if isinstance(text, ast.Constant) and isinstance(text.value, str):
        yield text.value
    elif isinstance(text, ast.JoinedStr):
        yield "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in text.values)


def _examples(rule: Any) -> Iterator[str]:
    yield from _declared(getattr(rule, "examples", ()))
    example = None if isinstance(rule, type) else getattr(rule, "example", None)
    if example is not None:
        tensors = {name: " ".join(_dimension(dim) for dim in t.dims) for name, t in example.tensors.items()}
        yield f"{rule.pattern.__name__}({_arguments({**tensors, **example.scalars})})"


def _declared(examples: Examples) -> Iterator[str]:
    for function, arguments in examples:
        yield f"{function.__name__}({_arguments(arguments)})"


def _dimension(names: tuple[str, ...]) -> str:
    return "1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})"


def _arguments(declared: Mapping[str, object]) -> str:
    return ", ".join(f"{name}[{v}]" if isinstance(v, str) else f"{name}={v:g}" for name, v in declared.items())
