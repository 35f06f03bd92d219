"""A site's tensors in the one layout of fused attention: query [B H S D], key [B K T D], value [B K T E].

B merges all batch axes, H = K·G the key heads and their groups (group minor), S the query axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .axes import Axis, Dim, Layout, flat
from .emit import Emitter
from .layouts import is_tensor
from .score_form import HIDES, ScoreForm, key_scaling, sink_of_heads
from .sites import AttentionSite, Bias, Fill, Operand, Scale

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonical:
    """The dimensions every tensor of the site is brought to; `folded` leaves the groups out of keys and values."""

    site: AttentionSite
    folded: bool

    @property
    def heads(self) -> Dim:
        return self.site.axes.heads + self.site.axes.groups

    @property
    def key_heads(self) -> Dim:
        return self.site.axes.heads if self.folded else self.heads

    def rows(self, width: Dim) -> Layout:
        return (self.site.axes.batch, self.heads, self.site.axes.queries, width)

    def columns(self, width: Dim) -> Layout:
        return (self.site.axes.batch, self.key_heads, self.site.axes.keys, width)


def width_of(site: AttentionSite, term: int = 0) -> Dim:
    """The axes that a score product sums over, in the key's order."""
    space = site.space
    query, key = (space.resolve_layout(o.layout) for o in (site.terms[term].query, site.terms[term].key))
    in_query, roles = space.axes(query), site.axes
    outer = {*roles.batch, *roles.heads, *roles.groups, *roles.queries, *roles.keys}
    return tuple(axis for axis in flat(key) if axis in in_query and axis not in outer)


def computed_in(site: AttentionSite) -> torch.dtype:
    """The wider of the dtypes in which the two products are computed (autocast narrows them)."""
    dtypes = [node.meta["val"].dtype for node in (site.region[0], site.output)]
    return torch.promote_types(*dtypes)


def groups_repeated(site: AttentionSite) -> set[Axis]:
    """Group axes that keys or values hold as repetitions."""
    space = site.space
    return set(site.axes.groups) & space.axes(*(term.key.layout for term in site.terms), site.value.layout)


def place(emit: Emitter, operand: Operand, target: Layout, site: AttentionSite) -> fx.Node:
    """The operand in layout `target`, from the entry of its chain that needs the fewest operations."""
    space = site.space
    wanted = set(flat(space.resolve_layout(target)))
    for node, layout in operand.chain:
        if space.resolve_layout(layout) == space.resolve_layout(target):
            return node
    for node, layout in operand.chain:
        if space.axes(layout) <= wanted:
            return emit.expand(emit.relayout(node, layout, target), target)
    raise ValueError(f"{operand.node.name} has axes that the target layout lacks")


def emit_query_key(
    emit: Emitter, form: Canonical, scores: ScoreForm, dtype: torch.dtype
) -> tuple[fx.Node, fx.Node, float | fx.Node]:
    """Query and key [.. D] with all terms side by side, tensor scales applied, and the scale that remains."""
    site = form.site
    queries, keys = [], []
    for n, term in enumerate(site.terms):
        width = width_of(site, n)
        query = emit.cast(place(emit, term.query, form.rows(width), site), dtype)
        if term.factor != 1.0:
            query = emit.call(aten.mul.Tensor, query, term.factor)
        queries.append(query)
        keys.append(emit.cast(place(emit, term.key, form.columns(width), site), dtype))
    query = queries[0] if len(queries) == 1 else emit.call(aten.cat.default, queries, -1)
    key = keys[0] if len(keys) == 1 else emit.call(aten.cat.default, keys, -1)
    for step in scores.scale_by:
        if key_scaling(step, site, site.space):
            key = _multiply(emit, key, step, (*form.columns(())[:3], ()))
    query, scale = emit_query_scale(emit, form, scores, query, dtype)
    return query, key, scale


def emit_query_scale(
    emit: Emitter, form: Canonical, scores: ScoreForm, query: fx.Node, dtype: torch.dtype
) -> tuple[fx.Node, float | fx.Node]:
    """The query in `dtype`, times the tensors that scale it, and the scale that remains."""
    query = emit.cast(query, dtype)
    scale: float | fx.Node = scores.scale
    for step in scores.scale_by:
        if not is_tensor(step.by):
            scale = _scaled(emit, scale, step)
        elif not key_scaling(step, form.site, form.site.space):
            query = _multiply(emit, query, step, (*form.rows(())[:3], ()))
    return query, scale


def _scaled(emit: Emitter, scale: float | fx.Node, step: Scale) -> float | fx.Node:
    import operator

    return emit.call(operator.truediv if step.divide else operator.mul, scale, step.by)


def _multiply(emit: Emitter, tensor: fx.Node, step: Scale, target: Layout) -> fx.Node:
    assert step.by is not None
    factor = emit.cast(
        emit.relayout(step.by, step.layout, target) if step.layout else step.by, tensor.meta["val"].dtype
    )
    return emit.call(aten.div.Tensor if step.divide else aten.mul.Tensor, tensor, factor)


def emit_mask(emit: Emitter, form: Canonical, scores: ScoreForm, query: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """The additive mask [B|1 H|1 S|1 T], and the query, zeroed where a mild fill hides a whole row.

    where(keep, s, -1e4) of a row without keys is uniform, s - 1e4 is not: with q = 0 there both are.
    """
    site = form.site
    dtype = query.meta["val"].dtype
    target = (site.axes.batch, form.heads, site.axes.queries, site.axes.keys)
    mask: fx.Node | None = None
    for step in scores.masks:
        match step:
            case Bias(bias=fx.Node() as bias):
                bias = emit.cast(emit.relayout(bias, step.layout, target) if is_tensor(bias) else bias, dtype)
                if step.factor != 1.0:
                    bias = emit.call(aten.mul.Tensor, bias, step.factor)
                mask = bias if mask is None else emit.call(aten.add.Tensor, mask, bias)
            case Bias():
                if mask is not None:
                    mask = emit.call(aten.add.Tensor, mask, step.factor * step.bias)  # type: ignore[operator]
            case Fill():
                keep = emit.relayout(step.condition, step.layout, target)
                if not step.keep:
                    keep = emit.call(aten.logical_not.default, keep)
                base = mask if mask is not None else _number(emit, keep, 0.0, dtype)
                fill = _fill(step, scores, dtype)
                mask = emit.call(aten.where.self, keep, base, _number(emit, keep, fill, dtype))
                if step.value > HIDES:
                    seen = emit.call(aten.any.dim, keep, -1, True)
                    query = emit.call(aten.mul.Tensor, query, emit.cast(seen, dtype))
            case Scale() if mask is not None:
                if step.by is None:
                    mask = emit.call(aten.mul.Tensor, mask, step.factor)
                else:
                    by = emit.relayout(step.by, step.layout, target) if step.layout else step.by
                    mask = emit.call(aten.div.Tensor if step.divide else aten.mul.Tensor, mask, by)
    return mask, query


def _fill(step: Fill, scores: ScoreForm, dtype: torch.dtype) -> float:
    """The number to add in place of a fill, such that a row that it hides altogether is uniform, as it was.

    A single fill that hides can be any number that hides: the lowest, beside which a score vanishes in fp64 as well.
    """
    lowest = torch.finfo(dtype).min
    if step.value == float("-inf"):
        return step.value
    return lowest if step.value <= HIDES and len(scores.masks) == 1 else max(step.value, lowest)


def _number(emit: Emitter, like: fx.Node, value: float, dtype: torch.dtype) -> fx.Node:
    device = like.meta["val"].device
    return emit.call(aten.scalar_tensor.default, value, dtype=dtype, device=device)


def emit_sinks(emit: Emitter, form: Canonical, scores: ScoreForm) -> fx.Node | None:
    """The scores without a value, one for each head: [H]. See `readable_sinks`."""
    if not scores.sinks:
        return None
    (step,) = scores.sinks
    query = form.site.query.node.meta["val"]
    if isinstance(step.sink, fx.Node):
        found = sink_of_heads(step, form.site)
        assert found is not None
        sink = emit.relayout(*found, (form.heads,))
        return emit.call(aten.expand.default, sink, [emit.size(form.heads)])
    size = [emit.size(form.heads)]
    return emit.call(aten.full.default, size, step.sink, dtype=query.dtype, device=query.device)


@dataclass(frozen=True)
class Scoring:
    """What a fused operator does to q·k: scale, soft cap, mask, and sinks beside them."""

    scale: float | fx.Node | None
    mask: fx.Node | None = None
    sinks: fx.Node | None = None
    cap: float = 0.0
    causal: bool = False
    window: int = 0


def _shape_of_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def emit_attention(
    emit: Emitter,
    form: Canonical,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    scoring: Scoring,
) -> fx.Node:
    """latent::attention on canonical tensors, its result in the layout and dtype of the site's output."""
    site = form.site
    if scoring.mask is not None and (rank := scoring.mask.meta["val"].dim()) != 4:
        raise ValueError(f"a mask of {rank} dimensions is not canonical")
    grouped = form.folded and bool(site.axes.groups)
    target = torch.ops.latent.attention.default
    how = (scoring.mask, scoring.sinks, scoring.scale, scoring.cap, scoring.causal, scoring.window)
    return emit_result(emit, form, emit.known(target, _shape_of_output, query, key, value, *how, grouped))


def emit_result(emit: Emitter, form: Canonical, out: fx.Node) -> fx.Node:
    """[B H S E] in the layout and dtype of the site's output."""
    site = form.site
    out = emit.relayout(out, form.rows(site.axes.value_width), site.output_layout)
    return emit.cast(out, site.output.meta["val"].dtype)


def emit_own_mask(emit: Emitter, form: Canonical) -> fx.Node | None:
    """The mask of a call as it is, [B|1 H|1 S|1 T]."""
    site = form.site
    if site.call is None or site.call.mask is None:
        return None
    layout = next(s.layout for s in site.steps if isinstance(s, Bias | Fill))
    return emit.relayout(site.call.mask, layout, (site.axes.batch, form.heads, site.axes.queries, site.axes.keys))
