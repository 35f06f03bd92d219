"""Lowering: every `latent::` operator gets the form that suits its device and shapes, or is inlined as it is.

Each form computes in the dtypes of its arguments, also under autocast, as the operators do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .autocast import keep_from_autocast, without_autocast
from .compat import trace_pre_dispatch
from .emit import LOWERED
from .purity import enables_grad
from .real_parts import in_real_parts
from .registry import LibraryCall, joint_lowerings, lowerings


@dataclass(frozen=True)
class Lowering:
    """What became of one operator."""

    operator: str
    reason: str


def lower(gm: fx.GraphModule, bodies: bool = False) -> tuple[Lowering, ...]:
    """Replace the `latent::` operators of a graph by plain ATen, in place; with `bodies`, all by their own bodies."""
    done = []
    gradients = torch.is_grad_enabled() or enables_grad(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith("latent."):
            continue
        name = str(node.target).removesuffix(".default").replace(".", "::", 1)
        node.meta[LOWERED] = node.name
        choose = None if bodies else lowerings().get(name)
        form, reason = choose(node, gradients) if choose is not None else (None, "the operator's own body")
        if not isinstance(form, LibraryCall) or not str(form.target).startswith("latent."):
            keep_from_autocast(node)  # operators of ours keep themselves
        if isinstance(form, LibraryCall):
            node.target, node.args, node.kwargs = form.target, form.args, form.kwargs
        else:
            inline(node, form or node.target)
        done.append(Lowering(name, reason))
    if done and not bodies:  # a graph in which nothing was rewritten stays as it is, node for node
        done += [Lowering(*made) for made in in_real_parts(gm.graph)]
        for join in joint_lowerings():
            done += [Lowering(*made) for made in join(gm.graph, gradients)]
    gm.recompile()
    return tuple(done)


def inline(node: fx.Node, form: Callable[..., Any]) -> None:
    """Replace a node by the ATen operations of `form`, traced with the node's own argument values."""
    flat, rebuild = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    inputs = [a for a in flat if isinstance(a, fx.Node)]

    def body(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = torch.utils._pytree.tree_unflatten(
            [next(given) if isinstance(a, fx.Node) else a for a in flat], rebuild
        )
        return form(*args, **kwargs)

    with without_autocast(node.meta["val"].device.type):
        traced = trace_pre_dispatch(body, [n.meta["val"] for n in inputs])
    placed: dict[fx.Node, fx.Node] = {}
    given = iter(inputs)
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            placed[inner] = next(given)
        elif inner.op == "output":
            node.replace_all_uses_with(placed[inner.args[0]])
        else:
            with node.graph.inserting_before(node):
                copy = node.graph.node_copy(inner, placed.__getitem__)
            copy.meta = {**{k: v for k, v in node.meta.items() if k != "val"}, "val": inner.meta.get("val")}
            placed[inner] = copy
    node.graph.erase_node(node)
