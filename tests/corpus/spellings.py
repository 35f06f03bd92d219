"""25 ways to write softmax attention, one site each: the first set, whose counts are quoted elsewhere."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from .base import (
    ROTARY,
    SCALE,
    SPELLINGS,
    WIDTH_V,
    D,
    H,
    latent_inputs,
    program,
    qkv,
    qkv_alibi,
    qkv_future,
    qkv_heads_folded,
    qkv_mask,
    qkv_mask_sink,
    qkv_past,
    repeat_kv,
)

spelling = functools.partial(program, SPELLINGS, sites=1)


@spelling(qkv)
def scale_by_division(query_BHSD, key_BHTD, value_BHTE):
    """Scores divided by sqrt(D), no mask."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) / math.sqrt(D)).softmax(-1) @ value_BHTE


@spelling(qkv)
def scale_by_multiplication(query_BHSD, key_BHTD, value_BHTE):
    """Scores times D**-0.5, no mask."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1) @ value_BHTE


@spelling(qkv)
def scale_on_query(query_BHSD, key_BHTD, value_BHTE):
    """The scale is applied to the query before the product."""
    return ((query_BHSD * SCALE) @ key_BHTD.transpose(-2, -1)).softmax(-1) @ value_BHTE


@spelling(qkv)
def scale_on_key(query_BHSD, key_BHTD, value_BHTE):
    """The scale is applied to the key before the product."""
    return (query_BHSD @ (key_BHTD * SCALE).transpose(-2, -1)).softmax(-1) @ value_BHTE


@spelling(qkv)
def no_scale(query_BHSD, key_BHTD, value_BHTE):
    """Scale 1."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1)).softmax(-1) @ value_BHTE


@spelling(qkv_mask)
def division_then_mask(query_BHSD, key_BHTD, value_BHTE, mask_B1ST):
    """Division, then an additive mask on the right."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) / math.sqrt(D) + mask_B1ST).softmax(-1) @ value_BHTE


@spelling(qkv_mask)
def multiplication_then_mask(query_BHSD, key_BHTD, value_BHTE, mask_B1ST):
    """Multiplication, then an additive mask on the right."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE + mask_B1ST).softmax(-1) @ value_BHTE


@spelling(qkv_mask)
def mask_on_the_left(query_BHSD, key_BHTD, value_BHTE, mask_B1ST):
    """The same sum with its operands exchanged."""
    return (mask_B1ST + query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1) @ value_BHTE


@spelling(qkv_mask)
def hf_eager_float32(query_BHSD, key_BHTD, value_BHTE, mask_B1ST):
    """Hugging Face eager attention, one key head per query head, dropout of probability 0."""
    weights = torch.matmul(query_BHSD, key_BHTD.transpose(2, 3)) * SCALE + mask_B1ST
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query_BHSD.dtype)
    weights = F.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, value_BHTE).transpose(1, 2).contiguous()


@spelling(functools.partial(qkv_mask, dtype=torch.bfloat16))
def hf_eager_bfloat16(query_BHSD, key_BHTD, value_BHTE, mask_B1ST):
    """The same in bfloat16: the softmax is widened to float32 and narrowed again."""
    weights = torch.matmul(query_BHSD, key_BHTD.transpose(2, 3)) * SCALE + mask_B1ST
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query_BHSD.dtype)
    return torch.matmul(weights, value_BHTE).transpose(1, 2).contiguous()


@spelling(functools.partial(qkv_mask, heads_kv=2, dtype=torch.bfloat16))
def hf_eager_grouped_bfloat16(query_BHSD, key_BKTD, value_BKTE, mask_B1ST):
    """Grouped queries: four query heads read one key head."""
    key_BHTD, value_BHTE = repeat_kv(key_BKTD, 4), repeat_kv(value_BKTE, 4)
    weights = torch.matmul(query_BHSD, key_BHTD.transpose(2, 3)) * SCALE + mask_B1ST
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query_BHSD.dtype)
    return torch.matmul(weights, value_BHTE).transpose(1, 2).contiguous()


@spelling(functools.partial(qkv_mask, heads_kv=2))
def hf_eager_grouped_float32(query_BHSD, key_BKTD, value_BKTE, mask_B1ST):
    """Grouped queries in float32, where the widening cast vanishes from the graph."""
    key_BHTD, value_BHTE = repeat_kv(key_BKTD, 4), repeat_kv(value_BKTE, 4)
    weights = torch.matmul(query_BHSD, key_BHTD.transpose(2, 3)) * SCALE + mask_B1ST
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query_BHSD.dtype)
    return torch.matmul(weights, value_BHTE).transpose(1, 2).contiguous()


@spelling(qkv_future)
def masked_fill(query_BHSD, key_BHTD, value_BHTE, future_11ST):
    """Future keys filled with -inf."""
    scores = query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE
    return scores.masked_fill(future_11ST, float("-inf")).softmax(-1) @ value_BHTE


@spelling(qkv_past)
def where_gpt2(query_BHSD, key_BHTD, value_BHTE, past_11ST):
    """GPT-2: the divisor and the fill value are 0-d tensors, and the fill is finite."""
    scores = query_BHSD @ key_BHTD.transpose(-1, -2)
    scores = scores / torch.full([], math.sqrt(D), dtype=scores.dtype)
    lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return F.softmax(torch.where(past_11ST, scores, lowest), -1) @ value_BHTE


@spelling(qkv)
def einsum(query_BHSD, key_BHTD, value_BHTE):
    """Both contractions as einsum."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query_BHSD, key_BHTD).mul(SCALE)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), value_BHTE)


@spelling(qkv_heads_folded)
def baddbmm(query_NSD, key_NTD, value_NTE):
    """Batch and heads folded to N; the scale is the alpha of baddbmm."""
    scores = torch.baddbmm(torch.zeros(1, 1, 1), query_NSD, key_NTD.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), value_NTE)


@spelling(qkv_heads_folded)
def bmm_no_scale(query_NSD, key_NTD, value_NTE):
    """Batch and heads folded to N; scale 1."""
    return torch.bmm(torch.bmm(query_NSD, key_NTD.transpose(1, 2)).softmax(-1), value_NTE)


@spelling(qkv)
def softmax_by_hand(query_BHSD, key_BHTD, value_BHTE):
    """max, subtract, exp, sum, divide."""
    scores = query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE
    exponents = (scores - scores.max(-1, keepdim=True).values).exp()
    return (exponents / exponents.sum(-1, keepdim=True)) @ value_BHTE


@spelling(qkv)
def normalise_after_values(query_BHSD, key_BHTD, value_BHTE):
    """The division by the row sum is moved past the value product."""
    scores = query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE
    exponents = (scores - scores.amax(-1, keepdim=True)).exp()
    return (exponents @ value_BHTE) / exponents.sum(-1, keepdim=True)


@spelling(qkv_mask)
def softcap_gemma2(query_BHSD, key_BHTD, value_BHTE, mask_B1ST):
    """tanh soft cap at 50 between the scale and the mask."""
    scores = torch.tanh(query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE / 50.0) * 50.0 + mask_B1ST
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query_BHSD.dtype) @ value_BHTE


@spelling(qkv_alibi)
def alibi_bias(query_BHSD, key_BHTD, value_BHTE, bias_1H1T):
    """A bias for each head and key, no causal mask."""
    return ((query_BHSD @ key_BHTD.transpose(-2, -1)) * SCALE + bias_1H1T).softmax(-1) @ value_BHTE


@spelling(qkv_mask_sink)
def sink_gpt_oss(query_BHSD, key_BHTD, value_BHTE, mask_B1ST, sink_H):
    """One learned score for each head takes part in the softmax and is then dropped."""
    batch, _, queries, _ = query_BHSD.shape
    scores = query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE + mask_B1ST
    scores = torch.cat([scores, sink_H.view(1, -1, 1, 1).expand(batch, -1, queries, 1)], -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return F.softmax(scores, -1)[..., :-1] @ value_BHTE


@spelling(latent_inputs)
def latent_deepseek(query_BHSD, query_BHSR, latent_BTC, key_B1TR, expand_weight, mask_B1ST):
    """Latent attention unabsorbed: keys are [expanded | rotary], values narrower than keys."""
    batch, tokens, _ = latent_BTC.shape
    expanded = F.linear(latent_BTC, expand_weight).view(batch, tokens, H, D + WIDTH_V).transpose(1, 2)
    key_BHTD, value_BHTE = torch.split(expanded, [D, WIDTH_V], -1)
    key = torch.cat([key_BHTD, key_B1TR.expand(-1, H, -1, -1)], -1)
    query = torch.cat([query_BHSD, query_BHSR], -1)
    weights = torch.matmul(query, key.transpose(2, 3)) * ((D + ROTARY) ** -0.5) + mask_B1ST
    return F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype) @ value_BHTE


@spelling(qkv)
def weights_returned(query_BHSD, key_BHTD, value_BHTE):
    """The attention weights have a second consumer: they are an output too."""
    weights = (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1)
    return weights @ value_BHTE, weights


@spelling(functools.partial(qkv, queries=1))
def decode_one_query(query_BH1D, key_BHTD, value_BHTE):
    """One query token against a full cache."""
    return (query_BH1D @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1) @ value_BHTE
