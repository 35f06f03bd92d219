"""What a rewrite replaced and what it put there, each cut out as a graph of its own, to be run beside one another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from .certify import Comparison
from .compat import FakeTensorMode
from .provenance import is_learned
from .sizes import concrete

__all__ = ["Regions", "cut_out"]


@dataclass(frozen=True)
class Regions:
    """Both sides of one application of a rewrite, with the same inputs."""

    before: fx.GraphModule
    after: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    """Random, in the sizes, dtypes and on the device of the call; weights are parameters."""


def cut_out(comparison: Comparison) -> Regions:
    """Copy both sides of a comparison, at the example sizes."""
    given = [n for n in comparison.nodes if _is_input(n, comparison) and isinstance(n.meta.get("val"), torch.Tensor)]
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(_random(node, generator) for node in given)
    before, after = (_graph(n, given, comparison.nodes, inputs) for n in (comparison.original, comparison.replacement))
    return Regions(before, after, inputs)


def _is_input(node: fx.Node, comparison: Comparison) -> bool:
    return node in comparison.inputs or node.op == "placeholder"


def _graph(
    result: fx.Node, given: Iterable[fx.Node], nodes: Iterable[fx.Node], inputs: Iterable[torch.Tensor]
) -> fx.GraphModule:
    graph, placed = fx.Graph(), dict[fx.Node, fx.node.Argument]()
    constants = nn.Module()
    for node in given:
        placed[node] = graph.placeholder(node.name)
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, int | float | torch.SymInt | torch.SymFloat):
            placed[node] = concrete(value)
        elif node not in placed and all(read in placed for read in node.all_input_nodes):
            if node.op == "get_attr":
                setattr(constants, str(node.target), getattr(node.graph.owning_module, str(node.target)))
            placed[node] = graph.node_copy(node, placed.__getitem__)  # type: ignore[arg-type]
    graph.output(placed[result])
    graph.eliminate_dead_code()
    gm = fx.GraphModule(constants, graph)
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)  # type: ignore[no-untyped-call]
    return gm


def _random(node: fx.Node, generator: torch.Generator) -> torch.Tensor:
    """A tensor as the node's; a weight is a parameter."""
    like = node.meta["val"]
    shape = [concrete(size) for size in like.shape]
    if like.dtype == torch.bool:
        made = torch.rand(shape, generator=generator) < 0.7
    elif like.dtype.is_floating_point or like.dtype.is_complex:
        made = torch.randn(shape, generator=generator, dtype=torch.complex64 if like.dtype.is_complex else None)
    else:
        made = torch.randint(0, 4, shape, generator=generator)
    tensor = torch.empty_strided(shape, _strides(like), dtype=like.dtype, device=like.device).copy_(made)
    return nn.Parameter(tensor, requires_grad=False) if is_learned(node) else tensor


def _strides(like: torch.Tensor) -> list[int]:
    """Those of the tensor; of one whose elements share memory, those of a copy."""
    strides = [concrete(stride) for stride in like.stride()]
    shared = any(stride == 0 and concrete(size) > 1 for stride, size in zip(strides, like.shape, strict=True))
    return list(torch.empty(like.shape, device="meta").stride()) if shared else strides
