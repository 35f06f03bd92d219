"""Keys and values from a narrow latent: expanded, absorbed, and in between."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import MORE, Inputs, Rand, program
from .inputs import B, D, E, S, past
from .references import attend

more = functools.partial(program, MORE, sites=1)

HEADS, LATENT, ROTARY = 5, 12, 4
LATENT_SCALE = (D + ROTARY) ** -0.5


def latent_cached(rand: Rand) -> Inputs:
    """Queries, what a cache holds, and the two halves of the expansion, which belong to heads."""
    return (
        rand(B, S, HEADS, D),  # query_BSHD, the part without position
        rand(B, S, HEADS, ROTARY),  # query_BSHR, the rotated part
        rand(B, S, LATENT),  # latent_BTC
        rand(B, S, ROTARY),  # key_BTR, one rotated key for all heads
        rand(HEADS, D, LATENT) / 3,  # key_weight_HDC
        rand(HEADS, E, LATENT) / 3,  # value_weight_HEC
    )


def expanded(query_D: Tensor, query_R: Tensor, latent: Tensor, key_R: Tensor, key_w: Tensor, value_w: Tensor) -> Tensor:
    """The definition: every head expands its own keys and values. Output [B, S, H, E]."""
    query_BHSD = torch.cat([query_D, query_R], -1).transpose(1, 2)
    key_BHTD = torch.cat([latent[:, None] @ key_w.mT, key_R[:, None].expand(-1, HEADS, -1, -1)], -1)
    return attend(query_BHSD, key_BHTD, latent[:, None] @ value_w.mT, past(latent.shape[1])).transpose(1, 2)


@more(latent_cached, reference=expanded)
def latent_absorbed(query_BSHD, query_BSHR, latent_BTC, key_BTR, key_weight_HDC, value_weight_HEC):
    """DeepSeek inference: the scores are two products, the value is the latent, nothing is expanded."""
    query_BSHC = torch.einsum("bshd,hdc->bshc", query_BSHD, key_weight_HDC)
    content_BSHT = torch.einsum("bshc,btc->bsht", query_BSHC, latent_BTC)
    scores_BSHT = (content_BSHT + torch.einsum("bshr,btr->bsht", query_BSHR, key_BTR)) * LATENT_SCALE
    scores_BSHT += torch.full((S, S), float("-inf")).triu_(1).unsqueeze(1)
    weights_BSHT = scores_BSHT.softmax(dim=-1, dtype=torch.float32).type_as(query_BSHD)
    latent_BSHC = torch.einsum("bsht,btc->bshc", weights_BSHT, latent_BTC)
    return torch.einsum("bshc,hec->bshe", latent_BSHC, value_weight_HEC)


@more(latent_cached, reference=expanded)
def latent_absorbed_heads_first(query_BSHD, query_BSHR, latent_BTC, key_BTR, key_weight_HDC, value_weight_HEC):
    """The same by matmul in [B, H, S, T], the latent broadcast over heads."""
    query_BHSC = query_BSHD.transpose(1, 2) @ key_weight_HDC
    scores = query_BHSC @ latent_BTC[:, None].mT + query_BSHR.transpose(1, 2) @ key_BTR[:, None].mT
    weights = (scores * LATENT_SCALE).masked_fill(~past(), float("-inf")).softmax(-1)
    return (weights @ latent_BTC[:, None] @ value_weight_HEC.mT).transpose(1, 2)


@more(latent_cached, reference=expanded)
def latent_absorbed_concatenated(query_BSHD, query_BSHR, latent_BTC, key_BTR, key_weight_HDC, value_weight_HEC):
    """One product of [latent | rotary]; the value is the first columns of the key."""
    query = torch.cat([torch.einsum("bshd,hdc->bhsc", query_BSHD, key_weight_HDC), query_BSHR.transpose(1, 2)], -1)
    cache_B1TC = torch.cat([latent_BTC, key_BTR], -1).unsqueeze(1)
    scores = torch.matmul(query, cache_B1TC.transpose(2, 3)) * LATENT_SCALE
    weights = torch.where(past(), scores, torch.finfo(scores.dtype).min).softmax(-1)
    latent_BHSC = torch.matmul(weights, cache_B1TC[..., :LATENT])
    return torch.einsum("bhsc,hec->bshe", latent_BHSC, value_weight_HEC)


@more(latent_cached, reference=expanded)
def latent_absorbed_call(query_BSHD, query_BSHR, latent_BTC, key_BTR, key_weight_HDC, value_weight_HEC):
    """The library call with one key head, wider than its value, and the scale of the expanded form."""
    query = torch.cat([query_BSHD.transpose(1, 2) @ key_weight_HDC, query_BSHR.transpose(1, 2)], -1)
    key_B1TC, value_B1TC = torch.cat([latent_BTC, key_BTR], -1)[:, None], latent_BTC[:, None]
    output_BHSC = F.scaled_dot_product_attention(
        query, key_B1TC, value_B1TC, is_causal=True, scale=LATENT_SCALE, enable_gqa=True
    )
    return (output_BHSC @ value_weight_HEC.mT).transpose(1, 2)


@more(latent_cached, reference=expanded)
def latent_expanded(query_BSHD, query_BSHR, latent_BTC, key_BTR, key_weight_HDC, value_weight_HEC):
    """Keys and values expanded by two weights, the rotated parts concatenated, einsum in [B, S, H, D]."""
    key_BTHD = torch.einsum("btc,hdc->bthd", latent_BTC, key_weight_HDC)
    value_BTHE = torch.einsum("btc,hec->bthe", latent_BTC, value_weight_HEC)
    key = torch.cat([key_BTHD, key_BTR.unsqueeze(2).expand(-1, -1, HEADS, -1)], dim=-1)
    scores = torch.einsum("bshd,bthd->bsht", torch.cat([query_BSHD, query_BSHR], dim=-1), key) * LATENT_SCALE
    scores = scores + torch.full((S, S), float("-inf")).triu(1)[None, :, None]
    return torch.einsum("bsht,bthd->bshd", scores.softmax(-1), value_BTHE)


@more(latent_cached, reference=expanded)
def latent_expanded_into_slices(query_BSHD, query_BSHR, latent_BTC, key_BTR, key_weight_HDC, value_weight_HEC):
    """DeepSeek of Hugging Face: an empty tensor is filled slice by slice instead of concatenated."""
    query = query_BSHD.new_empty(B, HEADS, S, D + ROTARY)
    query[..., :D] = query_BSHD.transpose(1, 2)
    query[..., D:] = query_BSHR.transpose(1, 2)
    key = query_BSHD.new_empty(B, HEADS, S, D + ROTARY)
    key[..., :D] = latent_BTC[:, None] @ key_weight_HDC.mT
    key[..., D:] = key_BTR[:, None]
    scores = torch.matmul(query, key.transpose(2, 3)) * LATENT_SCALE
    weights = F.softmax(scores.masked_fill(~past(), -torch.inf), dim=-1)
    return torch.matmul(weights, latent_BTC[:, None] @ value_weight_HEC.mT).transpose(1, 2).contiguous()


def latent_normalised(rand: Rand) -> Inputs:
    return rand(B, S, 30), rand(30, LATENT), rand(LATENT, HEADS * (D + E)), rand(30, HEADS * D)


def low_rank_reference(x, down, up, query_weight):
    key, value = (F.rms_norm(x @ down, (LATENT,)) @ up).unflatten(-1, (HEADS, D + E)).transpose(1, 2).split([D, E], -1)
    return attend((x @ query_weight).unflatten(-1, (HEADS, D)).transpose(1, 2), key, value)


@more(latent_normalised, reference=low_rank_reference)
def latent_without_rotary(x_BSC, down_CL, up_LC, query_weight):
    """The latent is computed here: down, norm, up to keys and values of every head; no rotated part."""
    latent = F.rms_norm(x_BSC @ down_CL, (LATENT,))
    keys_values = (latent @ up_LC).view(B, S, HEADS, D + E)
    key_BHTD, value_BHTE = keys_values[..., :D].transpose(1, 2), keys_values[..., D:].transpose(1, 2)
    query_BHSD = (x_BSC @ query_weight).view(B, S, HEADS, D).transpose(1, 2)
    return (query_BHSD @ key_BHTD.transpose(2, 3) * D**-0.5).softmax(-1) @ value_BHTE
