"""Traces masks, runs them, and compares what is proven with what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from latent.rewriter.masks.prove import Form, MaskProof, materialise, prove_mask
from latent.rewriter.masks.terms import batch_index
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


def trace(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in inputs]
    with mode:
        return make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)


def visible(mask: torch.Tensor, form: Form) -> torch.Tensor:
    return mask == 0 if form == "additive" else mask if form == "keep" else ~mask


def prove(function: Callable[..., torch.Tensor], form: Form = "keep", *inputs: torch.Tensor) -> MaskProof:
    """The proof of the traced mask [.., S, T], which is compared with the mask itself unless it is opaque."""
    gm = trace(function, *inputs)
    node = gm.graph.output_node().args[0]
    assert isinstance(node, fx.Node)
    rank = node.meta["val"].dim()
    proof = prove_mask(node, query_dim=rank - 2, key_dim=rank - 1, form=form)
    if not proof.opaque:
        seen = Seen(gm, inputs)
        assert torch.equal(seen.materialised(proof, node), visible(seen.values[node], form).expand(seen.shape(node)))
    return proof


class Seen(fx.Interpreter):
    """A run of a graph that remembers every value as it was made."""

    def __init__(self, gm: fx.GraphModule, inputs: Any) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self.run(*[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value

    def shape(self, node: fx.Node) -> torch.Size:
        return self.values[node].shape

    def materialised(self, proof: MaskProof, node: fx.Node) -> torch.Tensor:
        *batch, queries, keys = self.shape(node)
        sizes = {}
        for placeholder in node.graph.find_nodes(op="placeholder"):
            held, value = placeholder.meta.get("val"), self.values[placeholder]
            given = [(held, value)] if not isinstance(held, torch.Tensor) else zip(held.shape, value.shape, strict=True)
            for size, number in given:
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    sizes[size.node.expr] = int(number)
        return materialise(
            proof.terms,
            queries,
            keys,
            sizes=sizes,
            batch={batch_index(dim): size for dim, size in enumerate(batch)},
            loads=proof.loads,
            tensors={n: v for n, v in self.values.items() if isinstance(v, torch.Tensor)},
        )
