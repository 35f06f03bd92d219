"""Attention spelled out in matmuls and a softmax becomes one fused operator, which never stores the scores."""

from __future__ import annotations

from torch import Tensor, fx

from .. import rewrite
from ..kernels import attention as _attention  # noqa: F401  # defines latent::attention
from ..rewriter.axes import size_of
from ..rewriter.canonical import (
    Canonical,
    Scoring,
    computed_in,
    emit_attention,
    emit_mask,
    emit_query_key,
    emit_sinks,
    groups_repeated,
    place,
    width_of,
)
from ..rewriter.emit import Emitter
from ..rewriter.rules import Benefit, Cost, Match, Refusal
from ..rewriter.score_form import Unusual, readable_sinks, score_form, unusual_weights
from ..rewriter.sites import AttentionSite


def spelled_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.5 + mask).softmax(-1) @ v


@rewrite("fuse_attention", exact=True)
class FuseAttention:
    """softmax(scale · q kᵀ + mask) v  ->  attention(q, k, v, mask, scale)."""

    examples = ((spelled_out, dict(q="B H S D", k="B H T D", v="B H T E", mask="B 1 S T")),)

    def match(self, site: AttentionSite) -> Match | Refusal:
        if site.call is not None:
            return Refusal(f"it is one fused call already ({site.spelling})", site.anchor)
        if (unusual := unusual_weights(site)) is not None:
            return Refusal(unusual.reason, unusual.node)
        scores = score_form(site)
        if isinstance(scores, Unusual):
            return Refusal(scores.reason, scores.node)
        if (unusual := readable_sinks(scores, site)) is not None:
            return Refusal(unusual.reason, unusual.node)
        repeated = groups_repeated(site)
        if repeated and repeated != set(site.axes.groups):
            return Refusal("some of the heads that share keys are repeated and some are not", site.key.node)
        if not computed_in(site).is_floating_point:
            return Refusal("the scores are not floating point numbers", site.anchor)
        return Match(site, {"scores": scores, "folded": not repeated})

    def benefit(self, match: Match) -> Benefit:
        """The scores are written and read once for every step between the two products."""
        site = match.site
        axes = site.axes
        outer = size_of(axes.batch + axes.heads + axes.groups)
        S, T, D, E = (size_of(d) for d in (axes.queries, axes.keys, width_of(site), axes.value_width))
        item = computed_in(site).itemsize
        flops = 2 * outer * S * T * (D + E)
        ends = item * outer * (S * (D + E) + T * (D + E))
        passes = 2 + len(site.steps) + len(site.weight_steps)
        return Benefit(Cost(flops, ends + item * outer * S * T * passes), Cost(flops, ends))

    def build(self, match: Match, emit: Emitter) -> fx.Node:
        site, scores = match.site, match.facts["scores"]
        form = Canonical(site, match.facts["folded"])
        dtype = computed_in(site)
        query, key, scale = emit_query_key(emit, form, scores, dtype)
        mask, query = emit_mask(emit, form, scores, query)
        value = emit.cast(place(emit, site.value, form.columns(site.axes.value_width), site), dtype)
        scoring = Scoring(scale, mask, emit_sinks(emit, form, scores), scores.cap or 0.0)
        return emit_attention(emit, form, query, key, value, scoring)
