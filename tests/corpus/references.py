"""Attention written once, slowly and in float64; what the programs of the second set are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale * query keyᵀ + mask) value, head by head when there are fewer key heads than query heads.

    A boolean mask is True where the key may be read; the scale is D**-0.5 unless given.
    """
    if query.ndim > 3 and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("...sd,...td->...st", query.double(), key.double()) * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    exponentials = torch.exp2(scores * 1.4426950408889634)
    weights = exponentials / exponentials.sum(-1, keepdim=True)
    return torch.einsum("...st,...te->...se", weights, value.double()).to(value.dtype)


def attend_tokens_first(query_BSHD: Tensor, key_BTKD: Tensor, value_BTKE: Tensor, **options) -> Tensor:
    """The same with the axes of tokens before the axes of heads."""
    swapped = (tensor.transpose(-3, -2) for tensor in (query_BSHD, key_BTKD, value_BTKE))
    return attend(*swapped, **options).transpose(-3, -2)


def attend_channels_first(query_BCS: Tensor, key_BCT: Tensor, value_BCT: Tensor, **options) -> Tensor:
    """The same with the tokens last."""
    return attend(query_BCS.mT, key_BCT.mT, value_BCT.mT, **options).mT


def attend_padded(query: Tensor, key: Tensor, value: Tensor, valid_BT: Tensor, **options) -> Tensor:
    """The same for keys that are padding where valid_BT is False."""
    return attend(query, key, value, valid_BT[:, None, None, :], **options)


def split_heads(x_BSC: Tensor, heads: int) -> Tensor:
    """[B, S, H*D] -> [B, H, S, D]."""
    return x_BSC.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_BHSD: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H*D]."""
    return x_BHSD.transpose(1, 2).flatten(-2)


def attend_channels(query_BSC: Tensor, key_BTC: Tensor, value_BTC: Tensor, heads: int, **options) -> Tensor:
    """The same for heads that lie side by side in the channels."""
    query_BHSD, key_BHTD, value_BHTE = (split_heads(tensor, heads) for tensor in (query_BSC, key_BTC, value_BTC))
    return merge_heads(attend(query_BHSD, key_BHTD, value_BHTE, **options))


def multihead(module: nn.MultiheadAttention, query_BSC: Tensor, context_BTC: Tensor, **options) -> Tensor:
    """What nn.MultiheadAttention computes when keys and values come from one tensor, batch first."""
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    inputs = (query_BSC, context_BTC, context_BTC)
    projected = (F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases, strict=True))
    return module.out_proj(attend_channels(*projected, module.num_heads, **options))
