"""How many attentions a forward executes, seen from the tensor operations alone.

A softmax is an attention when its result, after operations that keep it a table of weights (dropout, casts, layout,
slices, masks), is multiplied as a matrix with something else that is not itself made from the weights. A router's
softmax is not: its weights are selected with topk, or scale their operand element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SOFTMAXES = {"_softmax", "_safe_softmax", "_masked_softmax"}
FUSED = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
}
PRODUCTS = {"bmm", "mm", "baddbmm", "addmm", "matmul", "mv", "dot"}
# What leaves a table of weights a table of weights, over the same keys.
CARRIERS = {
    *("_to_copy", "to", "clone", "alias", "detach", "contiguous", "native_dropout", "dropout", "bernoulli"),
    *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "as_strided"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "cat", "stack", "constant_pad_nd", "narrow", "chunk"),
    *("mul", "div", "sub", "add", "neg", "where", "masked_fill", "nan_to_num", "copy", "lift_fresh", "repeat"),
    *("mul_", "div_", "sub_", "add_", "masked_fill_", "copy_", "unfold", "index", "slice_scatter"),
}
ELEMENTWISE = {"mul", "div", "sub", "add", "where", "masked_fill", "mul_", "div_", "sub_", "add_", "copy_"}


@dataclass
class Softmax:
    """One softmax that was executed: where, over how many entries, and whether a product consumed it."""

    module: str
    shape: tuple[int, ...]
    contracted: bool = False
    fused: bool = False
    spread: float = 0.0
    """The mean of the largest weight of a row, relative to a uniform row; 1 says nothing was learned from scores."""


@dataclass(frozen=True)
class Counts:
    """The softmaxes of one forward, attentions apart from the others."""

    attentions: tuple[Softmax, ...]
    others: tuple[Softmax, ...]


class _Watch(TorchDispatchMode):
    """Follows every softmax to the product that consumes it."""

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where = where
        self.sites: list[Softmax] = []
        # Tensors are kept alive while watching, so that an identity is never used twice.
        self.weights: dict[int, frozenset[int]] = {}
        self.log_sums: dict[int, torch.Tensor] = {}
        self.log_weights: dict[int, torch.Tensor] = {}
        self.alive: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._see(func._schema.name.split("::")[-1], inputs, outputs)
        return result

    def _see(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        if not outputs:
            return
        if name in FUSED:
            self._open(outputs[0], inputs[0].shape, fused=True)
        elif name in SOFTMAXES or (name == "exp" and id(inputs[0]) in self.log_weights):
            self._open(outputs[0], outputs[0].shape)
        elif name in PRODUCTS:
            self._product(inputs)
        elif name in CARRIERS:
            self._carry(name, inputs, outputs)
        if name in ("logsumexp", "_log_softmax"):
            self._keep(self.log_sums if name == "logsumexp" else self.log_weights, outputs[0])
        elif name in ("sub", "view", "unsqueeze") and any(id(tensor) in self.log_sums for tensor in inputs):
            self._keep(self.log_weights if name == "sub" else self.log_sums, outputs[0])

    def _keep(self, table: dict[int, torch.Tensor], tensor: torch.Tensor) -> None:
        table[id(tensor)] = tensor

    def _open(self, tensor: torch.Tensor, shape: torch.Size, *, fused: bool = False) -> None:
        site = Softmax(self.where(), tuple(shape), contracted=fused, fused=fused)
        if not fused and tensor.numel():
            site.spread = float(tensor.float().amax(-1).mean() * tensor.shape[-1])
        self.sites.append(site)
        if not fused:
            self._mark(tensor, frozenset({len(self.sites) - 1}))

    def _mark(self, tensor: torch.Tensor, sites: frozenset[int]) -> None:
        self.weights[id(tensor)] = sites
        self.alive.append(tensor)

    def _sites(self, tensor: torch.Tensor) -> frozenset[int]:
        return self.weights.get(id(tensor), frozenset())

    def _product(self, inputs: list[torch.Tensor]) -> None:
        factors = inputs[-2:]
        for tensor in factors:
            for site in self._sites(tensor):
                self.sites[site].contracted = True

    def _carry(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        carried = frozenset[int]().union(*(self._sites(tensor) for tensor in inputs))
        if not carried:
            return
        largest = max(tensor.numel() for tensor in inputs if self._sites(tensor))
        if name in ELEMENTWISE and outputs[0].numel() != largest:
            return  # weights spread over a wider operand: a gate, not a table of weights any more
        for tensor in outputs:
            self._mark(tensor, carried)


def count(model: nn.Module, inputs: Mapping[str, Any]) -> Counts:
    """Run one forward and tell its softmaxes apart."""
    stack: list[str] = []
    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        hooks.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    watch = _Watch(lambda: stack[-1] if stack else "")
    try:
        with torch.no_grad(), watch:
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    attentions = tuple(site for site in watch.sites if site.contracted)
    return Counts(attentions, tuple(site for site in watch.sites if not site.contracted))


def attention_calls(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """How many softmax attentions one forward executes."""
    return len(count(model, inputs).attentions)
