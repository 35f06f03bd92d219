"""Attention kept outside the 25 so that their count keeps its meaning: the call, and two unusual key layouts."""

from __future__ import annotations

import functools

import torch.nn.functional as F

from .base import EXTRA, SCALE, H, program, projections, qkv, qkv_square

extra = functools.partial(program, EXTRA, sites=1)


@extra(qkv)
def library_call(query_BHSD, key_BHTD, value_BHTE):
    """The call itself: nothing to rewrite, one site to see."""
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE)


@extra(qkv_square)
def keys_stored_BTDH(query_BHSD, key_BTDH, value_BHTE):
    """Attention with keys laid out [B, T, D, H]; all axes are equal, so shapes tell nothing.

    Right: sdpa(query, key.permute(0, 3, 1, 2), value).  Reading key as [B, H, T, D] is wrong.
    """
    return (query_BHSD @ key_BTDH.permute(0, 3, 2, 1) * SCALE).softmax(-1) @ value_BHTE


@extra(projections)
def keys_permuted_once(x_BSC, weight_q, weight_k, weight_v):
    """Keys go from [B, T, H, D] straight to [B, H, D, T] with one permute (pytorch #195320)."""
    batch, tokens, channels = x_BSC.shape
    width = channels // H
    query_BHSD = (x_BSC @ weight_q).view(batch, tokens, H, width).transpose(1, 2)
    key_BHDT = (x_BSC @ weight_k).view(batch, tokens, H, width).permute(0, 2, 3, 1)
    value_BHTE = (x_BSC @ weight_v).view(batch, tokens, H, width).transpose(1, 2)
    return (query_BHSD @ key_BHDT * width**-0.5).softmax(-1) @ value_BHTE
