"""Keys and values that `repeat_kv` copies for every query head of a group are read once per group instead."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, fx

from .. import rewrite
from ..kernels import attention as _attention  # noqa: F401  # defines latent::attention
from ..rewriter.axes import size_of
from ..rewriter.canonical import (
    Canonical,
    Scoring,
    emit_attention,
    emit_own_mask,
    emit_sinks,
    groups_repeated,
    place,
    width_of,
)
from ..rewriter.emit import Emitter
from ..rewriter.rules import Benefit, Cost, Match, Refusal
from ..rewriter.score_form import Unusual, score_form
from ..rewriter.sites import AttentionSite


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


@rewrite("fold_repeated_heads", exact=True, after=("fuse_attention",))
class FoldRepeatedHeads:
    """attention(q[b (h g) i d], k[b h j d] repeated g times, v alike)  ->  attention(q, k, v) over groups of g."""

    examples = ((repeated, dict(q="B (K G) S D", k="B K T D", v="B K T E")),)
    example_sizes: ClassVar = {"K": (2, 4), "G": (2, 4)}

    def match(self, site: AttentionSite) -> Match | Refusal:
        call = site.call
        if call is None:
            return Refusal("the attention is not one fused call", site.anchor)
        if call.opaque:
            return Refusal(f"{call.name} also does what is not read here: {call.opaque}", call.anchor)
        if call.dropout:
            return Refusal("dropout of the weights is active", call.anchor)
        repeated = groups_repeated(site)
        if not repeated:
            return Refusal("no key or value head is repeated", site.key.node)
        if repeated != set(site.axes.groups):
            return Refusal("some of the heads that share keys are repeated and some are not", site.key.node)
        roots = site.space.axes(site.key.chain[-1][1], site.value.chain[-1][1])
        if roots & repeated:
            return Refusal("only the keys or only the values are repeated", site.key.node)
        return Match(site)

    def benefit(self, match: Match) -> Benefit:
        """The copies of keys and values are neither written nor read."""
        site = match.site
        axes = site.axes
        shared = size_of(axes.batch + axes.heads) * size_of(axes.keys)
        item = site.key.node.meta["val"].dtype.itemsize
        once = item * shared * (size_of(width_of(site)) + size_of(axes.value_width))
        groups = size_of(axes.groups)
        return Benefit(Cost(0, once + 2 * groups * once), Cost(0, once))

    def build(self, match: Match, emit: Emitter) -> fx.Node:
        site = match.site
        call = site.call
        assert call is not None
        scores = score_form(site)
        assert not isinstance(scores, Unusual)
        form = Canonical(site, folded=True)
        width = width_of(site)
        query = place(emit, site.query, form.rows(width), site)
        key = place(emit, site.key, form.columns(width), site)
        value = place(emit, site.value, form.columns(site.axes.value_width), site)
        sinks = emit_sinks(emit, form, scores)
        mask = emit_own_mask(emit, form)
        scoring = Scoring(call.scale, mask, sinks, call.cap, call.causal, call.window)
        return emit_attention(emit, form, query, key, value, scoring)
