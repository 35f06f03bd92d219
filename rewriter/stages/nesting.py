"""The calls of a stage as a tree of modules, in the order in which they run; identical layers are one branch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .view import Argument, Code, Node, Ref, Stage

__all__ = ["Module", "canonical", "nest", "shorten", "text_of"]


@dataclass(frozen=True)
class Module:
    """One run through a module. With several `paths` it stands for all of them, and shows the first."""

    paths: tuple[str, ...]
    items: tuple[Node | Module, ...]
    twins: Mapping[str, str] = field(default_factory=dict)
    """The nodes of the other paths -> the node that is shown for them."""

    @property
    def path(self) -> str:
        return self.paths[0]

    def nodes(self) -> Iterator[Node]:
        for item in self.items:
            if isinstance(item, Module):
                yield from item.nodes()
            else:
                yield item


def nest(stage: Stage) -> Module:
    """The calls of a stage below one root."""
    return _collapse(Module(("",), tuple(_runs(list(stage.calls), ""))), stage.by_name)


def _runs(nodes: Sequence[Node], prefix: str) -> Iterator[Node | Module]:
    """Consecutive nodes of one child module are one run."""
    start = 0
    while start < len(nodes):
        child = _child(nodes[start].module, prefix)
        if not child:
            yield nodes[start]
            start += 1
            continue
        stop = start
        while stop < len(nodes) and _child(nodes[stop].module, prefix) == child:
            stop += 1
        yield Module((child,), tuple(_runs(nodes[start:stop], child)))
        start = stop


def _child(path: str, prefix: str) -> str:
    """The child of `prefix` that a path leads through; "" when it leads through none. Numbers belong to their list."""
    if not path.startswith(f"{prefix}." if prefix else "") or path == prefix:
        return ""
    steps = path[len(prefix) + bool(prefix) :].split(".")
    taken = 1
    while taken < len(steps) and steps[taken].isdigit():
        taken += 1
    return ".".join(filter(None, (prefix, *steps[:taken])))


# ** identical layers **


def _collapse(module: Module, known: Mapping[str, Node]) -> Module:
    groups: dict[tuple[str, ...], list[Module]] = {}
    order: list[Node | tuple[str, ...]] = []
    for item in module.items:
        if isinstance(item, Node):
            order.append(item)
        else:
            key = _form(item, known)
            if key not in groups:
                order.append(key)
            groups.setdefault(key, []).append(item)
    items: list[Node | Module] = []
    for entry in order:
        if isinstance(entry, Node):
            items.append(entry)
            continue
        first, *others = groups[entry]
        paths = tuple(m.path for m in (first, *others))
        shown = [node.name for node in _reading(first)]
        twins = {node.name: name for other in others for node, name in zip(_reading(other), shown, strict=True)}
        items.append(replace(_collapse(first, known), paths=paths, twins=twins))
    return replace(module, items=tuple(items))


def _form(module: Module, known: Mapping[str, Node]) -> tuple[str, ...]:
    """Equal for two runs that compute the same, in modules of the same name but for numbers."""
    inner = {node.name: str(n) for n, node in enumerate(_reading(module))}
    lines = (canonical(node, known, inner, module.path) for node in _reading(module))
    return (without_numbers(module.path), *lines)


def _reading(module: Module) -> list[Node]:
    """The nodes that read something. The others are constants, of which several layers may share the first one's."""
    return [node for node in module.nodes() if node.reads]


def canonical(node: Node, known: Mapping[str, Node], inner: Mapping[str, str], prefix: str = "") -> str:
    """A node without names: operator, arguments and type. Nodes of `inner` are numbers, weights their place below
    `prefix`, and everything else its type."""

    def name(ref: str) -> str:
        if ref in inner:
            return f"%{inner[ref]}"
        given = known[ref]
        place = without_numbers(given.target.removeprefix(f"{prefix}.")) if given.weight else given.fill
        return f"{'' if given.kind == 'input' and not given.weight else place} {given.type}"

    arguments = text_of((*node.args, dict(node.kwargs)), name)
    return f"{node.module.removeprefix(prefix)} {node.target}{arguments} {node.type}"


def without_numbers(path: str) -> str:
    return re.sub(r"\d+", "#", path)


# ** text of nodes **


def text_of(argument: Argument, name: Callable[[str], str] = str) -> str:
    """An argument as Python; `name` gives the text for a reference, else its own name."""
    if isinstance(argument, Ref):
        return name(argument.name)
    if isinstance(argument, Code):
        return argument.text
    if isinstance(argument, tuple):
        inside = ", ".join(text_of(item, name) for item in argument)
        return f"({inside},)" if len(argument) == 1 else f"({inside})"
    if isinstance(argument, list):
        return f"[{', '.join(text_of(item, name) for item in argument)}]"
    if isinstance(argument, Mapping):
        return "{" + ", ".join(f"{key!r}: {text_of(item, name)}" for key, item in argument.items()) + "}"
    return repr(argument)


def shorten(node: Node, known: Mapping[str, Node]) -> str:
    """`linear(mul_3, q_proj.weight)`: the call with inputs named by their place, in the words of a reader."""

    def name(ref: str) -> str:
        given = known.get(ref)
        if given is None or given.kind != "input":
            return ref
        return ".".join(given.target.split(".")[-2:])

    arguments = [text_of(argument, name) for argument in node.args]
    arguments += [f"{key}={text_of(value, name)}" for key, value in node.kwargs.items()]
    while arguments and arguments[-1] == "None":
        arguments.pop()
    return f"{node.operator}({', '.join(arguments)})".replace("torch.", "").replace(f"{2**63 - 1}", "end")
