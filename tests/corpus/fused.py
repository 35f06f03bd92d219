"""Queries, keys and values that come out of one projection, cut apart in the ways that models use."""

from __future__ import annotations

import functools

import einops
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import MORE, Inputs, Rand, program
from .inputs import HEADS, SCALE, B, C, D, S
from .references import attend, attend_channels, merge_heads

more = functools.partial(program, MORE, sites=1)

GROUPS, GROUP = 2, 3
"""Key heads, and the query heads of each, in the grouped forms: six query heads."""


def attention(query_BHSD: Tensor, key_BHTD: Tensor, value_BHTE: Tensor) -> Tensor:
    """Plain attention; the output is [B, S, H*E]."""
    output = (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1) @ value_BHTE
    return output.transpose(1, 2).reshape(B, -1, query_BHSD.shape[1] * D)


def fused(rand: Rand, *, heads: int = 3 * HEADS) -> Inputs:
    """qkv_BSC: the output of one projection, for as many heads in all."""
    return (rand(B, S, heads * D),)


grouped = functools.partial(fused, heads=GROUPS * (GROUP + 2))


def blocks_reference(qkv_BSC: Tensor, causal: bool = False) -> Tensor:
    """All queries, then all keys, then all values."""
    return attend_channels(*qkv_BSC.split(C, -1), HEADS, causal=causal)


def interleaved_reference(qkv_BSC: Tensor) -> Tensor:
    """Query, key and value of the first head, then of the second."""
    query, key, value = qkv_BSC.view(B, S, HEADS, 3, D).transpose(1, 2).unbind(3)
    return merge_heads(attend(query, key, value))


def grouped_reference(qkv_BSC: Tensor) -> Tensor:
    """The queries, the key and the value of the first group, then of the second."""
    heads_BGSD = qkv_BSC.view(B, S, GROUPS, GROUP + 2, D).permute(2, 3, 0, 1, 4)
    outputs = [attend(query, heads[-2], heads[-1]) for heads in heads_BGSD for query in heads[:-2]]
    return torch.cat(outputs, -1)


@more(fused, reference=blocks_reference)
def fused_chunk(qkv_BSC):
    """chunk, then one view each."""
    query, key, value = (x.view(B, -1, HEADS, D).transpose(1, 2) for x in qkv_BSC.chunk(3, dim=-1))
    return attention(query, key, value)


@more(fused, reference=functools.partial(blocks_reference, causal=True))
def fused_split_nanogpt(qkv_BSC):
    """nanoGPT: split by the width, then the library call."""
    query, key, value = qkv_BSC.split(C, dim=2)
    query, key, value = (x.view(B, x.size(1), HEADS, C // HEADS).transpose(1, 2) for x in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0, is_causal=True)
    return output.transpose(1, 2).contiguous().view(B, -1, C)


@more(fused, reference=blocks_reference)
def fused_unbind_timm(qkv_BSC):
    """timm: five axes, permuted at once, unbound; the query is scaled."""
    b, n, _ = qkv_BSC.shape
    query, key, value = qkv_BSC.reshape(b, n, 3, HEADS, D).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (query * SCALE @ key.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).reshape(b, n, C)


@more(fused, reference=blocks_reference)
def fused_indexed_swin(qkv_BSC):
    """Swin: the same, indexed by 0, 1 and 2 instead of unbound."""
    b, n, _ = qkv_BSC.shape
    qkv = qkv_BSC.reshape(b, n, 3, HEADS, D).permute(2, 0, 3, 1, 4)
    query, key, value = qkv[0] * SCALE, qkv[1], qkv[2]
    return (F.softmax(query @ key.transpose(-2, -1), dim=-1) @ value).transpose(1, 2).reshape(b, n, C)


@more(fused, reference=blocks_reference)
def fused_einops(qkv_BSC):
    """lucidrains: chunk, and rearrange mapped over the three."""
    query, key, value = (einops.rearrange(t, "b n (h d) -> b h n d", h=HEADS) for t in qkv_BSC.chunk(3, dim=-1))
    dots = torch.matmul(query, key.transpose(-1, -2)) * SCALE
    return einops.rearrange(torch.matmul(dots.softmax(dim=-1), value), "b h n d -> b n (h d)")


@more(fused, reference=blocks_reference)
def fused_einops_at_once(qkv_BSC):
    """One rearrange puts the three in front, and iteration unpacks them."""
    query, key, value = einops.rearrange(qkv_BSC, "b n (three h d) -> three b h n d", three=3, h=HEADS)
    weights = torch.einsum("bhid,bhjd->bhij", query, key).mul(SCALE).softmax(-1)
    return einops.rearrange(torch.einsum("bhij,bhjd->bihd", weights, value), "b n h d -> b n (h d)")


@more(fused, reference=interleaved_reference)
def fused_interleaved_neox(qkv_BSC):
    """GPT-NeoX: query, key and value of a head lie side by side; slices of the last axis."""
    qkv = qkv_BSC.view(B, -1, HEADS, 3 * D)
    query = qkv[..., :D].permute(0, 2, 1, 3)
    key = qkv[..., D : 2 * D].permute(0, 2, 1, 3)
    value = qkv[..., 2 * D :].permute(0, 2, 1, 3)
    return attention(query, key, value)


@more(fused, reference=interleaved_reference)
def fused_interleaved_bloom(qkv_BSC):
    """BLOOM: the same order, by an axis of three that is indexed with an ellipsis."""
    qkv = qkv_BSC.view(B, -1, HEADS, 3, D)
    query, key, value = (qkv[..., i, :].transpose(1, 2) for i in range(3))
    return attention(query, key, value)


@more(fused, reference=interleaved_reference)
def fused_interleaved_chunk(qkv_BSC):
    """Megatron: the same order, with heads first and a chunk of the last axis."""
    query, key, value = qkv_BSC.view(B, -1, HEADS, 3 * D).transpose(1, 2).chunk(3, -1)
    return attention(query, key, value)


def codegen_reference(qkv_BSC: Tensor) -> Tensor:
    """Two parts, each with all its queries, then values, then keys, for three heads."""
    parts = [part.view(B, S, 3, 3, D).permute(2, 0, 3, 1, 4) for part in qkv_BSC.chunk(2, -1)]
    return torch.cat([merge_heads(attend(query, key, value)) for query, value, key in parts], -1)


@more(fused, reference=codegen_reference)
def fused_parts_codegen(qkv_BSC):
    """CodeGen: split into parts for the processors of its training, and the value comes before the key."""
    parts = qkv_BSC.reshape(B, -1, 2, 9 * D)
    query, value, key = torch.split(parts, 3 * D, dim=-1)
    query, key, value = (x.reshape(B, -1, HEADS, D).permute(0, 2, 1, 3) for x in (query, key, value))
    return attention(query, key, value)


def falcon_reference(qkv_BSC: Tensor) -> Tensor:
    query, key, value = qkv_BSC.split([C, D, D], -1)
    return torch.cat([attend(q, key, value) for q in query.split(D, -1)], -1)


@more(functools.partial(fused, heads=HEADS + 2), reference=falcon_reference)
def fused_one_key_head_falcon(qkv_BSC):
    """Falcon 7B: all query heads, then one key head and one value head, which broadcast."""
    qkv = qkv_BSC.view(B, -1, HEADS + 2, D)
    query, key, value = qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]
    return attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))


@more(grouped, reference=grouped_reference)
def fused_grouped_falcon(qkv_BSC):
    """Falcon 40B: each group has its queries, key and value together; keys are broadcast and flattened."""
    qkv = qkv_BSC.view(B, -1, GROUPS, GROUP + 2, D)
    query, key, value = qkv[:, :, :, :-2], qkv[:, :, :, [-2]], qkv[:, :, :, [-1]]
    key, value = torch.broadcast_to(key, query.shape), torch.broadcast_to(value, query.shape)
    return attention(*(x.flatten(2, 3).transpose(1, 2) for x in (query, key, value)))


@more(grouped, reference=grouped_reference)
def fused_grouped_internlm(qkv_BSC):
    """InternLM 2: the same order by einops, then repeat_interleave."""
    qkv = einops.rearrange(qkv_BSC, "b q (h gs d) -> b q h gs d", gs=GROUP + 2, d=D)
    query = einops.rearrange(qkv[..., :GROUP, :], "b q h gs d -> b (h gs) q d")
    key, value = (qkv[..., i, :].transpose(1, 2).repeat_interleave(GROUP, 1) for i in (-2, -1))
    return attention(query, key, value)


def two_outputs(rand: Rand) -> Inputs:
    """query_BSC and kv_BSC."""
    return rand(B, S, C), rand(B, S + 3, 2 * C)


@more(two_outputs, reference=lambda query, kv: attend_channels(query, *kv.chunk(2, -1), HEADS))
def fused_key_value(query_BSC, kv_BTC):
    """Query apart, key and value together: SegFormer's permute of five axes."""
    query = query_BSC.reshape(B, -1, HEADS, D).permute(0, 2, 1, 3)
    key, value = kv_BTC.reshape(B, -1, 2, HEADS, D).permute(2, 0, 3, 1, 4)
    return attention(query, key, value)


@more(fused, reference=blocks_reference)
def fused_narrow(qkv_BSC):
    """narrow and unflatten."""
    query, key, value = (qkv_BSC.narrow(-1, i * C, C).unflatten(-1, (HEADS, D)).transpose(1, 2) for i in range(3))
    return attention(query, key, value)
