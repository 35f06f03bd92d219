"""latent::attention: softmax(scale · q kᵀ + mask) v over grouped heads, and the plain forms it is lowered to.

Dimensions: B batch, H query heads, K key heads (H = K · G), S query tokens, T key tokens, D query/key width, E value
width. The mask is additive or boolean (True: visible) and broadcasts to [B, H, S, T]; `causal` hides j > i (top left);
`grouped` says H = K · G with G > 1, which symbolic sizes do not tell.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..rewriter.layouts import shape_of
from ..rewriter.nodes import args_of
from ..rewriter.registry import LibraryCall, lowering

torch.library.define(
    "latent::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, bool causal, bool grouped) -> Tensor",
)


def attention(
    query_BHSD: Tensor,
    key_BKTD: Tensor,
    value_BKTE: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    grouped: bool,
) -> Tensor:
    """The reference body: [B, H, S, E]."""
    return F.scaled_dot_product_attention(
        query_BHSD, key_BKTD, value_BKTE, mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


torch.library.impl("latent::attention", "CompositeImplicitAutograd", attention)


def one_query_per_group(
    query_BH1D: Tensor,
    key_BKTD: Tensor,
    value_BKTE: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    grouped: bool,
) -> Tensor:
    """One query token: the G query heads of a key head become G rows, so that no key is read G times.

    A causal mask hides nothing but the keys behind the first, so callers with `causal` keep the reference body.
    """
    B, H, _, D = query_BH1D.shape
    K = key_BKTD.shape[1]
    rows_BKGD = query_BH1D.reshape(B, K, H // K, D)
    if mask is not None and mask.shape[1] != 1:
        mask = mask.reshape(mask.shape[0], K, H // K, mask.shape[3])
    out_BKGE = F.scaled_dot_product_attention(rows_BKGD, key_BKTD, value_BKTE, mask, scale=scale)
    return out_BKGE.reshape(B, H, 1, value_BKTE.shape[3])


def padded_values(
    query_BHSD: Tensor,
    key_BKTD: Tensor,
    value_BKTE: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    grouped: bool,
) -> Tensor:
    """E < D: values padded with zeros to D, because fused kernels want one width; the padding is cut off again."""
    D, E = query_BHSD.shape[3], value_BKTE.shape[3]
    padded_BKTD = F.pad(value_BKTE, (0, D - E))
    out_BHSD = F.scaled_dot_product_attention(
        query_BHSD, key_BKTD, padded_BKTD, mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out_BHSD[..., :E]


@lowering("latent::attention")
def choose(node: fx.Node) -> tuple[LibraryCall | Callable[..., Tensor], str]:
    """The form for one node and the reason in words."""
    query_node, key_node, value_node, mask, scale, causal, grouped = args_of(node)
    query, value = shape_of(query_node), shape_of(value_node)
    D, E = query[3], value[3]
    device = node.meta["val"].device.type
    if device == "cpu" and query[2] == 1 and grouped and not causal and D == E:
        return one_query_per_group, "one query token: the heads of a group are rows of one product"
    if device == "cpu" and isinstance(D, int) and isinstance(E, int) and D > E:
        return padded_values, f"values padded from {E} to {D}, the width of the keys"
    call = LibraryCall(
        torch.ops.aten.scaled_dot_product_attention.default,
        (query_node, key_node, value_node, mask, 0.0, causal),
        {"scale": scale, "enable_gqa": grouped},
    )
    return call, "scaled_dot_product_attention"
