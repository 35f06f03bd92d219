"""Up-projections of latents go into the query and behind the attention: what is attended to is the latent itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from .. import rewrite
from ..kernels import latent_attention as _latent_attention  # defines latent::latent_attention
from ..rewriter.axes import Dim, Size, size_of
from ..rewriter.canonical import (
    Canonical,
    Scoring,
    emit_attention,
    emit_mask,
    emit_own_mask,
    emit_query_scale,
    emit_result,
    emit_sinks,
    place,
    width_of,
)
from ..rewriter.emit import Emitter
from ..rewriter.factored import Factor, Factored, Whole
from ..rewriter.factors import factor
from ..rewriter.layouts import shape_of
from ..rewriter.masks.terms import Flags
from ..rewriter.masks_of_site import proven_flags
from ..rewriter.origins.low_rank import low_rank
from ..rewriter.rules import Benefit, Cost, Match, Refusal
from ..rewriter.score_form import HIDES, ScoreForm, Unusual, key_scaling, readable_sinks, score_form, unusual_weights
from ..rewriter.sites import AttentionSite, Fill

aten = torch.ops.aten


@dataclass(frozen=True)
class Plan:
    """What is absorbed: `key` out of the keys of score product `term`, `value`, or both; `rest` is left of the keys."""

    site: AttentionSite
    scores: ScoreForm
    key: Factored | None
    value: Factored | None
    term: int
    rest: tuple[tuple[int, Whole], ...]
    flags: Flags | None

    @property
    def parts(self) -> tuple[Factored, ...]:
        return tuple(part for part in (self.key, self.value) if part is not None)

    @property
    def form(self) -> Canonical:
        return Canonical(self.site, folded=True)

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the products with the latent; autocast may compute them in a narrower one than the latent's."""
        products: list[torch.dtype] = [part.contraction.meta["val"].dtype for part in self.parts]
        return functools.reduce(torch.promote_types, products)

    @property
    def one_latent(self) -> bool:
        """Whether keys and values are made of the same tensor."""
        if self.key is None or self.value is None:
            return False
        key, value = self.key, self.value
        if (key.tokens and key.tokens.start) != (value.tokens and value.tokens.start):
            return False
        return key.latent.root is value.latent.root and self._marked(key) == self._marked(value)

    def _marked(self, part: Factored) -> list[object]:
        """The layout of a latent, its width and its tokens by name: two walks call them differently."""
        space = self.site.space
        named = {space.resolve(part.latent_width): "width", part.keys(self.site): "tokens"}
        return [named.get(dim, dim) for dim in space.resolve_layout(part.latent.chain[-1][1])]

    @property
    def key_bias(self) -> bool:
        """Whether the bias of the keys counts: only a plain softmax ignores what is added to all keys alike."""
        return self.key is not None and self.key.bias is not None and bool(self.scores.sinks or self.scores.cap)

    @property
    def value_bias(self) -> bool:
        """Whether the bias of the values counts other than once: rows may give weight to a sink, or see no key."""
        call = self.site.call
        less = bool(self.scores.sinks) or (call is not None and (call.mask is not None or bool(call.window)))
        return self.value is not None and self.value.bias is not None and less

    def latent_heads(self, part: Factored | Whole) -> Dim:
        """The head axes that a tensor of the keys tells apart."""
        operand = part.latent if isinstance(part, Factored) else part.operand
        found = self.site.space.axes(operand.chain[-1][1])
        return tuple(axis for axis in self.form.heads if axis in found)


def expanded(q: Tensor, c: Tensor, up_k: Tensor, up_v: Tensor) -> Tensor:
    k, v = (c[:, None] @ up for up in (up_k, up_v))
    return (q @ k.mT).softmax(-1) @ v


@rewrite("absorb_up_projection", exact=True, before=("fuse_attention", "fold_repeated_heads", "replace_proven_mask"))
class AbsorbUpProjection:
    """q_h·(U_h c_j) = (U_hᵀ q_h)·c_j  and  sum_j p_j (V_h c_j) = V_h (sum_j p_j c_j): attend to the latents c."""

    examples = ((expanded, dict(q="B H S D", c="B T C", up_k="H C D", up_v="H C E")),)
    example_sizes: ClassVar = {"C": (2, 4), "H": (2, 4), "D": (3, 8), "E": (3, 8)}

    def match(self, site: AttentionSite) -> Match | Refusal:
        keys = [(n, f) for n, term in enumerate(site.terms) for f in factor(term.key, width_of(site, n), site)]
        values = factor(site.value, site.axes.value_width, site)
        made = [(n, f) for n, f in keys if isinstance(f, Factored)]
        value = values[0] if len(values) == 1 and isinstance(values[0], Factored) else None
        if not made and value is None:
            return _not_linear(site, [f for _, f in keys])
        if len(made) > 1:
            return Refusal("the keys are made by more than one product with weights", site.key.node)
        if site.call is not None and site.call.opaque:
            return Refusal(f"{site.call.name} also does what is not read here: {site.call.opaque}", site.anchor)
        scores = score_form(site)
        if isinstance(scores, Unusual):
            return Refusal(scores.reason, scores.node)
        if (unusual := unusual_weights(site) or readable_sinks(scores, site)) is not None:
            return Refusal(unusual.reason, unusual.node)
        term, key = made[0] if made else (0, None)
        site = _with_heads_of(site, [part for part in (key, value) if part is not None])
        if low_rank(site) is None:  # then each has to be narrower on its own, or it is just a hidden state
            value = value if value is not None and _is_narrow(value, site) else None
            key = key if key is not None and _is_narrow(key, site) else None
        if key is None and value is None:
            return Refusal("what keys and values are made of is no narrower than they are", site.key.node)
        rest = tuple((n, f.left_whole() if isinstance(f, Factored) else f) for n, f in keys if f is not key)
        flags, mask = proven_flags(site)
        plan = Plan(site, scores, key, value, term, rest, flags)
        if (refusal := _unfit(plan)) is not None:
            return refusal
        return Match(site, {"plan": plan}, (mask,) if flags and mask is not None else (), _reads(plan))

    def benefit(self, match: Match) -> Benefit:
        """Expanded keys and values are neither computed nor written nor read; scores are as wide as the latent."""
        plan: Plan = match.facts["plan"]
        axes, item = match.site.axes, plan.dtype.itemsize
        B, H, S, T = (size_of(d) for d in (axes.batch, axes.heads + axes.groups, axes.queries, axes.keys))
        made: Size = 0
        expanding: Size = 0
        widening: Size = 0
        for part in plan.parts:
            C, K = size_of(part.latent_width), size_of(part.heads(match.site))
            made += T * K * part.length
            expanding += 2 * T * K * C * part.length
            widening += 2 * S * H * (T * (C - part.length) + C * part.length)
        if plan.key is not None and plan.value is not None:  # the operator has both forms and takes the faster one
            widening = expanding
        D = sum((f.length for _, f in plan.rest), 0) + (plan.key.length if plan.key else 0)
        core = 2 * S * T * H * (D + size_of(axes.value_width))
        read = item * B * T * sum(size_of(p.latent_width) for p in plan.parts[: 1 if plan.one_latent else None])
        return Benefit(Cost(B * (core + expanding), read + 3 * item * B * made), Cost(B * (core + widening), read))

    def build(self, match: Match, emit: Emitter) -> fx.Node:
        plan: Plan = match.facts["plan"]
        if plan.key is not None and plan.value is not None:
            return _attend_to_latents(plan, plan.key, plan.value, emit)
        return _attend_to_one(plan, emit)


# ** match **


def _is_narrow(part: Factored, site: AttentionSite) -> bool:
    """Whether fewer numbers of a token go in than come out; latents of several heads are no hidden states anyway."""
    own = site.space.axes(part.latent.chain[-1][1]) & {*site.axes.heads, *site.axes.groups}
    narrow, made = size_of(part.latent_width), size_of(part.heads(site)) * part.length
    return bool(own) or (isinstance(made, int) and isinstance(narrow, int) and narrow < made)


def _not_linear(site: AttentionSite, keys: list[Factor]) -> Refusal:
    end = keys[0].end if keys else site.key.root
    made = "an input of the graph" if end.op == "placeholder" else str(end.target)
    return Refusal(f"keys and values are no product of weights and a narrower tensor: the keys come from {made}", end)


def _with_heads_of(site: AttentionSite, parts: list[Factored]) -> AttentionSite:
    """The site with the axes that weights tell apart among its heads: heads split in two look like a batch.

    A batch looks like heads where there is but one: weights do not tell it apart, and every latent does.
    """
    order, first_head = site.axes.batch + site.axes.heads, len(site.axes.batch)
    found = site.space.axes(*(part.weight_layout for part in parts))
    first = next((n for n, axis in enumerate(order[:first_head]) if axis in found), first_head)
    while first_head <= first < len(order) and all(
        order[first] in site.space.axes(part.latent.chain[-1][1]) - found for part in parts
    ):
        first += 1
    return replace(site, axes=replace(site.axes, batch=order[:first], heads=order[first:]))


def _unfit(plan: Plan) -> Refusal | None:
    """Why the parts do not go together, or None."""
    site, space, scores = plan.site, plan.site.space, plan.scores
    columns = [size for part in (*plan.parts, *(whole for _, whole in plan.rest)) for size in (part.start, part.length)]
    if not all(isinstance(size, int) for size in columns):
        return Refusal("the widths of the parts of the keys are symbols", site.key.node)
    for step in scores.scale_by:
        if key_scaling(step, site, space):
            return Refusal("the scores are scaled by a tensor that varies over the keys", step.node)
    for fill in scores.masks:
        if isinstance(fill, Fill) and fill.value > HIDES:
            return Refusal(f"the mask fills with {fill.value:g}, which a row without keys would feel", fill.node)
    for part in plan.parts:
        heads, own = part.heads(site), plan.latent_heads(part)
        if heads != plan.form.heads[: len(heads)] or own != heads[: len(own)]:
            return Refusal("heads share latents or weights in an order that no product of matrices has", part.weight)
        if not space.axes(part.latent.chain[-1][1]) <= {
            *site.axes.batch,
            *part.keys(site),
            *own,
            *space.resolve(part.latent_width),
        }:
            return Refusal("the latents vary over something else than batch, heads and keys", part.latent.node)
    if plan.key is not None and plan.value is not None:
        if plan.key.heads(site) != plan.value.heads(site) or plan.latent_heads(plan.key) != plan.latent_heads(
            plan.value
        ):
            return Refusal("the latents or weights of keys and values differ in their heads", plan.value.weight)
        for _, whole in plan.rest:
            if not _shared(plan, whole) and scores.cap:
                return Refusal("a part of the keys has heads of its own, and the scores are capped", whole.end)
    elif plan.key is not None and not all(_shared(plan, whole) for _, whole in plan.rest):
        return Refusal(
            "a part of the keys has heads of its own, and the values are not made of the latent", site.key.root
        )
    return None


def _shared(plan: Plan, whole: Whole) -> bool:
    """Whether heads that share a latent share this part of the keys as well."""
    assert plan.key is not None
    return set(plan.latent_heads(whole)) <= set(plan.latent_heads(plan.key))


def _reads(plan: Plan) -> tuple[tuple[fx.Node, fx.Node], ...]:
    """The tensors that the replacement reads and where they were read before, and those that it does without."""
    site = plan.site
    parts = tuple(read for part in plan.parts for read in part.reads())
    made = ((site.terms[plan.term].key, plan.key), (site.value, plan.value))
    roots = tuple((operand.root, operand.root) for operand, part in made if part is not None)
    return parts + roots + tuple((whole.end, whole.reader) for _, whole in plan.rest)


# ** build **


def _attend_to_latents(plan: Plan, key: Factored, value: Factored, emit: Emitter) -> fx.Node:
    """latent::latent_attention, with the weights as views of what they are views of already."""
    site, form, dtype = plan.site, plan.form, plan.dtype
    heads, own = key.heads(site), plan.latent_heads(key)

    latent = key.emit_of_keys(emit, site, key.latent, own, key.latent_width, dtype)
    value_latent = None
    if not plan.one_latent:
        value_latent = value.emit_of_keys(emit, site, value.latent, own, value.latent_width, dtype)
    query, scale = _scaled_query(plan, emit, plan.term, key)
    query_rope = key_rope = None
    if plan.rest or plan.key_bias:
        shared = all(_shared(plan, whole) for _, whole in plan.rest)
        queries, keys = [], []
        for n, whole in plan.rest:
            queries.append(_scaled_query(plan, emit, n, whole)[0])
            keys.append(whole.emit_of_keys(emit, site, whole.operand, own if shared else heads, whole.width, dtype))
        if plan.key_bias:
            queries.append(_on_bias(plan, key, query, emit))
            keys.append(_ones(emit, keys[0] if keys else latent))
        query_rope, key_rope = _side_by_side(emit, queries), _side_by_side(emit, keys)
    scoring = _scoring(plan, emit, query, scale)
    arguments = (
        query,
        query_rope,
        latent,
        key_rope,
        value_latent,
        key.emit_weight(emit, site, heads, dtype),
        *_weight_and_bias_of_values(plan, value, heads, emit),
        scoring.mask,
        scoring.sinks,
        scoring.scale,
        scoring.cap,
        scoring.causal,
        scoring.window,
    )
    target = torch.ops.latent.latent_attention.default
    return emit_result(emit, form, emit.known(target, _latent_attention.shape_of_result, *arguments))


def _attend_to_one(plan: Plan, emit: Emitter) -> fx.Node:
    """Only the keys or only the values are latents: latent::attention whose other operand is as it was."""
    return _attend_to_key_latents(plan, emit) if plan.key is not None else _attend_to_value_latents(plan, emit)


def _attend_to_key_latents(plan: Plan, emit: Emitter) -> fx.Node:
    """q·[U c + b | r]  =  [q U | q·b | q]·[c | 1 | r]."""
    site, form, dtype, part = plan.site, plan.form, plan.dtype, plan.key
    assert part is not None
    own = plan.latent_heads(part)
    query = emit.cast(_query(plan, emit, plan.term, part), dtype)
    queries = [emit.call(aten.matmul.default, query, part.emit_weight(emit, site, form.heads, dtype))]
    keys = [part.emit_of_keys(emit, site, part.latent, own, part.latent_width, dtype)]
    if plan.key_bias:
        queries.append(_on_bias(plan, part, query, emit))
        keys.append(_ones(emit, keys[0]))
    for n, whole in plan.rest:
        queries.append(emit.cast(_query(plan, emit, n, whole), dtype))
        keys.append(whole.emit_of_keys(emit, site, whole.operand, own, whole.width, dtype))
    wide = Canonical(site, folded=False)
    query, scale = emit_query_scale(emit, form, plan.scores, _side_by_side(emit, queries), dtype)
    key = _for_every_head(plan, emit, _side_by_side(emit, keys), own)
    value = emit.cast(place(emit, site.value, wide.columns(site.axes.value_width), site), dtype)
    return emit_attention(emit, wide, query, key, value, _scoring(plan, emit, query, scale))


def _attend_to_value_latents(plan: Plan, emit: Emitter) -> fx.Node:
    """sum_j p_j (V c_j + b)  =  [V | b] sum_j p_j [c_j | 1]; where the weights sum to one, b is added afterwards."""
    site, form, dtype, part = plan.site, plan.form, plan.dtype, plan.value
    assert part is not None
    own = plan.latent_heads(part)
    latent = part.emit_of_keys(emit, site, part.latent, own, part.latent_width, dtype)
    weight, bias = _weight_and_bias_of_values(plan, part, form.heads, emit)
    if bias is not None and plan.value_bias:
        latent = emit.call(aten.cat.default, [latent, _ones(emit, latent)], -1)
        heads = emit.call(aten.expand.default, bias, [emit.size(form.heads), -1])
        weight = emit.call(aten.cat.default, [weight, emit.call(aten.unsqueeze.default, heads, -1)], -1)
    wide = Canonical(site, folded=False)
    queries, keys = [], []
    for n, term in enumerate(site.terms):
        width = width_of(site, n)
        rows = emit.cast(place(emit, term.query, form.rows(width), site), dtype)
        queries.append(rows if term.factor == 1.0 else emit.call(aten.mul.Tensor, rows, term.factor))
        keys.append(emit.cast(place(emit, term.key, wide.columns(width), site), dtype))
    query, scale = emit_query_scale(emit, form, plan.scores, _side_by_side(emit, queries), dtype)
    scoring = _scoring(plan, emit, query, scale)
    how = (scoring.mask, scoring.sinks, scoring.scale, scoring.cap, scoring.causal, scoring.window, False)
    values = _for_every_head(plan, emit, latent, own)
    out = emit.call(torch.ops.latent.attention.default, query, _side_by_side(emit, keys), values, *how)
    out = emit.call(aten.matmul.default, out, emit.call(aten.transpose.int, weight, 1, 2))
    if bias is not None and not plan.value_bias:
        out = emit.call(aten.add.Tensor, out, emit.call(aten.unsqueeze.default, bias, 1))
    return emit_result(emit, form, out)


def _weight_and_bias_of_values(
    plan: Plan, value: Factored, heads: Dim, emit: Emitter
) -> tuple[fx.Node, fx.Node | None]:
    """[heads, value width, latent width] and [heads or 1, value width], with rows of zeros where values are padded."""
    weight = value.emit_weight(emit, plan.site, heads, plan.dtype)
    bias = value.emit_bias(emit, plan.site, heads, plan.dtype)
    if value.padding:
        weight = emit.call(aten.constant_pad_nd.default, weight, [0, 0, 0, value.padding])
        bias = None if bias is None else emit.call(aten.constant_pad_nd.default, bias, [0, value.padding])
    return weight, bias


def _side_by_side(emit: Emitter, tensors: list[fx.Node]) -> fx.Node:
    return tensors[0] if len(tensors) == 1 else emit.call(aten.cat.default, tensors, -1)


def _ones(emit: Emitter, tensor: fx.Node) -> fx.Node:
    """[.. 1], one for each row of a tensor."""
    return emit.call(aten.ones_like.default, emit.call(aten.slice.Tensor, tensor, -1, 0, 1))


def _on_bias(plan: Plan, key: Factored, query: fx.Node, emit: Emitter) -> fx.Node:
    """q·b for the bias of the keys: [B H S 1]."""
    bias = key.emit_bias(emit, plan.site, plan.form.heads, plan.dtype)
    assert bias is not None
    return emit.call(aten.matmul.default, emit.cast(query, plan.dtype), emit.call(aten.unsqueeze.default, bias, -1))


def _for_every_head(plan: Plan, emit: Emitter, tensor: fx.Node, heads: Dim) -> fx.Node:
    """[B, heads, T, width] with a repetition for each head that shares it, which no memory holds if all share it."""
    site = plan.site
    width = site.space.fresh("c", shape_of(tensor)[3])
    target = Canonical(site, folded=False).columns(width)
    layout = (site.axes.batch, heads, site.axes.keys, width)
    emit.learn(((tensor, layout),))
    return emit.expand(emit.relayout(tensor, layout, target), target)


def _query(plan: Plan, emit: Emitter, term: int, part: Factored | Whole) -> fx.Node:
    """The columns of the query that meet a part of the keys: [B H S width]."""
    site = plan.site
    width = width_of(site, term)
    query = place(emit, site.terms[term].query, plan.form.rows(width), site)
    if part.length != size_of(width):
        query = emit.call(aten.slice.Tensor, query, 3, part.start, part.start + part.length)
    factor = site.terms[term].factor
    return query if factor == 1.0 else emit.call(aten.mul.Tensor, query, factor)


def _scaled_query(plan: Plan, emit: Emitter, term: int, part: Factored | Whole) -> tuple[fx.Node, float]:
    """The same, times what scales it; a scale that is a symbol is among that, because kernels take numbers."""
    query, scale = emit_query_scale(emit, plan.form, plan.scores, _query(plan, emit, term, part), plan.dtype)
    return (emit.call(aten.mul.Tensor, query, scale), 1.0) if isinstance(scale, fx.Node) else (query, scale)


def _scoring(plan: Plan, emit: Emitter, query: fx.Node, scale: float | fx.Node) -> Scoring:
    form, call = plan.form, plan.site.call
    sinks = emit_sinks(emit, form, plan.scores)
    causal, window = (call.causal, call.window) if call is not None else (False, 0)
    if plan.flags is not None:
        return Scoring(scale, None, sinks, plan.scores.cap or 0.0, plan.flags.causal, plan.flags.window)
    mask = emit_own_mask(emit, form) if call is not None else emit_mask(emit, form, plan.scores, query)[0]
    return Scoring(scale, mask, sinks, plan.scores.cap or 0.0, causal, window)
