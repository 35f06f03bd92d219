"""Which tensors are weights: parameters and buffers of modules, what is computed from them alone, and given tensors."""

from __future__ import annotations

import torch
from torch import fx

from ..rewriter.layouts import is_cast, is_tensor, layout_step, shape_of
from ..rewriter.provenance import is_learned
from ..rewriter.scalars import read_scalar

__all__ = ["is_number", "uncast", "weight_origin"]

LEAVES = 24
"""Nodes that the way from a parameter to a weight may have."""


def uncast(node: fx.Node) -> fx.Node:
    """The tensor before its casts."""
    while is_cast(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_number(value: object) -> bool:
    """A number, known or symbolic, or a tensor without dimensions."""
    if read_scalar(value) is not None:
        return True
    if not isinstance(value, fx.Node):
        return False
    example = value.meta.get("val")
    return isinstance(example, torch.SymFloat | torch.SymInt) or (is_tensor(value) and not shape_of(value))


def weight_origin(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The input that a weight is computed from, alone or with numbers, and whether it is learned.

    A tensor given to the call counts only through layout operations and casts.
    """
    below, root = node, node
    while (step := layout_step(root)) is not None or is_cast(root):
        root = step.source if step is not None else root.args[0]  # type: ignore[assignment]
    if root.op == "placeholder" and is_tensor(root):
        return root, is_learned(root)
    leaves: list[fx.Node] = []
    pending, seen = [below], {below}
    while pending:
        top = pending.pop()
        if is_learned(top):
            leaves.append(top)
        elif top.op != "call_function" or not top.all_input_nodes or len(seen) > LEAVES:
            return None
        for given in top.all_input_nodes if top.op == "call_function" else ():
            if given not in seen:
                seen.add(given)
                pending.append(given)
    return (max(leaves, key=lambda leaf: len(shape_of(leaf))), True) if leaves else None
