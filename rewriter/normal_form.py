"""The normal form: the few spellings that tracing leaves are resolved, and a specification says what a graph may hold."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def normalise(gm: fx.GraphModule) -> fx.GraphModule:
    remove_dead_code(gm)
    return gm


def remove_dead_code(gm: fx.GraphModule) -> None:
    """Remove nodes without readers; writes, higher-order and random operators stay."""
    gm.graph.eliminate_dead_code(is_impure)
    gm.recompile()


def is_impure(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.is_impure()


def check_normal_form(gm: fx.GraphModule) -> None:
    return None
