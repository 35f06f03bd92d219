"""Sites of operators that are attention by contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from .axes import AxisSpace, Dim, Layout, same_size
from .layouts import shape_of
from .nodes import args_of
from .roles import peel, resolved, roles_of
from .sites import AttentionCall, AttentionSite, Bias, Fill, Scale, ScoreStep, ScoreTerm, Sink, Tanh
from .walks import operand_layout


def call_site(call: AttentionCall, space: AxisSpace) -> AttentionSite:
    """The site of an operator that is attention by contract: query [.. S D], key [.. T D], value [.. T E]."""
    q, k, v = (shape_of(node) for node in (call.query, call.key, call.value))
    rank = max(len(q), len(k), len(v)) - 2
    groups: Dim = ()
    batch_q: list[Dim] = []
    batch_k: list[Dim] = []
    batch_v: list[Dim] = []
    for i in range(-rank - 2, -2):
        size_q, size_k, size_v = (shape[i] if -i <= len(shape) else 1 for shape in (q, k, v))
        if call.grouped and i == -3 and not same_size(size_q, size_k):
            # The call raises where the key heads do not divide the query heads, so H / K is a whole number.
            whole = isinstance(size_q, int) and isinstance(size_k, int)
            head, groups = space.fresh("h", size_k), space.fresh("g", size_q // size_k if whole else size_q / size_k)
            batch_q.append(head + groups)
            batch_k.append(head)
            batch_v.append(head)
            continue
        size = next((s for s in (size_q, size_k, size_v) if not same_size(s, 1)), 1)
        dim = space.fresh("h" if i == -3 else f"b{rank + 2 + i}", size)
        for sizes, dims in ((size_q, batch_q), (size_k, batch_k), (size_v, batch_v)):
            dims.append(() if same_size(sizes, 1) else dim)
    queries, keys = space.fresh("i", q[-2]), space.fresh("j", k[-2])
    width, value_width = space.fresh("d", q[-1]), space.fresh("e", v[-1])

    def own(batch: list[Dim], shape: Sequence[object], *tail: Dim) -> Layout:
        return (*batch[len(batch) - (len(shape) - 2) :], *tail)

    layout_q, layout_k = own(batch_q, q, queries, width), own(batch_k, k, keys, width)
    layout_v = own(batch_v, v, keys, value_width)
    batch = [a or b or c for a, b, c in zip(batch_q, batch_k, batch_v, strict=True)]
    scores = (*batch, queries, keys)
    steps: list[ScoreStep] = []
    if call.mask is not None:
        layout = operand_layout(call.mask, scores)
        boolean = str(call.mask.meta["val"].dtype) == "torch.bool"
        steps.append(
            Fill(call.anchor, call.mask, True, float("-inf"), layout)
            if boolean
            else Bias(call.anchor, call.mask, 1.0, layout)
        )
    if call.cap:
        steps[:0] = [Scale(call.anchor, 1.0 / call.cap), Tanh(call.anchor), Scale(call.anchor, call.cap)]
    if isinstance(call.scale, fx.Node):
        steps.insert(0, Scale(call.anchor, by=call.scale))
    elif call.scale is not None and call.scale != 1.0:
        steps.insert(0, Scale(call.anchor, call.scale))
    if call.sinks is not None:
        steps.append(Sink(call.anchor, call.sinks, layout=(batch[-1],)))
    term = ScoreTerm(peel(call.query, layout_q, space), peel(call.key, layout_k, space))
    value = peel(call.value, layout_v, space)
    axes = roles_of(space.resolve_layout(scores), keys, [term], value, steps, space)
    if groups:  # with one query token nothing but the call itself tells queries and groups apart
        axes = replace(axes, queries=space.resolve(queries), groups=space.resolve(groups))
        heads = space.resolve(batch_k[-1])
        outer = tuple(axis for axis in axes.batch + axes.heads if axis not in heads)
        axes = replace(axes, batch=outer, heads=heads)
    output = call.anchor
    for user in call.anchor.users:
        if call.name == "flex_attention" and args_of(user)[1:] == (0,):
            output = user
    return AttentionSite(
        anchor=call.anchor,
        output=output,
        output_layout=space.resolve_layout((*batch, queries, value_width)),
        spelling=call.name,
        terms=(term,),
        value=value,
        steps=tuple(resolved(step, space) for step in steps),
        weight_steps=(),
        weights=None,
        weight_readers=(),
        axes=axes,
        region=(call.anchor, output) if output is not call.anchor else (call.anchor,),
        space=space,
        call=call,
    )
