"""What a part of a graph computes, by running it: linear maps are read off from unit vectors.

However a projection is spelled (fused, sliced, interleaved, transposed), W = f(I) - f(0) is its matrix. With biases set
to zero it is so exactly: every product with a unit vector is one weight, and the others are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..axes import Dim, flat, size_of
from .layers import Affine

__all__ = ["Function", "affine_map", "arranged", "part_of", "placed_as", "without_biases"]

Function = Callable[[Tensor], Tensor]


def part_of(
    gm: fx.GraphModule,
    source: fx.Node,
    target: fx.Node,
    given: Mapping[fx.Node, Any],
    same: Mapping[fx.Node, fx.Node] | None = None,
) -> Function:
    """`target` as a function of `source`; `given` are values of other nodes, the graph's inputs among them.

    A node in `same` is left out: its value is that of the node that it is mapped to.
    """
    same = same or {}
    needed: set[fx.Node] = set()
    pending = [target]
    while pending:
        node = pending.pop()
        if node in needed or node is source or node in given:
            continue
        needed.add(node)
        pending.extend([same[node]] if node in same else node.all_input_nodes)
    order = [node for node in gm.graph.nodes if node in needed]

    def run(x: Tensor) -> Tensor:
        interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        interpreter.env.update({**given, source: x})
        with torch.no_grad():
            for node in order:
                interpreter.env[node] = interpreter.env[same[node]] if node in same else interpreter.run_node(node)
        result: Tensor = interpreter.env[target]
        return result.to(x.dtype) if x.is_floating_point() else result  # rotations in float32 and the like

    return run


def without_biases(given: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """The same values with zeros for vectors among the parameters."""
    return {
        node: torch.zeros_like(value) if isinstance(value, nn.Parameter) and value.ndim == 1 else value
        for node, value in given.items()
    }


def affine_map(function: Function, unbiased: Function, like: Tensor) -> Affine | None:
    """The matrix and bias of a function of token vectors, [B, S, C] -> [B, S, ...]; None where it is not affine.

    `unbiased` is the function with its biases set to zero; where other vectors went with them, the function itself is
    asked. `like` is an input that both take; its shape is kept, so that a specialised graph can be run.
    """
    for linear in (unbiased, function):
        if (found := _affine_map(function, linear, like)) is not None:
            return found
    return None


def _affine_map(function: Function, linear: Function, like: Tensor) -> Affine | None:
    batch, tokens, width = like.shape
    at_once = batch * tokens
    bias, own = function(torch.zeros_like(like))[0, 0], linear(torch.zeros_like(like))[0, 0]
    columns = []
    for start in range(0, width, at_once):
        count = min(at_once, width - start)
        units = torch.zeros(at_once, width, dtype=like.dtype, device=like.device)
        units[torch.arange(count), start + torch.arange(count)] = 1
        made = linear(units.view(batch, tokens, width))
        columns.append(made.flatten(0, 1)[:count] - own)
    weight = torch.cat(columns).movedim(0, -1)
    generator = torch.Generator(like.device).manual_seed(0)
    x = torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)
    wanted, found = function(x), torch.tensordot(x, weight, ([-1], [-1])) + bias
    error = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-30))
    if error > max(8 * torch.finfo(like.dtype).eps, 1e-5):  # parts of a wide model may run in float32
        return None
    return Affine(weight.contiguous(), bias if bool(bias.any()) else None)


def arranged(x: Tensor, layout: Sequence[Dim], order: Sequence[Dim]) -> Tensor:
    """A tensor with a dimension for each entry of `order`; other axes are repetitions, of which one is taken."""
    axes = flat(layout)
    x = x.reshape([int(axis.size) for axis in axes])
    wanted = flat(order)
    kept = [axis for axis in axes if axis in wanted]
    x = x[tuple(slice(None) if axis in wanted else 0 for axis in axes)]
    x = x.permute([kept.index(axis) for axis in wanted])
    return x.reshape([int(size_of(dim)) for dim in order])


def placed_as(x: Tensor, order: Sequence[Dim], layout: Sequence[Dim]) -> Tensor:
    """A tensor with a dimension for each entry of `order`, in another layout of the same axes."""
    axes, wanted = flat(order), flat(layout)
    x = x.reshape([int(axis.size) for axis in axes])
    return x.permute([axes.index(axis) for axis in wanted])
