"""Roles of a site's axes, and operands followed up through layout operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from .axes import Axis, AxisSpace, Dim, Layout, flat
from .layouts import layout_step
from .sites import Bias, Fill, Operand, ScoreStep, ScoreTerm, Sink, SiteAxes


def peel(node: fx.Node, layout: Layout, space: AxisSpace) -> Operand:
    """The tensor and what it was before each layout operation, up to the first node that is none."""
    chain = [(node, layout)]
    while (step := layout_step(node)) is not None:
        before = step.undo(space.resolve_layout(layout), space)
        if before is None:
            break
        node, layout = step.source, before
        chain.append((node, layout))
    return Operand(tuple((n, space.resolve_layout(dims)) for n, dims in chain))


def roles_of(
    scores: Layout,
    keys: Dim,
    terms: Sequence[ScoreTerm],
    value: Operand,
    steps: Sequence[ScoreStep],
    space: AxisSpace,
) -> SiteAxes:
    """Batch, heads, groups and queries, in the order in which the scores have them."""
    keys = space.resolve(keys)
    key_layouts = [space.resolve_layout(term.key.layout) for term in terms]
    query_layouts = [space.resolve_layout(term.query.layout) for term in terms]
    value_layout = space.resolve_layout(value.layout)
    indexed = space.axes(*key_layouts, value_layout)
    in_query = space.axes(*query_layouts)
    order = [axis for axis in flat(scores) if axis in indexed | in_query or axis not in space.sums]
    order = [axis for axis in order if axis not in keys and axis not in space.sums]
    rest = indexed - set(order) - set(keys)
    width = set().union(*(space.axes(k) & space.axes(q) for k, q in zip(key_layouts, query_layouts, strict=True)))
    value_width = tuple(a for a in flat(value_layout) if a in rest and a not in width)
    roots = space.axes(
        *(space.resolve_layout(term.key.chain[-1][1]) for term in terms), space.resolve_layout(value.chain[-1][1])
    )
    # The rows of one key head: query tokens, and heads that share keys. Masks tell the two apart where a spelling
    # folds both into one dimension; an axis that keys or values merely repeat is a group as well.
    single = [axis for axis in order if axis not in indexed]
    masked = space.axes(*(space.resolve_layout(s.layout) for s in steps if isinstance(s, Bias | Fill) and s.layout))
    free = [axis for axis in single if _sits_in_rows(axis, scores, query_layouts)]
    told_apart = [axis for axis in single if axis in masked]
    if len(told_apart) == len(single):
        told_apart = []
    queries = told_apart or free or ([] if _one_row(scores, keys, space) else single[-1:])
    repeated = [axis for axis in order if axis in indexed and axis not in roots]
    shared = [axis for axis in order if axis in indexed and axis not in repeated]
    groups = [axis for axis in order if axis in repeated or (axis in single and axis not in queries)]
    # With one shared axis and heads that share it, it is the batch, and there is one key head; else the last is that of
    # the heads. Sinks that are the same for all tokens are weights of the heads: what they tell apart is no batch.
    told = _told_apart_by_sinks(steps, space)
    told = frozenset() if told & set(queries) else told
    first = next((n for n, axis in enumerate(shared) if axis in told), len(shared))
    first = first if first < len(shared) or (len(shared) == 1 and groups) else len(shared) - 1
    return SiteAxes(
        batch=tuple(shared[: max(first, 0)]),
        heads=tuple(shared[max(first, 0) :]),
        groups=tuple(groups),
        queries=tuple(queries),
        keys=keys,
        value_width=value_width,
    )


def _told_apart_by_sinks(steps: Sequence[ScoreStep], space: AxisSpace) -> frozenset[Axis]:
    sinks = [(s.sink, s.layout) for s in steps if isinstance(s, Sink) and isinstance(s.sink, fx.Node)]
    return space.axes(*(peel(sink, layout, space).chain[-1][1] for sink, layout in sinks))


def _sits_in_rows(axis: Axis, scores: Layout, queries: Sequence[Layout]) -> bool:
    """Whether the axis sits in the query's row dimension, not in a batch dimension that the keys broadcast over."""
    last = [dim for dim in scores if axis in dim]
    return (bool(last) and scores.index(last[0]) >= len(scores) - 2) or any(
        axis in layout[-2] for layout in queries if len(layout) >= 2
    )


def _one_row(scores: Layout, keys: Dim, space: AxisSpace) -> bool:
    """Whether the scores are [.. 1 T]: one query token, and what only queries have are heads that share keys."""
    rows = [dim for dim in scores[-2:] if space.resolve(dim) != keys]
    return len(scores) > 3 and rows == [()]


def resolved(step: ScoreStep, space: AxisSpace) -> ScoreStep:
    layout = getattr(step, "layout", None)
    changed: Any = {"layout": space.resolve_layout(layout)} if layout else {}
    return dataclasses.replace(step, **changed)
