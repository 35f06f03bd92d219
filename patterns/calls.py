"""Operators that are attention by contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..rewriter.nodes import args_of
from ..rewriter.registry import pattern
from ..rewriter.scalars import read_scalar
from ..rewriter.sites import AttentionCall
from . import examples

aten = torch.ops.aten


def _argument(node: fx.Node, position: int, name: str, default: object) -> Any:
    return args_of(node)[position] if len(node.args) > position else node.kwargs.get(name, default)


@pattern("call", examples=((examples.sdpa, examples.QKV),))
def scaled_dot_product_attention(node: fx.Node) -> AttentionCall | None:
    """sdpa(query[.. H S D], key[.. K T D], value[.. K T E])."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    query, key, value = args_of(node)[:3]
    scale = _argument(node, 6, "scale", None)
    return AttentionCall(
        node,
        "sdpa",
        query,
        key,
        value,
        _scale(query, scale),
        bool(_argument(node, 5, "is_causal", False)),
        _argument(node, 3, "attn_mask", None),
        read_scalar(_argument(node, 4, "dropout_p", 0.0)) or 0.0,
        bool(_argument(node, 7, "enable_gqa", False)),
    )


@pattern("call")
def latent_attention(node: fx.Node) -> AttentionCall | None:
    """latent::attention, which earlier rewrites have put there."""
    if str(node.target) != "latent.attention.default":
        return None
    query, key, value, mask, sinks, scale, cap, causal, window, grouped = args_of(node)
    return AttentionCall(
        node,
        "latent::attention",
        query,
        key,
        value,
        _scale(query, scale),
        causal,
        mask,
        grouped=grouped,
        sinks=sinks,
        cap=cap,
        window=window,
    )


@pattern("call")
def flex_attention(node: fx.Node) -> AttentionCall | None:
    """flex_attention(query, key, value, score_mod, block_mask, scale, ...), a higher-order operator."""
    if getattr(node.target, "__name__", "") != "flex_attention":
        return None
    query, key, value = args_of(node)[:3]
    return AttentionCall(
        node,
        "flex_attention",
        query,
        key,
        value,
        read_scalar(args_of(node)[5]) if len(node.args) > 5 else None,
        grouped=True,
        opaque="its score and mask functions",
    )


def _scale(query: fx.Node, scale: Any) -> float | fx.Node | None:
    """The scale in use: the argument (a node where it is symbolic), or 1/sqrt(D) where D is known."""
    if scale is not None:
        number = read_scalar(scale)
        return number if number is not None else scale
    width = query.meta["val"].shape[-1]
    return float(width) ** -0.5 if isinstance(width, int) else None
