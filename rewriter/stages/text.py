"""A stage as text: a tree of modules, identical layers once, the type of every value behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from ..report_text import collapse
from .nesting import Module, nest, shorten
from .view import Node, Stage

__all__ = ["head", "render", "title"]

COLUMN = 96
"""Where the types stand, unless a call is longer."""


def render(stage: Stage, tree: Module | None = None) -> str:
    """The whole stage. ◆ stands before operators of this package, and behind what a rewrite emitted its name."""
    title = f"{stage.graph} · {stage.name} · {head(stage)}"
    lines = [title, "─" * len(title)]
    lines += [f"  {text}" for text in _inputs(stage)]
    lines += _module(tree or nest(stage), stage.by_name, 0)
    results = [name for node in stage.nodes if node.kind == "output" for name in node.reads]
    lines += [f"  return {name}: {stage.by_name[name].type}" for name in results]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def head(stage: Stage) -> str:
    """How large it is."""
    weights = sum(node.weight for node in stage.inputs)
    ours = sum(node.ours for node in stage.calls)
    numbers = {"call": len(stage.calls), "input": len(stage.inputs) - weights, "weight": weights}
    text = ", ".join(f"{number} {noun}{'s' * (number != 1)}" for noun, number in numbers.items())
    return text + (f", {ours} of latent::" if ours else "")


def _inputs(stage: Stage) -> Iterator[str]:
    for node in stage.inputs:
        if not node.weight:
            yield f"{node.name}: {node.type}"


def _module(module: Module, known: Mapping[str, Node], depth: int, above: str = "") -> Iterator[str]:
    margin, path = "  " * (depth + 1), module.path
    if path:
        inner = {node.name for node in module.nodes()}
        yield "  " * depth + f"{title(module, above)}   {_reads(module, known, inner)}"
    for item in module.items:
        if isinstance(item, Node):
            yield _call(margin, item, known)
        elif len(item.paths) == 1 and len(item.items) == 1 and isinstance(item.items[0], Node):
            yield _call(f"{margin}{title(item, path)}: ", item.items[0], known)
        else:
            yield from _module(item, known, depth + 1, path)


def _call(margin: str, node: Node, known: Mapping[str, Node]) -> str:
    call = f"{'◆' if node.ours else ' '} {margin[2:]}{node.name} = {shorten(node, known)}"
    return f"{call:<{COLUMN}} {node.type}" + (f"   {node.rewrite}" if node.rewrite else "")


def title(module: Module, above: str) -> str:
    """layers.[0-29] × 30: the path below the module above, which is in the text already."""
    return collapse([path[len(above) + bool(above) :] for path in module.paths])


def _reads(module: Module, known: Mapping[str, Node], inner: set[str]) -> str:
    """What comes in from other modules, weights aside."""
    read = dict.fromkeys(chain.from_iterable(n.reads for n in module.nodes()))
    outer = [known[name] for name in read if name not in inner and name in known and not known[name].weight]
    shown = [f"{node.name} {node.type}" for node in outer[:4]]
    return "← " + ", ".join(shown) + (f" and {len(outer) - 4} more" if len(outer) > 4 else "") if outer else ""
