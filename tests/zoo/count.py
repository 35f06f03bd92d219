"""How many attentions a forward executes, seen from the tensor operations alone.

A softmax is an attention when its scores come from a product of two computed matrices, and its result, after
operations that keep it a table of weights (dropout, casts, layout, slices, masks), is a factor of another product.
A router's softmax is neither: its scores come from a product with a parameter, its weights are selected with topk or
scale their operand element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SOFTMAXES = frozenset(("_softmax", "_safe_softmax", "_masked_softmax"))
FUSED = frozenset(
    (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math",
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
    )
)
PRODUCTS = frozenset(("bmm", "mm", "baddbmm", "addmm", "matmul", "mv", "dot"))
# What leaves a table a table over the same keys: casts and dropout, layout, parts and joins, functions of one entry.
CARRIERS = frozenset(
    (
        *(
            "_to_copy",
            "to",
            "clone",
            "alias",
            "detach",
            "contiguous",
            "copy",
            "lift_fresh",
            "native_dropout",
            "dropout",
        ),
        *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze"),
        *(
            "as_strided",
            "repeat",
            "unfold",
            "slice",
            "select",
            "split",
            "split_with_sizes",
            "unbind",
            "narrow",
            "chunk",
        ),
        *("cat", "stack", "constant_pad_nd", "slice_scatter", "index", "index_select", "gather", "scatter"),
        *("neg", "abs", "pow", "sqrt", "tanh", "sigmoid", "clamp", "nan_to_num"),
    )
)
# The same, of two operands: only while the other operand does not make the table wider.
ELEMENTWISE = frozenset(
    (
        *("mul", "div", "sub", "add", "maximum", "minimum", "where", "masked_fill"),
        *("mul_", "div_", "sub_", "add_", "masked_fill_", "copy_"),
    )
)


@dataclass
class Softmax:
    """One softmax that was executed: where, over how many entries, and whether a product consumed it."""

    module: str
    shape: tuple[int, ...]
    scored: bool = False
    """The scores are a product of two matrices that are not parameters."""
    contracted: bool = False
    """The weights are a factor of a product."""
    fused: bool = False
    """One closed operation did all of it."""
    spread: float = 0.0
    """The largest weight of a row, relative to a uniform row, in the mean: 1 says all rows are uniform."""

    @property
    def attends(self) -> bool:
        return self.scored and self.contracted


@dataclass(frozen=True)
class Counts:
    """The softmaxes of one forward, attentions apart from the others."""

    attentions: tuple[Softmax, ...]
    others: tuple[Softmax, ...]


@dataclass(frozen=True)
class _Facts:
    """What is known about one tensor."""

    sites: frozenset[int] = frozenset()
    """The softmaxes whose weights it holds."""
    scores: bool = False
    parameter: bool = False
    log_sum: bool = False
    log_weights: bool = False


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every softmax from the product that scores to the product that consumes."""

    def __init__(self, parameters: Iterable[torch.Tensor], where: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where = where
        self.sites: list[Softmax] = []
        self.facts: dict[int, _Facts] = {}
        # Tensors are kept alive while watching, so that an identity is never used twice.
        self.alive: list[torch.Tensor] = []
        for parameter in parameters:
            self._learn(parameter, _Facts(parameter=True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if inputs and outputs:
            self._see(func._schema.name.split("::")[-1], inputs, outputs)
        return result

    def _learn(self, tensor: torch.Tensor, facts: _Facts) -> None:
        self.facts[id(tensor)] = facts
        self.alive.append(tensor)

    def _about(self, tensor: torch.Tensor) -> _Facts:
        return self.facts.get(id(tensor), _Facts())

    def _see(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        facts = [self._about(tensor) for tensor in inputs]
        if name in FUSED:
            shape = () if inputs[0].is_nested else tuple(inputs[0].shape)
            self.sites.append(Softmax(self.where(), shape, scored=True, contracted=True, fused=True))
        elif name in SOFTMAXES or (name == "exp" and facts[0].log_weights):
            self._open(outputs[0], facts[0].scores)
        elif name in PRODUCTS:
            for site in frozenset().union(*(fact.sites for fact in facts[-2:])):
                self.sites[site].contracted = True
            self._learn(outputs[0], _Facts(scores=not any(fact.parameter for fact in facts[-2:])))
        elif name in ("logsumexp", "_log_softmax"):
            log_weights = name == "_log_softmax"
            self._learn(outputs[0], _Facts(scores=facts[0].scores, log_sum=not log_weights, log_weights=log_weights))
        elif name in CARRIERS | ELEMENTWISE:
            self._carry(name, inputs, facts, outputs)

    def _open(self, tensor: torch.Tensor, scored: bool) -> None:
        site = Softmax(self.where(), tuple(tensor.shape), scored=scored)
        if tensor.numel():
            site.spread = float(tensor.float().amax(-1).mean() * tensor.shape[-1])
        self.sites.append(site)
        self._learn(tensor, _Facts(sites=frozenset({len(self.sites) - 1})))

    def _carry(self, name: str, inputs: list[torch.Tensor], facts: list[_Facts], outputs: list[torch.Tensor]) -> None:
        sites = frozenset[int]().union(*(fact.sites for fact in facts))
        widest = max((tensor.numel() for tensor, fact in zip(inputs, facts, strict=True) if fact.sites), default=0)
        if name in ELEMENTWISE and outputs[0].numel() != widest:
            sites = frozenset()  # weights spread over a wider operand: a gate, not a table of weights any more
        log_sum = any(fact.log_sum for fact in facts)
        carried = _Facts(
            sites=sites,
            scores=any(fact.scores for fact in facts),
            parameter=all(fact.parameter for fact in facts),
            log_sum=log_sum and name not in ELEMENTWISE,
            log_weights=any(fact.log_weights for fact in facts) or (log_sum and name == "sub"),
        )
        for tensor in outputs:
            self._learn(tensor, carried)


@contextmanager
def _paths(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules being executed, outermost first, kept up to date while inside."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def count(model: nn.Module, inputs: Mapping[str, Any]) -> Counts:
    """Run one forward and tell its softmaxes apart."""
    with _paths(model) as stack:
        watch = _Watch(model.parameters(), lambda: stack[-1] if stack else "")
        with torch.no_grad(), watch:
            model(**inputs)
    attentions = tuple(site for site in watch.sites if site.attends)
    return Counts(attentions, tuple(site for site in watch.sites if not site.attends))


def attention_calls(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """How many softmax attentions one forward executes."""
    return len(count(model, inputs).attentions)
