"""Fewer key heads than query heads: how keys and values reach their queries."""

from __future__ import annotations

import functools

import einops
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import MORE, program
from .inputs import SCALE, B, D, E, G, H, K, S, cross, grouped, grouped_tokens_first, one_key_head
from .references import attend, attend_tokens_first

more = functools.partial(program, MORE, sites=1)


def attention(query_BHSD: Tensor, key_BHTD: Tensor, value_BHTE: Tensor) -> Tensor:
    """Plain attention, once the heads fit."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1) @ value_BHTE


@more(grouped, reference=attend)
def grouped_repeat_interleave(query_BHSD, key_BKTD, value_BKTE):
    """repeat_interleave."""
    return attention(query_BHSD, key_BKTD.repeat_interleave(G, dim=1), value_BKTE.repeat_interleave(G, dim=1))


@more(grouped_tokens_first, reference=attend_tokens_first)
def grouped_tokens_first_expanded(query_BSHD, key_BTKD, value_BTKE):
    """Llama of Meta: expanded behind the key heads, in [B, T, K, D], and transposed afterwards."""
    b, t, k, _ = key_BTKD.shape
    key_BTHD = key_BTKD[:, :, :, None, :].expand(b, t, k, G, D).reshape(b, t, k * G, D)
    value_BTHE = value_BTKE[:, :, :, None, :].expand(b, t, k, G, E).reshape(b, t, k * G, E)
    query_BHSD, key_BHTD, value_BHTE = (x.transpose(1, 2) for x in (query_BSHD, key_BTHD, value_BTHE))
    return attention(query_BHSD, key_BHTD, value_BHTE).transpose(1, 2)


@more(grouped, reference=attend)
def grouped_broadcast(query_BHSD, key_BKTD, value_BKTE):
    """Five axes: the key heads get an axis of size one and broadcast in both products."""
    query_BKGSD = query_BHSD.view(B, K, G, S, D)
    return attention(query_BKGSD, key_BKTD.unsqueeze(2), value_BKTE.unsqueeze(2)).reshape(B, H, S, E)


@more(grouped, reference=attend)
def grouped_folded_queries(query_BHSD, key_BKTD, value_BKTE):
    """The queries of a group stand below each other: [B, K, G*S, D], one product for each key head."""
    return attention(query_BHSD.reshape(B, K, G * S, D), key_BKTD, value_BKTE).reshape(B, H, S, E)


@more(
    grouped,
    reference=lambda query, key, value: attend(query, torch.cat([key] * G, 1), torch.cat([value] * G, 1)),
)
def grouped_tiled(query_BHSD, key_BKTD, value_BKTE):
    """repeat, whose order is another one: query head h reads key head h modulo K."""
    return attention(query_BHSD, key_BKTD.repeat(1, G, 1, 1), value_BKTE.repeat(1, G, 1, 1))


@more(
    grouped,
    reference=lambda query, key, value: attend(query, torch.cat([key] * G, 1), torch.cat([value] * G, 1)),
)
def grouped_tiled_einops(query_BHSD, key_BKTD, value_BKTE):
    """The same order in einops: the query heads are split as (g k)."""
    query_BGKSD = einops.rearrange(query_BHSD, "b (g k) s d -> b g k s d", g=G)
    scores = einops.einsum(query_BGKSD, key_BKTD, "b g k s d, b k t d -> b g k s t") * SCALE
    output = einops.einsum(scores.softmax(-1), value_BKTE, "b g k s t, b k t e -> b g k s e")
    return einops.rearrange(output, "b g k s e -> b (g k) s e")


@more(grouped, reference=attend)
def grouped_einops_repeat(query_BHSD, key_BKTD, value_BKTE):
    """einops.repeat."""
    key_BHTD, value_BHTE = (einops.repeat(x, "b k t d -> b (k g) t d", g=G) for x in (key_BKTD, value_BKTE))
    return attention(query_BHSD, key_BHTD, value_BHTE)


@more(grouped, reference=attend)
def grouped_index_select(query_BHSD, key_BKTD, value_BKTE):
    """A list of head numbers selects the key head of each query head."""
    head_H = torch.arange(H) // G
    return attention(query_BHSD, key_BKTD.index_select(1, head_H), value_BKTE[:, head_H])


@more(grouped, reference=attend)
def grouped_stacked(query_BHSD, key_BKTD, value_BKTE):
    """Copies are stacked behind the key heads and flattened."""
    key_BHTD, value_BHTE = (torch.stack([x] * G, dim=2).flatten(1, 2) for x in (key_BKTD, value_BKTE))
    return attention(query_BHSD, key_BHTD, value_BHTE)


@more(grouped, reference=attend)
def grouped_then_called(query_BHSD, key_BKTD, value_BKTE):
    """The keys are repeated for a library call that could group by itself."""
    key_BHTD = key_BKTD[:, :, None].expand(-1, -1, G, -1, -1).flatten(1, 2)
    value_BHTE = value_BKTE[:, :, None].expand(-1, -1, G, -1, -1).flatten(1, 2)
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE)


@more(one_key_head, reference=attend)
def one_head_broadcast(query_BHSD, key_B1TD, value_B1TE):
    """Multi-query: the one key head broadcasts by itself."""
    return attention(query_BHSD, key_B1TD, value_B1TE)


@more(
    one_key_head,
    reference=lambda query, key, value: attend(query, key, value),
)
def one_head_folded(query_BHSD, key_B1TD, value_B1TE):
    """GPT-BigCode: all heads' queries stand below each other, and the key has no axis of heads."""
    key_BTD, value_BTE = key_B1TD.squeeze(1), value_B1TE.squeeze(1)
    scores_BST = torch.matmul(query_BHSD.reshape(B, H * S, D), key_BTD.transpose(-1, -2)) * SCALE
    return torch.bmm(scores_BST.softmax(-1), value_BTE).view(B, H, S, E)


@more(one_key_head, reference=attend)
def one_head_einsum(query_BHSD, key_B1TD, value_B1TE):
    """Shazeer's paper: the letter of heads is missing in key and value."""
    scores = torch.einsum("bhnk,bmk->bhnm", query_BHSD, key_B1TD[:, 0])
    return torch.einsum("bhnm,bmv->bhnv", (scores * SCALE).softmax(-1), value_B1TE[:, 0])


@more(
    cross,
    reference=lambda query, key, value: attend(query[:, :K], key[:, :1], value[:, :1]),
)
def one_head_sliced(query_BHSD, key_BHTD, value_BHTE):
    """Four query heads read the first key head; the other heads are not used."""
    key_BKTD, value_BKTE = key_BHTD[:, :1].expand(-1, K, -1, -1), value_BHTE[:, :1].expand(-1, K, -1, -1)
    return attention(query_BHSD[:, :K], key_BKTD, value_BKTE)
