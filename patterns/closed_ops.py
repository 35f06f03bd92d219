"""Operators that hide attention inside, opened into plain ATen while a graph is captured.

nn.TransformerEncoderLayer and nn.MultiheadAttention take a fused operator in evaluation without gradients. Opened, its
attention is found like any other, and inductor fuses what surrounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rewriter.registry import pattern

aten = torch.ops.aten


def encoder_layer(
    src_BSC: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """aten::_transformer_encoder_layer_fwd: attention and feed-forward with residuals, norms before or after."""
    if src_BSC.is_nested:
        return NotImplemented  # type: ignore[no-any-return]  # make_fx then keeps the operator
    width = [embed_dim]
    x = F.layer_norm(src_BSC, width, norm_weight_1, norm_bias_1, eps) if norm_first else src_BSC
    attended = self_attention(x, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
    x = src_BSC + attended
    if not norm_first:
        x = F.layer_norm(x, width, norm_weight_1, norm_bias_1, eps)
    inner = F.layer_norm(x, width, norm_weight_2, norm_bias_2, eps) if norm_first else x
    inner = F.linear(inner, ffn_weight_1, ffn_bias_1)
    inner = F.gelu(inner) if use_gelu else F.relu(inner)
    x = x + F.linear(inner, ffn_weight_2, ffn_bias_2)
    return x if norm_first else F.layer_norm(x, width, norm_weight_2, norm_bias_2, eps)


def self_attention(
    x_BSC: Tensor,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None,
    mask_type: int | None,
) -> Tensor:
    """Attention of one tensor with itself; `mask` is true where hidden: [S, S], [B, S] or [B, H, S, S] by type."""
    B, S, C = x_BSC.shape
    qkv_BSNHD = F.linear(x_BSC, qkv_weight, qkv_bias).view(B, S, 3, num_heads, C // num_heads)
    query_BHSD, key_BHSD, value_BHSD = qkv_BSNHD.permute(2, 0, 3, 1, 4).unbind(0)
    visible = None
    if mask is not None:
        hidden = mask.to(torch.bool)
        if mask_type == 1:
            hidden = hidden.view(B, 1, 1, S)
        elif mask_type == 0:
            hidden = hidden.view(1, 1, S, S)
        visible = ~hidden
    out_BHSD = F.scaled_dot_product_attention(query_BHSD, key_BHSD, value_BHSD, visible)
    return F.linear(out_BHSD.transpose(1, 2).reshape(B, S, C), proj_weight, proj_bias)


def native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """aten::_native_multi_head_attention of one tensor with itself, where the weights are not asked for."""
    if query is not key or query is not value or need_weights or query.is_nested:
        return NotImplemented  # type: ignore[no-any-return]  # make_fx then keeps the operator
    out = self_attention(query, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
    return out, query.new_empty(0)


@pattern("closed_op")
def transformer_operators() -> dict[Any, Callable[..., Any]]:
    """The fused operators of torch.nn."""
    return {
        aten._transformer_encoder_layer_fwd.default: encoder_layer,
        aten._native_multi_head_attention.default: native_attention,
    }
