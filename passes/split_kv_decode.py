"""One query token against many keys: the keys are split over the cores, and heads that share keys read them once."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, fx

from .. import rewrite
from ..kernels import attention as _attention  # noqa: F401  # defines latent::attention
from ..rewriter.axes import size_of
from ..rewriter.canonical import Canonical, Scoring, emit_attention, emit_own_mask, groups_repeated, place, width_of
from ..rewriter.emit import Emitter
from ..rewriter.rules import Benefit, Cost, Match, Refusal
from ..rewriter.sites import AttentionSite


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)


@rewrite("split_kv_decode", exact=True, after=("fuse_attention", "fold_repeated_heads", "replace_proven_mask"))
class SplitKVDecode:
    """sdpa(q[b (h g) 1 d], k[b h j d], v)  ->  attention over parts of j, joined by log-sum-exp (Flash-Decoding)."""

    examples = ((one_query, dict(q="B (K G) D", k="B K T D", v="B K T E")),)
    example_sizes: ClassVar = {"K": (2, 4), "G": (2, 4), "T": (2, 8)}

    def match(self, site: AttentionSite) -> Match | Refusal:
        call = site.call
        if call is None:
            return Refusal("the attention is not one fused call", site.anchor)
        if call.name == "latent::attention":
            return Refusal("it is latent::attention already", call.anchor)
        if call.opaque or call.dropout:
            return Refusal(f"{call.name} also does what is not read here", call.anchor)
        if site.axes.queries:
            return Refusal(f"there are {size_of(site.axes.queries)} query tokens, which fill the cores", call.anchor)
        return Match(site)

    def benefit(self, match: Match) -> Benefit:
        """Without the split every query head is a product of its own that reads the keys of its group again."""
        site = match.site
        axes = site.axes
        once = size_of(axes.batch + axes.heads) * size_of(axes.keys)
        width = size_of(width_of(site)) + size_of(axes.value_width)
        item = site.key.node.meta["val"].dtype.itemsize
        flops = 2 * once * size_of(axes.groups) * width
        return Benefit(Cost(flops, item * once * size_of(axes.groups) * width), Cost(flops, item * once * width))

    def build(self, match: Match, emit: Emitter) -> fx.Node:
        site = match.site
        call = site.call
        assert call is not None
        form = Canonical(site, folded=not groups_repeated(site))
        width = width_of(site)
        query = place(emit, site.query, form.rows(width), site)
        key = place(emit, site.key, form.columns(width), site)
        value = place(emit, site.value, form.columns(site.axes.value_width), site)
        scoring = Scoring(call.scale, emit_own_mask(emit, form), causal=call.causal)
        return emit_attention(emit, form, query, key, value, scoring)
