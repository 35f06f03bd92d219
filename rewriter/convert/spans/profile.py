"""What heads lose when they no longer see a key: by gradients, by attention mass, and as a probe for retrieval heads.

    E_ij = -A_ij (Γ_ij - Σ_k Γ_ik A_ik) / (1 - A_ij),      Γ = ∂L/∂A = ∂L/∂o vᵀ

is the first-order change of the loss when key j leaves row i and the row is divided by what is left. Weights and Γ are
made again, layer after layer, from queries, keys, values and ∂L/∂o. Query heads that share keys are summed: a cache
shrinks only where all of them do without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import ConvertedAttention, Given
from ..calibrate import Calibration
from ..layers import Decoder
from ..memory import heads_of
from ..read_decoder import read_decoder
from .span import Span, seen

__all__ = ["SpanProfile", "influence", "profile_spans", "recall_gain", "retrieval_scores"]


@dataclass(frozen=True)
class SpanProfile:
    """For each layer [key heads, spans]: what lies outside of a span, summed over the tokens of the text."""

    influence: tuple[Tensor, ...]
    mass: tuple[Tensor, ...]
    tokens: int


def influence(weights: Tensor, gradient: Tensor) -> Tensor:
    """E, from the weights of attention and the gradient of the loss by them."""
    mean = (gradient * weights).sum(-1, keepdim=True)
    return -weights * (gradient - mean) / (1 - weights).clamp_min(1e-6)


def profile_spans(
    attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration, choices: Sequence[Span]
) -> SpanProfile:
    """What every key head loses with every one of the spans. The loss is that of the next token."""
    length = calibration.required("head spans").shape[1]
    positions = torch.arange(length)
    query, key = positions[:, None], positions[None, :]
    hidden = torch.stack([(key <= query) & ~seen(span, query, key) for span in choices]).flatten(1).float().t()
    sums = [torch.zeros(2, layer.groups, len(choices), dtype=torch.float64) for layer in decoder.layers]
    for batch in calibration.batches("head spans", "influence of keys"):
        for tokens in batch.split(1):
            for n, (weights, gradient) in enumerate(_weights_and_gradients(attentions, decoder, tokens)):
                for total, x in zip(sums[n], (influence(weights, gradient).abs(), weights), strict=True):
                    by_group = x.unflatten(1, (len(total), -1)).sum((0, 2)).flatten(1)
                    total += (by_group @ hidden.to(by_group)).double().cpu()
    tokens = calibration.required("head spans").numel()
    return SpanProfile(tuple(x[0] for x in sums), tuple(x[1] for x in sums), tokens)


def _weights_and_gradients(
    attentions: Sequence[ConvertedAttention], decoder: Decoder, tokens: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """A and Γ of each layer, [B, H, S, S], one layer after another."""
    probes: list[Tensor] = []
    with _in_place(decoder, attentions), _given_in(attentions) as given_to:
        handles = [a.output.register_forward_pre_hook(_with_probe(probes)) for a in attentions]
        try:
            with torch.enable_grad():
                output = decoder.model(input_ids=tokens, use_cache=False)
                logits = output if isinstance(output, Tensor) else output[0]
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")
                gradients = torch.autograd.grad(loss, probes)
        finally:
            for handle in handles:
                handle.remove()
    for attention, given, gradient in zip(attentions, given_to, gradients, strict=True):
        weights, value = _weights(attention, given)
        if (gate := attention.output_gate) is not None:
            with torch.no_grad():
                gradient = (gradient.unflatten(-1, (gate.heads, -1)) * gate.factor(given.hidden)).flatten(2)
        by_head = heads_of(gradient, attention.form.heads).float()
        yield weights, by_head @ value.float().transpose(-1, -2)


def _with_probe(probes: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    """A hook that adds zeros to the heads, by which the loss can be differentiated."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        probes.append(torch.zeros_like(args[0], requires_grad=True))
        return (args[0] + probes[-1],)

    return hook


def _weights(attention: ConvertedAttention, given: Given) -> tuple[Tensor, Tensor]:
    """The weights of attention [B, H, S, S] in a call, and the values of every head."""
    mask, turns = given.mask, given.turns
    with torch.no_grad():
        query = attention.queries(given)
        key, value = attention.memory.read(*attention.memory.new(given.hidden, turns), turns)
        repeats = query.shape[1] // key.shape[1]
        products = (query @ key.repeat_interleave(repeats, 1).transpose(-1, -2)).float()
        if mask is None:
            mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).tril()
        return attention.scoring.weights(products, mask), value.repeat_interleave(repeats, 1)


@contextlib.contextmanager
def _in_place(decoder: Decoder, attentions: Sequence[ConvertedAttention]) -> Iterator[None]:
    """Let the model compute with these attentions until the block ends."""
    own = [decoder.model.get_submodule(layer.path) for layer in decoder.layers]
    try:
        for layer, attention in zip(decoder.layers, attentions, strict=True):
            decoder.model.set_submodule(layer.path, attention.eval())
        yield
    finally:
        for layer, module in zip(decoder.layers, own, strict=True):
            decoder.model.set_submodule(layer.path, module)


@contextlib.contextmanager
def _given_in(attentions: Sequence[ConvertedAttention]) -> Iterator[list[Given]]:
    """What each attention is given, in the order of the calls."""
    calls: list[Given] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, ConvertedAttention)
        given = module.given(*args, **kwargs)
        calls.append(replace(given, hidden=given.hidden.detach()))

    handles = [attention.register_forward_pre_hook(hook, with_kwargs=True) for attention in attentions]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# ** retrieval heads **


def repeated_tokens(model: nn.Module, gap: int, rows: int, seed: int = 0) -> Tensor:
    """Random token strings of length `gap`, each twice: [rows, 2 gap]."""
    config: Any = model.config
    size = config.get_text_config().vocab_size
    once = torch.randint(0, size, (rows, gap), generator=torch.Generator().manual_seed(seed))
    return torch.cat((once, once), 1).to(next(model.parameters()).device)


def retrieval_scores(model: nn.Module, gap: int = 128, rows: int = 2, seed: int = 0) -> list[list[float]]:
    """For each layer and key head: the weight on the token that came next when the current one was last seen.

    The mean over the second of two equal random strings, of the query head that looks there most.
    """
    decoder = read_decoder(model)
    return scores_of([ConvertedAttention.of(layer) for layer in decoder.layers], decoder, gap, rows, seed)


def scores_of(
    attentions: Sequence[ConvertedAttention], decoder: Decoder, gap: int = 128, rows: int = 2, seed: int = 0
) -> list[list[float]]:
    """As `retrieval_scores`, of a decoder that was read."""
    totals = [torch.zeros(layer.groups) for layer in decoder.layers]
    for tokens in repeated_tokens(decoder.model, gap, rows, seed).split(1):
        with _in_place(decoder, attentions), _given_in(attentions) as given_to, torch.no_grad():
            decoder.model(input_ids=tokens, use_cache=False)
        for attention, given, total in zip(attentions, given_to, totals, strict=True):
            weights, _ = _weights(attention, given)
            at = torch.arange(gap, 2 * gap - 1, device=weights.device)
            looked = weights[0, :, at, at - gap + 1].mean(-1)
            total += looked.unflatten(0, (len(total), -1)).amax(1).cpu() / rows
    return [total.tolist() for total in totals]


def recall_gain(model: nn.Module, gap: int = 128, rows: int = 2, seed: int = 0) -> float:
    """How much less surprising a random string is when it comes again, in nats per token: NLL(first) - NLL(second)."""
    tokens = repeated_tokens(model, gap, rows, seed)
    with torch.no_grad():
        output: Any = model(input_ids=tokens, use_cache=False)
        logits = (output if isinstance(output, Tensor) else output[0])[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
    return float(losses[:, : gap - 1].mean() - losses[:, gap:].mean())
