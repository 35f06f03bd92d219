"""What follows an attention, read off as weights: the projection of its heads, and a gate before it.

out = W_o (o · f(W_g x)) + b_o
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..axes import size_of
from ..contractions import contraction
from ..layouts import is_cast, is_tensor, layout_step
from ..nodes import args_of
from ..sites import AttentionSite
from .layers import Affine, ConversionRefused, GateFacts
from .linear_maps import Function, affine_map, part_of, placed_as, without_biases

__all__ = ["read_output"]

aten = torch.ops.aten

_PASSES = {aten.dropout.default, aten.clone.default, aten.detach.default, aten.contiguous.default}

_GATES: dict[Any, str] = {
    aten.sigmoid.default: "sigmoid",
    aten.softplus.default: "softplus",
    aten.silu.default: "silu",
    aten.tanh.default: "tanh",
    aten.relu.default: "relu",
}


def read_output(
    gm: fx.GraphModule, site: AttentionSite, inputs: Mapping[fx.Node, Any], source: fx.Node, path: str
) -> tuple[Affine, GateFacts | None]:
    """[C, H, e] from the heads to what follows them, and what they are multiplied by on the way, made of `source`.

    Raises ConversionRefused, for the module at `path`, where anything else follows.
    """
    return _OutputReader(gm, site, dict(inputs), source, path).read()


@dataclass(frozen=True)
class _OutputReader:
    gm: fx.GraphModule
    site: AttentionSite
    inputs: dict[fx.Node, Any]
    source: fx.Node
    path: str

    def refuse(self, reason: str) -> ConversionRefused:
        return ConversionRefused(self.path, reason)

    def read(self) -> tuple[Affine, GateFacts | None]:
        site, axes = self.site, self.site.axes
        end, gate = _linear_after(site.output)
        if end is None:
            raise ConversionRefused(
                self.path, "what follows the attention is not a linear layer, nor a gate and a linear layer"
            )
        like = site.output.meta["val"]
        heads, width = axes.heads + axes.groups, axes.value_width
        layout = site.space.resolve_layout(site.output_layout)
        count, columns = int(size_of(heads)), int(size_of(width))
        batch, tokens = int(size_of(axes.batch)), int(size_of(axes.queries))
        skipped = {} if gate is None else {gate.product: gate.heads}

        def function(inputs: dict[fx.Node, Any]) -> Function:
            run = part_of(self.gm, site.output, end, inputs, skipped)

            def outputs(x: Tensor) -> Tensor:
                placed = placed_as(x, (axes.batch, axes.queries, heads, width), layout)
                return run(placed.reshape(like.shape)).reshape(batch, tokens, -1)

            return outputs

        empty = torch.empty((batch, tokens, count * columns), dtype=like.dtype, device=like.device)
        found = affine_map(function(self.inputs), function(without_biases(self.inputs)), empty)
        if found is None:
            raise self.refuse("what follows the attention is no linear map of its heads")
        output = Affine(found.weight.view(-1, count, columns), found.bias)
        return output, None if gate is None else self._gate(gate)

    def _gate(self, gate: _Gate) -> GateFacts:
        """What the heads are multiplied by, in their order: only layout operations lie between them and the product."""
        site, axes = self.site, self.site.axes
        order = (axes.batch, axes.queries, axes.heads + axes.groups, axes.value_width)
        sizes = [int(size_of(dim)) for dim in order]
        like = site.output.meta["val"]
        numbers = torch.arange(math.prod(sizes), dtype=torch.float64, device=like.device).view(sizes)
        placed = placed_as(numbers, order, site.space.resolve_layout(site.output_layout)).reshape(like.shape)
        casts = {node: args_of(node)[0] for node in gate.way if is_cast(node)}
        places = part_of(self.gm, site.output, gate.heads, self.inputs, casts)(placed).long().flatten()
        ones = torch.ones(tuple(gate.heads.meta["val"].shape), dtype=like.dtype, device=like.device)
        skipped = {} if gate.function is None else {gate.function: args_of(gate.function)[0]}

        def function(inputs: dict[fx.Node, Any]) -> Function:
            run = part_of(self.gm, self.source, gate.product, inputs | {gate.heads: ones}, skipped)

            def factors(x: Tensor) -> Tensor:
                made = run(x).flatten()
                return torch.empty_like(made).index_put((places,), made).view(sizes)

            return factors

        hidden = self.source.meta["val"]
        empty = torch.empty(tuple(hidden.shape), dtype=hidden.dtype, device=hidden.device)
        found = affine_map(function(self.inputs), function(without_biases(self.inputs)), empty)
        if found is None or gate.function is None:
            raise ConversionRefused(
                self.path, "the gate between the attention and its output is no function of a linear layer"
            )
        if bool((found.weight == found.weight[:, :1]).all()):  # one number for each head
            found = Affine(found.weight[:, :1], None if found.bias is None else found.bias[:, :1])
        return GateFacts(found, _GATES[gate.function.target])


@dataclass(frozen=True)
class _Gate:
    """heads · function(…): the nodes of the product, of its two sides, and of those between the attention and it."""

    product: fx.Node
    heads: fx.Node
    function: fx.Node | None
    way: tuple[fx.Node, ...]


def _gate_of(product: fx.Node, heads: fx.Node, way: tuple[fx.Node, ...]) -> _Gate | None:
    """A product of the heads with a tensor that does not widen them."""
    if product.target is not aten.mul.Tensor or product.meta["val"].shape != heads.meta["val"].shape:
        return None
    factor = next((n for n in args_of(product)[:2] if n is not heads), None)
    if factor is None or not is_tensor(factor):
        return None
    while layout_step(factor) is not None or is_cast(factor):
        factor = args_of(factor)[0]
    return _Gate(product, heads, factor if factor.target in _GATES else None, way)


def _linear_after(node: fx.Node) -> tuple[fx.Node | None, _Gate | None]:
    """The projection that reads the heads, with its bias, and the gate before it; None where anything else does."""
    gate: _Gate | None = None
    way: list[fx.Node] = []
    while True:
        users = [user for user in node.users if is_tensor(user)]
        if len(users) != 1:
            return None, None
        before, node = node, users[0]
        if contraction(node) is not None:
            break
        if gate is None and (gate := _gate_of(node, before, tuple(way))) is not None:
            continue
        if layout_step(node) is None and not is_cast(node) and node.target not in _PASSES:
            return None, None
        way.append(node)
    while len(users := [user for user in node.users if is_tensor(user)]) == 1:
        if layout_step(users[0]) is None and not _adds_bias(users[0], node):
            break
        node = users[0]
    return node, gate


def _adds_bias(node: fx.Node, product: fx.Node) -> bool:
    """A vector is added, no residual."""
    others = [n for n in node.all_input_nodes if n is not product]
    return node.target is aten.add.Tensor and len(others) == 1 and others[0].meta["val"].ndim == 1
