"""Lowering: every `latent::` operator gets the form that suits its device and shapes, or is inlined as it is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .compat import trace_pre_dispatch
from .layouts import shape_of


@dataclass(frozen=True)
class Lowering:
    """What became of one operator."""

    operator: str
    form: str
    reason: str


def lower(gm: fx.GraphModule) -> tuple[Lowering, ...]:
    """Replace the `latent::` operators of a graph by plain ATen, in place."""
    done = []
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and str(node.target).startswith("latent."):
            form, reason = choose(node)
            if str(node.target) == "latent.attention.default" and form.__name__ == "attention":
                _call_library(node)
            else:
                inline(node, form)
            done.append(Lowering(str(node.target).removesuffix(".default").replace(".", "::", 1), getattr(form, "__name__", str(form)), reason))
    gm.recompile()
    return tuple(done)


def choose(node: fx.Node) -> tuple[Callable[..., Any], str]:
    """The form for one operator and the reason in words."""
    kernels = importlib.import_module("..kernels.attention", __package__)
    if str(node.target) != "latent.attention.default":
        return node.target, "the operator's own body"  # type: ignore[return-value]
    query, key, value = (shape_of(n) for n in node.args[:3])  # type: ignore[arg-type]
    causal, device = node.args[5], node.meta["val"].device.type
    if device != "cpu":
        return kernels.attention, f"scaled_dot_product_attention on {device}"
    widths_differ = query[3] != value[3]
    if query[2] == 1 and node.args[6] and not causal and not widths_differ:
        return kernels.one_query_per_group, "one query token: a group's heads are rows of one product"
    if widths_differ and all(isinstance(d, int) for d in (query[3], value[3])) and query[3] > value[3]:  # type: ignore[operator]
        return kernels.padded_values, f"values padded from {value[3]} to {query[3]}, the width of the keys"
    return kernels.attention, "scaled_dot_product_attention"


def _call_library(node: fx.Node) -> None:
    """latent::attention as the library call that its body is, without tracing the body."""
    query, key, value, mask, scale, causal, grouped = node.args
    node.target = torch.ops.aten.scaled_dot_product_attention.default
    node.args = (query, key, value, mask, 0.0, causal)
    node.kwargs = {"scale": scale, "enable_gqa": grouped}


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
