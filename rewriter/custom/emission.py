"""A site's tensors in the layouts that a function declares, and the function's own nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from ..axes import Dim, Layout, same_size
from ..canonical import Canonical, computed_in, emit_mask, emit_query_key, emit_sinks, place
from ..emit import Emitter
from ..layouts import is_tensor, shape_of
from ..purity import is_random
from ..sites import Scale
from .overlay import Overlay

aten = torch.ops.aten


def emit_operands(emit: Emitter, over: Overlay) -> dict[str, fx.Node]:
    """The tensors that the pattern's arguments stand for, in the layouts it declares."""
    pattern, scores, site = over.pattern, over.form.scores, over.form.site
    canonical = Canonical(site, folded="g" in pattern.letters)
    dtype = computed_in(site)
    symbols = tuple(step for step in scores.scale_by if not is_tensor(step.by))
    tensors = tuple(step for step in scores.scale_by if is_tensor(step.by))
    query, key, _ = emit_query_key(emit, canonical, replace(scores, scale_by=tensors), dtype)
    for step in symbols:  # a number that is not known: the scalars are found without it
        query = _times(emit, query, step)
    added, query = emit_mask(emit, canonical, scores, query)
    value = emit.cast(place(emit, site.value, canonical.columns(site.axes.value_width), site), dtype)
    rows, columns = canonical.rows(over.axes["d"]), canonical.columns(over.axes["d"])
    emit.learn([(query, rows), (key, columns)])
    made: dict[str, tuple[fx.Node, Layout]] = {
        "query": (query, rows),
        "key": (key, columns),
        "value": (value, canonical.columns(site.axes.value_width)),
    }
    if pattern.has("mask"):
        mask = emit_flags(emit, over, added, dtype)
        full = (site.axes.batch, canonical.heads, site.axes.queries, site.axes.keys)
        made["mask"] = (mask, _without_ones(mask, full))
    if pattern.has("sinks"):
        sinks = emit_sinks(emit, canonical, scores)
        assert sinks is not None
        made["sinks"] = (emit.cast(sinks, dtype), (canonical.heads,))
    placed: dict[str, fx.Node] = {}
    for name in pattern.example.present(pattern.absent):
        slot = pattern.slots[name]
        target = over.layout(slot.layout)
        placed[name] = emit.expand(emit.relayout(*made[slot.kind], target), target)
    return placed


def _times(emit: Emitter, query: fx.Node, step: Scale) -> fx.Node:
    return emit.call(aten.div.Tensor if step.divide else aten.mul.Tensor, query, step.by)


def _without_ones(mask: fx.Node, full: Sequence[Dim]) -> Layout:
    return tuple(() if same_size(size, 1) else dim for size, dim in zip(shape_of(mask), full, strict=True))


def emit_flags(emit: Emitter, over: Overlay, mask: fx.Node | None, dtype: torch.dtype) -> fx.Node:
    """The additive mask with what a fused call hides beside it: [B|1 H|1 S|1 T]."""
    site, flags = over.form.site, over.form.own
    lowest = float("-inf")
    device = site.query.node.meta["val"].device
    size = [emit.size(site.axes.queries), emit.size(site.axes.keys)]
    hidden = []
    if flags.causal:  # j > i
        hidden.append(emit.call(aten.triu.default, _full(emit, size, lowest, dtype, device), 1))
    if flags.window:  # j <= i - window
        hidden.append(emit.call(aten.tril.default, _full(emit, size, lowest, dtype, device), -flags.window))
    for one in hidden:
        four = emit.call(aten.unsqueeze.default, emit.call(aten.unsqueeze.default, one, 0), 0)
        mask = four if mask is None else emit.call(aten.add.Tensor, mask, four)
    if mask is None:
        mask = _full(emit, [1, 1, *size], 0.0, dtype, device)
    return mask


def _full(emit: Emitter, size: Sequence[object], value: float, dtype: torch.dtype, device: torch.device) -> fx.Node:
    return emit.call(aten.full.default, list(size), value, dtype=dtype, device=device)


def emit_function(emit: Emitter, traced: fx.GraphModule, inputs: Sequence[fx.Node], name: str) -> fx.Node:
    """The nodes of a traced function, for these inputs. Raises ValueError for what cannot be placed in a graph."""
    placed = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            placed[node] = emit.constant(getattr(traced, str(node.target)))
        elif node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                raise ValueError(f"{name} writes in place ({node.target}); give the result a name of its own instead")
            if is_random(node):
                raise ValueError(f"{name} draws random numbers ({node.target}), and a rewrite may not")
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), placed.__getitem__)
            placed[node] = emit.call(node.target, *args, **kwargs)
    result = traced.graph.output_node().args[0]
    if not isinstance(result, fx.Node):
        raise ValueError(f"{name} does not return one tensor")
    returned: fx.Node = placed[result]
    return returned
