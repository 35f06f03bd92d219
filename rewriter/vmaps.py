"""Regions under `vmap`, opened before capture.

Dynamo leaves a vmap as calls that push a level, wrap tensors, compute and pop the level. A pre-dispatch trace cannot
see into such a region (its tensors become constants), an ordinary trace can. So each region is traced by itself first,
with the batch dimension written out, and stands in the graph as one module of plain ATen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import fx, nn

from .compat import differentiates, fake_mode_of, trace_below_dispatch, vmap_depth


def has_vmaps(gm: fx.GraphModule) -> bool:
    return any(vmap_depth(node.target) for node in gm.graph.nodes if node.op == "call_function")


def has_derivatives(graph: fx.Graph) -> bool:
    """Whether a derivative of `torch.func` is taken outside of every vmap; inside, it is opened with the region.

    The tensors of its level are in no trace, and `vjp` reads them after the level is gone.
    """
    depth = 0
    for node in graph.nodes:
        if node.op == "call_function":
            depth += vmap_depth(node.target)
            if depth == 0 and differentiates(node.target):
                return True
    return False


def open_vmaps(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph in which every vmap region is one call of a module. Raises what tracing raises."""
    regions = _regions(gm.graph)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    opened: dict[str, nn.Module] = {}
    starts = {region[0]: region for region in regions}
    inside = {node for region in regions for node in region}
    for node in gm.graph.nodes:
        if node in starts:
            _place_region(gm, opened, graph, starts[node], copies)
        elif node not in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "placeholder" and hasattr(node, "_dynamo_source"):
                copies[node]._dynamo_source = node._dynamo_source
    root = copy.copy(gm)
    root._modules = {**gm._modules, **opened}
    new = fx.GraphModule(root, graph)
    new.meta = dict(gm.meta)
    return new


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """The outermost runs of nodes from a level pushed to the same level popped."""
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        change = vmap_depth(node.target) if node.op == "call_function" else 0
        if change > 0 and depth == 0:
            regions.append([])
        depth += change
        if depth > 0 or change < 0:
            regions[-1].append(node)
    return regions


def _place_region(
    gm: fx.GraphModule,
    opened: dict[str, nn.Module],
    graph: fx.Graph,
    region: Sequence[fx.Node],
    copies: dict[fx.Node, fx.Node],
) -> None:
    members = set(region)
    inputs = list(dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in members))
    outputs = [node for node in region if any(user not in members for user in node.users)]
    body = fx.Graph()
    own = {node: body.placeholder(node.name) for node in inputs}
    for node in region:
        own[node] = body.node_copy(node, own.__getitem__)
    body.output(tuple(own[node] for node in outputs))
    function = fx.GraphModule(gm, body)
    fakes = [node.meta.get("example_value") for node in inputs]
    traced = trace_below_dispatch(lambda *given: fx.Interpreter(function).run(*given), fakes, fake_mode_of(gm))
    name = f"vmap_{region[0].name}"
    opened[name] = traced
    call = graph.call_module(name, tuple(copies[node] for node in inputs))
    call.meta = {key: region[0].meta[key] for key in ("nn_module_stack", "stack_trace") if key in region[0].meta}
    for number, node in enumerate(outputs):
        copies[node] = graph.call_function(_member, (call, number))
        copies[node].meta = dict(node.meta)


def _member(values: Sequence[object], number: int) -> object:
    return values[number]
