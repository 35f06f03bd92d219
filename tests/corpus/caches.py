"""Key and value caches: concatenated, written in place, gathered."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import MORE, Inputs, Rand, program
from .inputs import SCALE, B, D, H, T
from .references import attend

more = functools.partial(program, MORE, sites=1)

NEW, OLD = 3, T - 3
"""Tokens of this step, and tokens the cache holds before."""


def attention(query_BHSD: Tensor, key_BHTD: Tensor, value_BHTE: Tensor, mask: Tensor | float = 0.0) -> Tensor:
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE + mask).softmax(-1) @ value_BHTE


def step(rand: Rand, *, stored: int = OLD) -> Inputs:
    """query_BHSD, key_BHSD, value_BHSD of this step, and two caches of `stored` tokens."""
    new = (rand(B, H, NEW, D) for _ in range(3))
    return *new, rand(B, H, stored, D), rand(B, H, stored, D)


def step_buffer(rand: Rand) -> Inputs:
    """The same with caches of four tokens more than are used, zero where nothing is written yet."""
    query, key, value, *caches = step(rand, stored=T + 4)
    for cache in caches:
        cache[:, :, OLD:] = 0
    return query, key, value, *caches


def step_buffer_position(rand: Rand) -> Inputs:
    """The same and the positions of the new tokens."""
    return *step_buffer(rand), torch.arange(OLD, OLD + NEW)


def concatenated(query, key, value, key_cache, value_cache, *_):
    """The definition: what was stored and what is new, one after the other, causal."""
    key, value = torch.cat([key_cache[:, :, :OLD], key], 2), torch.cat([value_cache[:, :, :OLD], value], 2)
    return attend(query, key, value, torch.ones(NEW, OLD + NEW, dtype=torch.bool).tril(OLD))


def visible(position_S: Tensor, size: int) -> Tensor:
    """[S, size], 0 where the key is not later than the query, -inf where it is."""
    return torch.where(torch.arange(size)[None, :] <= position_S[:, None], 0.0, float("-inf"))


@more(step, reference=lambda *x: (concatenated(*x), torch.cat([x[3], x[1]], 2), torch.cat([x[4], x[2]], 2)))
def cache_concatenated(query_BHSD, key_BHSD, value_BHSD, key_cache, value_cache):
    """GPT-2: concatenated, and returned for the next step."""
    key, value = torch.cat((key_cache, key_BHSD), dim=-2), torch.cat((value_cache, value_BHSD), dim=-2)
    mask = torch.full((NEW, OLD + NEW), float("-inf")).triu(OLD + 1)
    return attention(query_BHSD, key, value, mask), key, value


@more(step_buffer_position, reference=concatenated)
def cache_index_copy(query_BHSD, key_BHSD, value_BHSD, key_cache, value_cache, position_S):
    """A static cache written by index_copy_; all of it is read, the mask hides what is empty."""
    key_cache.index_copy_(2, position_S, key_BHSD)
    value_cache.index_copy_(2, position_S, value_BHSD)
    return attention(query_BHSD, key_cache, value_cache, visible(position_S, T + 4))


@more(step_buffer_position, reference=concatenated)
def cache_gpt_fast(query_BHSD, key_BHSD, value_BHSD, key_cache, value_cache, position_S):
    """gpt-fast: positions are indices of an assignment, the mask is indexed by them, the call reads all."""
    key_cache[:, :, position_S] = key_BHSD
    value_cache[:, :, position_S] = value_BHSD
    mask_1ST = torch.tril(torch.ones(T + 4, T + 4, dtype=torch.bool))[None, position_S]
    return F.scaled_dot_product_attention(query_BHSD, key_cache, value_cache, attn_mask=mask_1ST)


@more(step_buffer, reference=concatenated)
def cache_slice_assigned(query_BHSD, key_BHSD, value_BHSD, key_cache, value_cache):
    """Llama of Meta: a slice is assigned, the filled part is read."""
    start, stop = OLD, OLD + query_BHSD.shape[2]
    key_cache[:, :, start:stop] = key_BHSD
    value_cache[:, :, start:stop] = value_BHSD
    key, value = key_cache[:, :, :stop], value_cache[:, :, :stop]
    return attention(query_BHSD, key, value, visible(torch.arange(start, stop), key.shape[2]))


@more(step_buffer_position, reference=concatenated)
def cache_scattered(query_BHSD, key_BHSD, value_BHSD, key_cache, value_cache, position_S):
    """scatter makes new caches instead of writing into the old ones."""
    index = position_S[None, None, :, None].expand_as(key_BHSD)
    key, value = torch.scatter(key_cache, 2, index, key_BHSD), torch.scatter(value_cache, 2, index, value_BHSD)
    return attention(query_BHSD, key, value, visible(position_S, T + 4))


@more(
    functools.partial(step, stored=T),
    reference=lambda query, key, value, keys, values: attend(
        query, torch.cat([keys[:, :, NEW:], key], 2), torch.cat([values[:, :, NEW:], value], 2)
    ),
)
def cache_sliding(query_BHSD, key_BHSD, value_BHSD, key_cache, value_cache):
    """Only the last T tokens are kept and read."""
    key = torch.cat([key_cache, key_BHSD], dim=-2)[:, :, -T:]
    value = torch.cat([value_cache, value_BHSD], dim=-2)[:, :, -T:]
    return attention(query_BHSD, key, value)


def paged(rand: Rand) -> Inputs:
    """query_BH1D, pages of four tokens, and the numbers of the pages of each sequence."""
    pages = rand(9, H, 4, D), rand(9, H, 4, D)
    return rand(B, H, 1, D), *pages, torch.tensor([[7, 2, 5], [0, 8, 3]])


def paged_reference(query, key_pages, value_pages, table_BP):
    key, value = (torch.stack([torch.cat(list(p[row]), 1) for row in table_BP]) for p in (key_pages, value_pages))
    return attend(query, key, value)


@more(paged, reference=paged_reference)
def cache_paged(query_BH1D, key_pages, value_pages, table_BP):
    """Pages are gathered by a table, then lined up as tokens."""
    batch = table_BP.shape[0]
    key = key_pages[table_BP].permute(0, 2, 1, 3, 4).reshape(batch, H, -1, D)
    value = value_pages[table_BP].permute(0, 2, 1, 3, 4).reshape(batch, H, -1, D)
    return attention(query_BH1D, key, value)


def quantised(rand: Rand) -> Inputs:
    def eight_bits() -> Tensor:
        return (rand(B, H, T, D) * 40).clamp(-127, 127).to(torch.int8)

    return rand(B, H, NEW, D), eight_bits(), rand(B, H, T, 1).abs() / 40, eight_bits(), rand(B, H, T, 1).abs() / 40


@more(
    quantised,
    reference=lambda query, key, key_scale, value, value_scale: attend(query, key * key_scale, value * value_scale),
)
def cache_eight_bits(query_BHSD, key_int8, key_scale_BHT1, value_int8, value_scale_BHT1):
    """The cache holds bytes and a scale for each token; the scale of the key multiplies the scores."""
    scores = query_BHSD @ key_int8.float().mT * key_scale_BHT1.mT * SCALE
    return scores.softmax(-1) @ (value_int8.to(torch.float32) * value_scale_BHT1)
