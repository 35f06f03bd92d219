"""latent::attention: fused attention over grouped heads, and the forms it is lowered to.

    softmax( mask(cap · tanh(scale · q kᵀ / cap)) | sinks ) v

Dimensions: B batch, H query heads, K key heads (H = K · G), S query tokens, T key tokens, D query/key width, E value
width. The mask is additive or boolean (True: visible) and broadcasts to [B, H, S, T]; sinks [H] take part in the
softmax and have no value; cap 0: none. `causal` hides j > i (top left), `window` > 0 hides j <= i - window; `grouped`
says H = K · G with G > 1, which symbolic sizes do not tell.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..rewriter.autocast import in_own_dtypes
from ..rewriter.axes import Size
from ..rewriter.layouts import shape_of
from ..rewriter.nodes import args_of
from ..rewriter.registry import LibraryCall, lowering
from .generated import DTYPES, reference, unavailable
from .machine import fast_dtype
from .spec import Call

torch.library.define(
    "latent::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, float? scale, float cap, bool causal, "
    "int window, bool grouped) -> Tensor",
)


def attention(
    query_BHSD: Tensor,
    key_BKTD: Tensor,
    value_BKTE: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    cap: float,
    causal: bool,
    window: int,
    grouped: bool,
) -> Tensor:
    """The reference body: [B, H, S, E]."""
    if sinks is None and not cap:
        if window or (causal and mask is not None):
            mask, causal = _windowed(query_BHSD, key_BKTD, mask, causal, window), False
        return F.scaled_dot_product_attention(
            query_BHSD, key_BKTD, value_BKTE, mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    scale = query_BHSD.shape[-1] ** -0.5 if scale is None else scale
    return reference(Call(query_BHSD, None, key_BKTD, None, value_BKTE, mask, sinks, scale, cap, causal, window, 0))


torch.library.impl("latent::attention", "CompositeImplicitAutograd", in_own_dtypes(attention))


def _windowed(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, window: int) -> Tensor:
    """The mask with the window and the causal flag in it."""
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)[None, :]
    visible = (j > i - window) if window else (j == j)
    if causal:
        visible = visible & (j <= i)
    if mask is None:
        return visible[None, None]
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, float("-inf"))


def padded_values(
    query_BHSD: Tensor,
    key_BKTD: Tensor,
    value_BKTE: Tensor,
    mask: Tensor | None,
    sinks: None,
    scale: float | None,
    cap: float,
    causal: bool,
    window: int,
    grouped: bool,
) -> Tensor:
    """E < D: values padded with zeros to D, because fused kernels want one width; the padding is cut off again."""
    D, E = query_BHSD.shape[3], value_BKTE.shape[3]
    padded_BKTD = F.pad(value_BKTE, (0, D - E))
    out_BHSD = F.scaled_dot_product_attention(
        query_BHSD, key_BKTD, padded_BKTD, mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out_BHSD[..., :E]


def scaled_queries(
    query_BHSD: Tensor,
    key_BKTD: Tensor,
    value_BKTE: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    cap: float,
    causal: bool,
    window: int,
    grouped: bool,
) -> Tensor:
    """The kernel, when the scale is a symbol: kernels take numbers, so it goes into the queries."""
    query_BHSD = query_BHSD * scale
    given = (query_BHSD, None, key_BKTD, None, value_BKTE, mask, sinks, 1.0, cap, causal, window, 0)
    result: Tensor = torch.ops.latent.generated_attention(*given)
    return result


@lowering("latent::attention")
def choose(node: fx.Node, gradients: bool) -> tuple[LibraryCall | Callable[..., Tensor] | None, str]:
    """The form for one node and the reason in words."""
    query_node, key_node, value_node, mask, sinks, scale, cap, causal, window, grouped = args_of(node)
    query, value = shape_of(query_node), shape_of(value_node)
    S, D, E = query[2], query[3], value[3]
    device = node.meta["val"].device.type
    special = sinks is not None or bool(cap or window)
    dtype = node.meta["val"].dtype
    fixed = isinstance(D, int) and isinstance(E, int)
    possible = fixed and not gradients and dtype in DTYPES and not unavailable(device)
    if possible and (reason := _worth_a_kernel(S, special, device, dtype)):
        if isinstance(scale, fx.Node):
            return scaled_queries, f"generated kernel: {reason}"
        scale = D**-0.5 if scale is None else scale
        given = (query_node, None, key_node, None, value_node, mask, sinks, scale, cap, causal, window, 0)
        return LibraryCall(torch.ops.latent.generated_attention.default, given, {}), f"generated kernel: {reason}"
    if special:
        return None, "the operator's own body"
    if device == "cpu" and isinstance(D, int) and isinstance(E, int) and D > E:
        return padded_values, f"values padded from {E} to {D}, the width of the keys"
    call = LibraryCall(
        torch.ops.aten.scaled_dot_product_attention.default,
        (query_node, key_node, value_node, mask, 0.0, causal),
        {"scale": scale, "enable_gqa": grouped},
    )
    return call, "scaled_dot_product_attention"


def _worth_a_kernel(queries: Size, special: bool, device: str, dtype: torch.dtype) -> str:
    """Why a generated kernel does better than the library's attention; "" where it does not."""
    if queries == 1:
        return "one query token, keys split over cores"
    if special:
        return "the library has no such attention"
    return f"{dtype} products are slow on this device" if fast_dtype(device, dtype) != dtype else ""
