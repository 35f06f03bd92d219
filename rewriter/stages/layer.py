"""One layer of a stage as a stage of its own: what it reads from others become inputs, what others read, results."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from .fills import fill_of_type
from .view import Node, Ref, Stage

__all__ = ["cut", "layer_path"]


def layer_path(stage: Stage, number: int) -> str:
    """`model.layers.7`: layer 7 of the list of modules in which most nodes run. Raises ValueError."""
    lists = Counter(found[1] for node in stage.calls if (found := re.match(r"(|.*?\.)\d+(?:\.|$)", node.module)))
    if not lists:
        raise ValueError("no module of the model stands in a list, so no layer has a number")
    prefix = lists.most_common(1)[0][0]
    path = f"{prefix}{number}"
    if not any(_inside(node, path) for node in stage.calls):
        numbers = {int(n[1]) for node in stage.calls if (n := re.match(rf"{re.escape(prefix)}(\d+)", node.module))}
        raise ValueError(f"there is no {path}: the layers of {prefix.rstrip('.')} are {min(numbers)} to {max(numbers)}")
    return path


def _inside(node: Node, path: str) -> bool:
    return node.module == path or node.module.startswith(f"{path}.")


def cut(stage: Stage, path: str) -> Stage:
    """The calls of the modules at and below `path`."""
    inside = [node for node in stage.calls if _inside(node, path)]
    names = {node.name for node in inside}
    read = dict.fromkeys(name for node in inside for name in node.reads if name not in names)
    given = [_given(stage.by_name[name]) for name in read]
    given.sort(key=lambda node: node.kind != "input")
    results = dict.fromkeys(name for node in stage.nodes if node.name not in names for name in node.reads)
    out = tuple(Ref(name) for name in results if name in names)
    return replace(stage, nodes=(*given, *inside, Node("output", "output", args=(out,))))


def _given(node: Node) -> Node:
    if node.kind != "call":
        return node
    fills = [fill_of_type(t.dtype, None if t.shape is None else t.sizes) for t in node.types]
    fill = fills[0] if len(fills) == 1 else f"[{', '.join(fills)}]"
    return Node(node.name, "input", target=node.name, types=node.types, fill=fill)
