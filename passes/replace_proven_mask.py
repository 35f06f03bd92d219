"""A mask tensor that provably is causal, a causal window, or hides nothing, becomes flags, or nothing."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import rewrite
from ..kernels import attention as _attention  # noqa: F401  # defines latent::attention
from ..rewriter.axes import size_of
from ..rewriter.canonical import Canonical, Scoring, emit_attention, emit_sinks, place, width_of
from ..rewriter.emit import Emitter
from ..rewriter.masks.terms import Flags
from ..rewriter.rules import Benefit, Cost, Match, Refusal
from ..rewriter.score_form import Unusual, score_form
from ..rewriter.sites import AttentionSite


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


@rewrite("replace_proven_mask", exact=True, after=("fuse_attention", "fold_repeated_heads"))
class ReplaceProvenMask:
    """attention(q, k, v, mask[i j] = 0 if j <= i else -inf)  ->  attention(q, k, v, causal)."""

    examples = ((causal, dict(q="B H S D", k="B H T D", v="B H T E")),)
    example_sizes: ClassVar = {"S": (2, 8), "T": (2, 8)}

    def match(self, site: AttentionSite) -> Match | Refusal:
        call = site.call
        if call is None:
            return Refusal("the attention is not one fused call", site.anchor)
        if call.opaque or call.dropout:
            return Refusal(f"{call.name} also does what is not read here", call.anchor)
        if call.mask is None:
            return Refusal("there is no mask tensor", call.anchor)
        if not site.masks:
            return Refusal("the mask does not vary over the keys", call.mask)
        proof = site.masks[-1]
        if proof.opaque:
            return Refusal(f"the mask is not proven: {proof.opaque[0].reason}", proof.opaque[0].node)
        if proof.keeps_all:
            return Match(site, {"flags": Flags(call.causal, call.window)}, evaluate=(call.mask,))
        if (flags := proof.flags) is None or call.causal:
            return Refusal(f"the mask is {proof.describe()}, which no flag of a fused call expresses", call.mask)
        if not proof.rows_visible:
            return Refusal("some query may see no key at all", call.mask)
        return Match(site, {"flags": flags}, evaluate=(call.mask,))

    def benefit(self, match: Match) -> Benefit:
        """The mask is not read, and scores that it hides are not computed."""
        site = match.site
        axes = site.axes
        scores = size_of(axes.batch + axes.heads + axes.groups) * size_of(axes.queries) * size_of(axes.keys)
        flops = 2 * scores * (size_of(width_of(site)) + size_of(axes.value_width))
        item = site.query.node.meta["val"].dtype.itemsize
        mask = item * size_of(axes.batch) * size_of(axes.queries) * size_of(axes.keys)
        return Benefit(Cost(flops, mask), Cost(flops / 2 if match.facts["flags"].causal else flops, 0))

    def build(self, match: Match, emit: Emitter) -> fx.Node:
        site = match.site
        call, flags = site.call, match.facts["flags"]
        assert call is not None
        scores = score_form(site)
        assert not isinstance(scores, Unusual)
        form = Canonical(site, folded=call.grouped)
        width = width_of(site)
        query = place(emit, site.query, form.rows(width), site)
        key = place(emit, site.key, form.columns(width), site)
        value = place(emit, site.value, form.columns(site.axes.value_width), site)
        sinks = emit_sinks(emit, form, scores)
        scoring = Scoring(call.scale, None, sinks, call.cap, flags.causal, flags.window)
        return emit_attention(emit, form, query, key, value, scoring)
