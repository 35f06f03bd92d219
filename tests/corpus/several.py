"""More than one attention in a program, or attention beside other uses of its parts: one site for each softmax."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .base import MORE, Inputs, Rand, program
from .inputs import HEADS, SCALE, B, C, D, H, S, cross, past, same, tokens
from .references import attend, attend_channels

more = functools.partial(program, MORE)


def attention(query_BHSD: Tensor, key_BHTD: Tensor, value_BHTE: Tensor) -> Tensor:
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1) @ value_BHTE


def with_context(rand: Rand) -> Inputs:
    """query_BHSD, key_BHSD, value_BHSD, and key_BHTD, value_BHTD of a context."""
    return *same(rand), rand(B, H, 7, D), rand(B, H, 7, D)


@more(with_context, sites=2, reference=lambda q, k, v, key, value: attend(attend(q, k, v, causal=True), key, value))
def self_then_cross(query_BHSD, key_BHSD, value_BHSD, key_BHTD, value_BHTD):
    """Causal self attention, whose output asks the context."""
    scores = (query_BHSD @ key_BHSD.mT * SCALE).masked_fill(~past(), float("-inf"))
    return attention(scores.softmax(-1) @ value_BHSD, key_BHTD, value_BHTD)


@more(with_context, sites=2, reference=lambda q, k, v, key, value: attend(q, k, v) + 0.5 * attend(q, key, value))
def two_sources_added(query_BHSD, key_BHSD, value_BHSD, key_BHTD, value_BHTD):
    """IP-Adapter: one query asks two sources with a softmax each, and the outputs are added."""
    image = F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTD)
    return attention(query_BHSD, key_BHSD, value_BHSD) + 0.5 * image


@more(
    with_context,
    sites=1,
    reference=lambda q, k, v, key, value: attend(q, torch.cat([k, key], 2), torch.cat([v, value], 2)),
)
def two_sources_one_softmax(query_BHSD, key_BHSD, value_BHSD, key_BHTD, value_BHTD):
    """The scores of two sources are concatenated before one softmax, the weights are split after it."""
    scores = torch.cat([query_BHSD @ key_BHSD.mT, query_BHSD @ key_BHTD.mT], -1) * SCALE
    weights, context_weights = scores.softmax(-1).split([S, 7], -1)
    return weights @ value_BHSD + context_weights @ value_BHTD


def two_values(rand: Rand) -> Inputs:
    return *cross(rand), cross(rand)[2]


@more(
    two_values,
    sites=1,
    reference=lambda query, key, value, other: (attend(query, key, value), attend(query, key, other)),
)
def two_values_one_softmax(query_BHSD, key_BHTD, value_BHTE, other_BHTE):
    """One softmax weighs two values: it counts once."""
    weights = (query_BHSD @ key_BHTD.mT * SCALE).softmax(-1)
    return weights @ value_BHTE, weights @ other_BHTE


def two_queries(rand: Rand) -> Inputs:
    return *cross(rand), rand(B, H, S, D)


@more(
    two_queries,
    sites=2,
    reference=lambda query, key, value, other: (attend(query, key, value), attend(other, key, value)),
)
def two_queries_shared_keys(query_BHSD, key_BHTD, value_BHTE, other_BHSD):
    """Two layers read one cache of keys and values."""
    return attention(query_BHSD, key_BHTD, value_BHTE), attention(other_BHSD, key_BHTD, value_BHTE)


@more(
    with_context,
    sites=2,
    reference=lambda q, k, v, key, value: attend(attend(q, k, v), key, value),
    dynamic_ok=False,
    reason="Dynamo 2.13 lifts the global scale, a symbolic float, into one checkpointed function, not into two",
)
def two_under_checkpoint(query_BHSD, key_BHSD, value_BHSD, key_BHTD, value_BHTD):
    """Both run under activation checkpointing, which traces as a function of its own."""
    query_BHSD = checkpoint(attention, query_BHSD, key_BHSD, value_BHSD, use_reentrant=False)
    return checkpoint(attention, query_BHSD, key_BHTD, value_BHTD, use_reentrant=False)


@more(
    two_queries,
    sites=2,
    reference=lambda query, key, value, other: attend(query, key, value) - 0.3 * attend(other, key * 2, value),
)
def difference_of_two(query_BHSD, key_BHTD, value_BHTE, other_BHSD):
    """Differential attention with two calls of a function: the outputs are subtracted."""
    return attention(query_BHSD, key_BHTD, value_BHTE) - 0.3 * attention(other_BHSD, key_BHTD * 2, value_BHTE)


@more(two_queries, sites=2)
def scores_passed_on(query_BHSD, key_BHTD, value_BHTE, other_BHSD):
    """RealFormer: the scores of the first attention are added to those of the second."""
    scores = query_BHSD @ key_BHTD.mT * SCALE
    output = scores.softmax(-1) @ value_BHTE
    scores = other_BHSD @ key_BHTD.mT * SCALE + scores
    return output, scores.softmax(-1) @ value_BHTE


@more(cross, sites=3, reference=lambda query, key, value: attend(query, key, value)[:, :3])
def loop_over_heads(query_BHSD, key_BHTD, value_BHTE):
    """Three heads in a Python loop, stacked."""
    heads = [attention(query_BHSD[:, h], key_BHTD[:, h], value_BHTE[:, h]) for h in range(3)]
    return torch.stack(heads, dim=1)


@more(cross, sites=2, reference=attend)
def loop_over_slices(query_BHSD, key_BHTD, value_BHTE):
    """diffusers, sliced: each sequence of the batch writes its part of an empty output."""
    output = value_BHTE.new_zeros(B, H, S, value_BHTE.shape[-1])
    for i in range(B):
        output[i] = attention(query_BHSD[i], key_BHTD[i], value_BHTE[i])
    return output


@more(cross, sites=2, reference=attend)
def loop_over_queries(query_BHSD, key_BHTD, value_BHTE):
    """Two chunks of queries, concatenated, to save memory."""
    return torch.cat([attention(chunk, key_BHTD, value_BHTE) for chunk in query_BHSD.split(S // 2, dim=2)], 2)


@more(tokens, sites=1)
class AttentionAndRouter(nn.Module):
    """An attention, then a mixture of experts: the softmax of the router is no site, nor is that over classes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.classes = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, 9)
        self.router, self.experts = nn.Linear(C, 4), nn.Parameter(torch.randn(4, C, C) / C)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (y.unflatten(-1, (HEADS, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = (query @ key.mT / math.sqrt(D)).masked_fill(~past(x.shape[1]), float("-inf"))
        x = x + self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return self.mixture(x)

    def mixture(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        outputs = torch.einsum("bsc,bskcf->bskf", x, self.experts[chosen])
        return self.classes(x + (outputs * gates[..., None]).sum(-2)).softmax(-1)

    def reference(self, x: Tensor) -> Tensor:
        return self.mixture(x + self.out(attend_channels(*self.qkv(x).chunk(3, -1), HEADS, causal=True)))
