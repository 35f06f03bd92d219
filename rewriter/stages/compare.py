"""Two stages compared module by module: what is gone, what is new, and what reads something else.

Names do not matter, see `matching`. A node that is matched, and whose operands are not matched with one another in
turn, reads something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .matching import key, match, place_of
from .nesting import shorten, without_numbers
from .view import Node, Stage

__all__ = ["Comparison", "Line", "ModuleDiff", "compare"]

Sign = Literal[" ", "-", "+", "~"]


@dataclass(frozen=True)
class Line:
    """A node of the first stage, of the second, or of both."""

    sign: Sign
    before: Node | None
    after: Node | None
    text_before: str = ""
    text_after: str = ""
    note: str = ""


@dataclass(frozen=True)
class ModuleDiff:
    """What differs in a module, and in all that differ likewise. `lines` holds the unchanged ones too."""

    paths: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def changes(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.sign != " ")

    def counts(self, sign: Sign) -> Counter[str]:
        """How many nodes of which operator."""
        nodes = ((line.before if sign == "-" else line.after) for line in self.lines if line.sign == sign)
        return Counter(node.operator for node in nodes if node is not None)


@dataclass(frozen=True)
class Comparison:
    names: tuple[str, str]
    modules: tuple[ModuleDiff, ...]
    """Those with a difference."""

    same: int
    """How many modules have none."""

    inputs: tuple[Line, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.modules and not self.inputs

    def to_dict(self) -> dict[str, Any]:
        def line(each: Line) -> dict[str, Any]:
            return {"sign": each.sign, "before": each.text_before, "after": each.text_after, "note": each.note}

        return {
            "a": self.names[0],
            "b": self.names[1],
            "equal": self.equal,
            "inputs": [line(each) for each in self.inputs],
            "modules": [
                {
                    "paths": m.paths,
                    "removed": m.counts("-"),
                    "added": m.counts("+"),
                    "lines": list(map(line, m.changes)),
                }
                for m in self.modules
            ],
            "same": self.same,
        }


def compare(a: Stage, b: Stage, names: tuple[str, str] | None = None) -> Comparison:
    """The differences from `a` to `b`, by module path in the order of `a`."""
    matched = match(a, b)
    modules_a, modules_b = _by_module(a), _by_module(b)
    lines = {
        path: tuple(
            _line(x, y, a, b, matched) for x, y in _merged(modules_a.get(path, []), modules_b.get(path, []), matched)
        )
        for path in dict.fromkeys([*modules_a, *modules_b])
    }
    different = {path: each for path, each in lines.items() if any(line.sign != " " for line in each)}
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, each in different.items():
        groups.setdefault(_form(path, each, a, b), []).append(path)
    modules = tuple(ModuleDiff(tuple(same), lines[same[0]]) for same in groups.values())
    return Comparison(names or (a.name, b.name), modules, len(lines) - len(different), _inputs(a, b))


def _by_module(stage: Stage) -> dict[str, list[Node]]:
    modules: dict[str, list[Node]] = {}
    for node in stage.calls:
        modules.setdefault(node.module, []).append(node)
    return modules


# ** lines **


def _line(x: Node | None, y: Node | None, a: Stage, b: Stage, matched: Mapping[str, str]) -> Line:
    before = f"{shorten(x, a.by_name)}   {x.type}" if x else ""
    after = f"{shorten(y, b.by_name)}   {y.type}" if y else ""
    if x is None or y is None:
        return Line("-" if x else "+", x, y, before, after, y.rewrite if y else "")
    moved = [(p, q) for p, q in zip(x.reads, y.reads, strict=True) if not _same(a, p, b, q, matched)]
    if not moved:
        return Line(" ", x, y, before, after)
    note = ", ".join(f"reads {_described(q, b)} instead of {_described(p, a)}" for p, q in moved)
    return Line("~", x, y, before, after, note)


def _merged(xs: list[Node], ys: list[Node], matched: Mapping[str, str]) -> list[tuple[Node | None, Node | None]]:
    """Both sides in the order of the second; what is gone stands before what came, and before what it stood before."""
    partners = {matched[x.name]: x for x in xs if x.name in matched}
    gone = [(number, x) for number, x in enumerate(xs) if x.name not in matched]
    place = {x.name: number for number, x in enumerate(xs)}
    merged: list[tuple[Node | None, Node | None]] = []
    new: list[Node] = []
    for y in ys:
        if y.name not in partners:
            new.append(y)
            continue
        x = partners[y.name]
        while gone and gone[0][0] < place[x.name]:
            merged.append((gone.pop(0)[1], None))
        merged += [*((None, each) for each in new), (x, y)]
        new = []
    return [*merged, *((x, None) for _, x in gone), *((None, y) for y in new)]


def _same(a: Stage, p: str, b: Stage, q: str, matched: Mapping[str, str]) -> bool:
    """Whether two operands are the same: matched with one another, or equal constants."""
    place = place_of(a.by_name[p])
    return matched.get(p) == q or (bool(place) and place == place_of(b.by_name[q]))


def _described(name: str, stage: Stage) -> str:
    node = stage.by_name.get(name)
    return node.operator if node and node.kind == "call" else name


def _form(path: str, lines: tuple[Line, ...], a: Stage, b: Stage) -> tuple[str, ...]:
    """Equal for modules that differ likewise."""
    known = (
        (line, key(line.before, a) if line.before else "", key(line.after, b) if line.after else "") for line in lines
    )
    keys = (f"{line.sign} {before} {after} {line.note}" for line, before, after in known)
    return (without_numbers(path), *map(without_numbers, keys))


def _inputs(a: Stage, b: Stage) -> tuple[Line, ...]:
    """Inputs that stand at a place of the program where the other side has none, or one of another type."""
    before, after = ({node.target: node for node in stage.inputs} for stage in (a, b))
    lines = []
    for place in dict.fromkeys([*before, *after]):
        x, y = before.get(place), after.get(place)
        if x is None or y is None or x.type != y.type:
            texts = (f"{node.target}: {node.type}" if node else "" for node in (x, y))
            lines.append(Line("~" if x and y else "-" if x else "+", x, y, *texts))
    return tuple(lines)
