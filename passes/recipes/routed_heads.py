"""Heads that are routed: every token takes the shared ones and a few of the others (MoH). It needs training.

    p = softmax(W_r x)            over the n_r routed heads;  the k largest are picked
    s = h_s softmax(W_s x)        over the h_s shared heads (1 where there is but one)
    a = 2 softmax(W_a x)          weighs the two kinds (1 where no head is shared)
    g_h = a_1 s_h  shared         a_2 k p_h / Σ_picked p  picked         0  otherwise
    out = Σ_h g_h W_o,h o_h

The routers start at zero, where every head that is used has weight 1: with all heads picked the model is the original.
With fewer it is not: nothing tells yet which head a token can do without, the same heads are skipped for all of them.
With `ranking="text"` routers that skip heads start with a guess instead, the least squares fit to what the heads add:

    min_W Σ |W x - y|² + λ|W|²    y_h = log |W_o,h o_h| of a token    W_r = W, so small that all weights are about 1

Either way the model is worse than the original until it was trained on, with the routers:

    model = latent.convert(model, RoutedHeads(share=0.75)).train()
    loss = model(input_ids=ids, labels=ids).loss + 0.01 * latent.balance_loss(model)

With `layers="text"` layers use more or fewer heads than the share says, which holds for all together: some need all of
theirs, others hardly any. What a layer loses with n heads is how far the predictions move, KL(original || changed),
with this layer changed alone; losses of the text itself are too noisy to tell layers apart.

The cache is as large as before, since other tokens need the keys and values of all heads. What becomes less is the
work of decoding: keys are read only for heads that are used, and so are the columns of W_o and, where they are large,
the rows of W_q. Longer calls compute every head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import picked_heads as _picked_heads  # noqa: F401  # defines the operators that are called below
from ...rewriter.convert.attention import ConvertedAttention, Given, HeadGate
from ...rewriter.convert.calibrate import Calibration, silent
from ...rewriter.convert.contributions import contributions
from ...rewriter.convert.factored import formed
from ...rewriter.convert.heads_of_layers import cheapest, choices, costs_of
from ...rewriter.convert.layers import AttentionLayer, ConversionRefused, Decoder
from ...rewriter.convert.recipe import Needs, part, recipe

__all__ = ["HeadRouter", "RoutedHeads", "UntrainedRouter", "balance_loss"]

TOKENS = 512
"""On which it is measured what a layer loses."""
GUESS = 0.1
"""RMS of guessed scores: weights differ from 1 by about as much."""


class UntrainedRouter(UserWarning):
    """A model skips heads, and nobody has taught it yet which."""


@recipe
@dataclass(frozen=True)
class RoutedHeads:
    """Let every token use its own few heads besides those that all share; needs training.

    A token uses `share` of the heads, or the shared ones and `picked` more. `shared` is how many all tokens share, a
    quarter if not given. With `ranking="text"` these are the heads that add most on calibration text, and of the others
    the untrained router picks for every token those that it guesses to add most; else heads come in their own order.
    With `layers="text"` layers use more or fewer, as many in all, by what the untrained model loses with fewer in each.
    """

    share: float = 0.75
    picked: int | None = None
    shared: int | None = None
    ranking: Literal["first", "text"] = "first"
    layers: Literal["even", "text"] = "even"

    name: ClassVar[str] = "routed_heads"
    needs: ClassVar[Needs] = "training"
    exact: ClassVar[str] = "with all heads picked (share 1), until it is trained"

    def convert(self, attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration) -> None:
        """Put a HeadRouter into every attention. Raises ConversionRefused; warns where heads are skipped."""
        counts = [self.counts(layer) for layer in decoder.layers]
        for attention, layer in zip(attentions, decoder.layers, strict=True):
            if attention.gate is not None:
                raise ConversionRefused(self.name, f"the heads of {layer.path} are routed already")
        added = contributions(attentions, decoder, calibration, self.name) if self.ranking == "text" else {}

        def router(layer: AttentionLayer, shared: int, picked: int) -> HeadRouter:
            found, weight = added.get(layer.path), layer.query.weight
            order = list(range(layer.heads)) if found is None else found.order
            made = HeadRouter(weight.shape[-1], order, shared, picked).to(weight.device, weight.dtype)
            if found is not None and shared + picked < layer.heads:
                made.start(found.guess(order[shared:], GUESS))
            return made

        if self.layers == "text":
            counts = self._counts_by_text(attentions, decoder, calibration, counts, router)
        for attention, layer, (shared, picked) in zip(attentions, decoder.layers, counts, strict=True):
            attention.gate = router(layer, shared, picked)
            attention.gate.placed(attention)
        if any(shared + picked < layer.heads for layer, (shared, picked) in zip(decoder.layers, counts, strict=True)):
            warnings.warn(
                f"{self.name}: heads are skipped from now on, and the routers are untrained: the model is worse than "
                "it was until it was trained on with them. Add 0.01 * latent.balance_loss(model) to its loss.",
                UntrainedRouter,
                stacklevel=3,
            )

    def _counts_by_text(
        self,
        attentions: Sequence[ConvertedAttention],
        decoder: Decoder,
        calibration: Calibration,
        counts: Sequence[tuple[int, int]],
        router: Callable[[AttentionLayer, int, int], HeadRouter],
    ) -> list[tuple[int, int]]:
        """As many heads in all, in the layers that need them."""
        modules = {layer.path: attention for layer, attention in zip(decoder.layers, attentions, strict=True)}
        rows = max(1, TOKENS // calibration.required(self.name).shape[1])
        some = list(replace(calibration.spread(self.name, rows), progress=silent).batches(self.name, ""))
        wanted = [calibration.logits(modules, ids).log_softmax(-1) for ids in some]

        def lost(n: int, heads: int) -> float:
            shared = counts[n][0]
            attentions[n].gate = router(decoder.layers[n], shared, heads - shared)
            found = (calibration.logits(modules, ids).log_softmax(-1) for ids in some)
            total = sum(
                float(F.kl_div(one, other, reduction="sum", log_target=True))
                for one, other in zip(found, wanted, strict=True)
            )
            attentions[n].gate = None
            return total

        tried = [choices(shared + 1, layer.heads) for layer, (shared, _) in zip(decoder.layers, counts, strict=True)]
        costs = costs_of(tried, lost, lambda done, total: calibration.progress("heads of each layer", done, total))
        heads = cheapest(costs, sum(shared + picked for shared, picked in counts))
        return [(shared, n - shared) for n, (shared, _) in zip(heads, counts, strict=True)]

    def counts(self, layer: AttentionLayer) -> tuple[int, int]:
        """How many heads are shared, and how many of the others are picked."""
        heads = layer.heads
        shared = heads // 4 if self.shared is None else self.shared
        if not 0 <= shared < heads:
            raise ConversionRefused(layer.path, f"{shared} of its {heads} heads cannot be shared and any left to route")
        if not 0 < self.share <= 1:
            raise ConversionRefused("share", f"{self.share} is no share of the heads; give a number above 0, at most 1")
        picked = round(self.share * heads) - shared if self.picked is None else self.picked
        if not 1 <= picked <= heads - shared:
            raise ConversionRefused(
                layer.path,
                f"{picked} cannot be picked of its {heads} heads beside {shared} that are shared",
                "Give another share, or fewer shared heads.",
            )
        return shared, picked


@part
class HeadRouter(HeadGate):
    """Weights of the heads of each token; `order` are the heads, the shared ones first. Equal ones go in that order."""

    def __init__(self, hidden: int, order: Sequence[int], shared: int, picked: int) -> None:
        super().__init__()
        self.order, self.shared, self.picked = tuple(order), shared, picked
        self.sizes = (len(order) - shared, shared if shared > 1 else 0, 2 if shared else 0)
        """How many scores there are for the routed heads, the shared ones and the two kinds, in this order."""
        self.scores = nn.Linear(hidden, sum(self.sizes), bias=False)
        nn.init.zeros_(self.scores.weight)
        self.load: Tensor | None = None
        """The load loss of the last forward with gradients, until it is asked for."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies of the module are not parts of a graph."""
        return {**self.__dict__, "load": None}

    def start(self, guess_nC: Tensor) -> None:
        """Take scores W x of the routed heads as a start."""
        with torch.no_grad():
            self.scores.weight[: len(guess_nC)] = guess_nC.to(self.scores.weight)

    def settings(self) -> dict[str, object]:
        return {
            "hidden": self.scores.in_features,
            "order": list(self.order),
            "shared": self.shared,
            "picked": self.picked,
        }

    def placed(self, attention: ConvertedAttention) -> None:
        """The columns of a head are read as one piece."""
        weight = attention.output.weight
        weight.data = weight.data.t().contiguous().t()

    def forward(self, attention: ConvertedAttention, given: Given) -> Tensor:
        weights = self.weights(given.hidden)
        if self._skips(attention, given.hidden):
            return self.one_step(attention, given, weights)
        heads = attention.attention(given).unflatten(-1, (len(self.order), -1))
        output: Tensor = attention.output((heads * weights.unsqueeze(-1)).flatten(2))
        return output

    def _skips(self, attention: ConvertedAttention, hidden: Tensor) -> bool:
        """Whether heads can be left out: in decoding, and where no reach has caches of its own for them."""
        some = self.picked < self.sizes[0] and attention.reach is None
        return some and hidden.shape[1] == 1 and not torch.is_grad_enabled()

    def weights(self, hidden: Tensor) -> Tensor:
        """The weight of each head, 0 where it is skipped: [B, S, H]."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        route, share, balance = self.scores(hidden).to(dtype).split(self.sizes, -1)
        p = torch.softmax(route, -1)
        on = largest(p, self.picked)
        if torch.is_grad_enabled():
            self.load = load_loss(p, on.to(dtype))
        routed = p * on
        weights = routed * (self.picked / routed.sum(-1, keepdim=True))
        if self.shared:
            kinds = 2 * torch.softmax(balance, -1)
            shared = kinds[..., :1].expand(*kinds.shape[:-1], self.shared)
            if self.shared > 1:
                shared = shared * (self.shared * torch.softmax(share, -1))
            weights = torch.cat((shared, kinds[..., 1:] * weights), -1)
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        if places != sorted(places):
            weights = weights[..., torch.tensor(places, device=weights.device)]
        return weights.to(hidden.dtype)

    def one_step(self, attention: ConvertedAttention, given: Given, weights: Tensor) -> Tensor:
        """One token of each sequence, without what heads of weight 0 have."""
        form, op, used = attention.form, torch.ops.latent, weights != 0
        norm, weight = attention.query_norm, attention.query.weight
        projected = None
        if norm is None or not norm.together:
            projected = op.rows_of_used(given.hidden, weight, attention.query.bias, used)
        query = attention.queries(given, projected)
        key, value = (formed(kept) for kept in attention.remember(given))
        scoring = (form.scale, form.cap, attention.scoring.sinks)
        heads = op.attend_used(query, used[:, 0], key, value, given.mask, *scoring).transpose(1, 2)
        if attention.output_gate is not None:
            heads = attention.output_gate(heads, given.hidden)
        weighed = (weights[..., None] * heads).flatten(2)
        output: Tensor = op.columns_of_used(weighed, attention.output.weight, attention.output.bias, used)
        return output


def largest(p: Tensor, count: int) -> Tensor:
    """Which are the largest along the last dimension, of equal ones the first."""
    if torch.compiler.is_compiling():  # comparisons become part of the kernel around them, a sort does not
        one, other = p.unsqueeze(-1), p.unsqueeze(-2)
        at = torch.arange(p.shape[-1], device=p.device)
        return ((other > one) | ((other == one) & (at < at[:, None]))).sum(-1) < count
    best = p.sort(stable=True, dim=-1, descending=True).indices[..., :count]
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, best, True)


def load_loss(p: Tensor, on: Tensor) -> Tensor:
    """n² mean_i(mean_t p_i · mean_t on_i) of n routed heads; k where all are equally likely. Padding counts too."""
    n = p.shape[-1]
    return n * (p.flatten(0, -2).mean(0) * on.flatten(0, -2).mean(0)).sum()


def balance_loss(model: nn.Module) -> Tensor:
    """The load loss of the last forward, averaged over the layers, with its gradients; add 0.01 times it to the loss.

    It is handed out once for each forward. Holds for compiled models and for gradient checkpointing, but not with
    use_reentrant=True, which runs the forward without gradients. Raises RuntimeError where there is none.
    """
    routers = [module for module in model.modules() if isinstance(module, HeadRouter)]
    loads = [router.load for router in routers if router.load is not None]
    if not routers or len(loads) != len(routers):
        raise RuntimeError(
            "balance_loss: the model has no routed heads; convert it with RoutedHeads."
            if not routers
            else f"balance_loss: {len(routers) - len(loads)} of {len(routers)} routers saw no forward with gradients "
            "since the last call. Call it once after each forward of a training step; with gradient checkpointing "
            'pass gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
    for router in routers:
        router.load = None
    return torch.stack([load.to(loads[0].device) for load in loads]).mean()
