"""From a score product and a value product to a site: every axis gets its role, or the wrong one is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from .axes import Axis, AxisSpace, Dim, Layout
from .layouts import is_cast, layout_step, shape_of
from .near_misses import lost_weights
from .nodes import args_of
from .purity import is_pure
from .roles import peel, resolved, roles_of
from .scalars import read_scalar
from .sites import (
    AttentionSite,
    Bias,
    Blend,
    Changed,
    Fill,
    Inexact,
    NanToZero,
    Rehidden,
    Scale,
    ScoreStep,
    ScoreTerm,
    SoftmaxSpelling,
    WeightStep,
)
from .totals import broadcasts, layout_of_total
from .walks import Path, Product, Refused, ValueProduct


def softmax_site(
    spelling: SoftmaxSpelling,
    product: Product,
    second: Mapping[fx.Node, tuple[Product, float]],
    candidates: Sequence[ValueProduct],
    readers: Sequence[fx.Node],
    space: AxisSpace,
) -> AttentionSite:
    """Put the two products together. Raises Refused with the axis that does not fit."""
    keys = _key_axes(spelling, product, space)
    term = _term(product, keys, space, spelling.anchor)
    if not candidates:
        raise lost_weights(spelling.weights, readers)
    fitting = [c for c in candidates if _sums_over(c, keys, space)]
    if not fitting:
        raise Refused(_wrong_axis(candidates[0], keys, product.layout, space), candidates[0].contraction.node, 2)
    values = fitting[0]
    others = [c.contraction.node for c in candidates if c is not values]
    value, value_layout, output_layout = _value_operand(values, space)
    query_only = space.axes(term[0][1]) - space.axes(term[1][1])
    if shared := query_only & space.axes(value_layout):
        raise Refused(f"the values differ from query to query (axis of size {next(iter(shared)).size})", value, 2)

    output, output_layout, tail = _divide_later(spelling, values, output_layout, space)
    terms = [ScoreTerm(peel(*term[0], space), peel(*term[1], space))]
    taken: dict[fx.Node, Product] = {}
    for node, (extra, factor) in second.items():
        found = _fitting_term(extra, keys, query_only, space, spelling.anchor)
        if found is not None:
            query, key = found
            terms.append(ScoreTerm(peel(*query, space), peel(*key, space), factor * _factor(extra.steps)))
            taken[node] = extra
    steps = tuple(step for step in product.steps if step.node not in taken or not isinstance(step, Bias))
    steps = _blended(steps, keys, query_only, space)
    operand = peel(value, space.resolve_layout(value_layout), space)
    region = _region(spelling, product, taken.values(), values, tail)
    return AttentionSite(
        anchor=spelling.anchor,
        output=output,
        output_layout=space.resolve_layout(output_layout),
        spelling="softmax" if spelling.anchor is spelling.weights else "softmax by hand",
        terms=tuple(terms),
        value=operand,
        steps=tuple(resolved(step, space) for step in steps),
        weight_steps=_weight_steps(spelling, values, steps),
        weights=spelling.weights,
        weight_readers=tuple(n for n in (*readers, *others) if n not in region),
        axes=roles_of(space.resolve_layout(product.layout), keys, terms, operand, steps, space),
        region=region,
        space=space,
    )


# ------------------------------------------------------------------ axes


def _key_axes(spelling: SoftmaxSpelling, product: Product, space: AxisSpace) -> Dim:
    """The axes that the softmax normalises, without sinks."""
    dim = space.resolve(product.layout[spelling.dim])
    if len(dim) == 1 and dim[0] in space.sums:
        own = space.axes(product.lhs, product.rhs)
        parts = [space.resolve(part) for part in space.sums[dim[0]]]
        dim = next((part for part in parts if part and set(part) <= own), ())
    if not dim:
        raise Refused("the softmax runs over a dimension of size 1", spelling.anchor)
    return dim


def _term(
    product: Product, keys: Dim, space: AxisSpace, softmax: fx.Node
) -> tuple[tuple[fx.Node, Layout], tuple[fx.Node, Layout]]:
    """(query, key) of a product: the key is the operand whose own axes the softmax normalises."""
    found = product.contraction
    lhs = (found.lhs, space.resolve_layout(product.lhs))
    rhs = (found.rhs, space.resolve_layout(product.rhs))
    axes_lhs, axes_rhs = space.axes(lhs[1]), space.axes(rhs[1])
    wanted = set(keys)
    if wanted <= axes_rhs - axes_lhs:
        return lhs, rhs
    if wanted <= axes_lhs - axes_rhs:
        return rhs, lhs
    size = " x ".join(str(axis.size) for axis in keys)
    if wanted & axes_lhs & axes_rhs:
        raise Refused(
            f"the softmax runs over an axis (size {size}) that queries and keys share, like heads", softmax, 2
        )
    raise Refused(f"the softmax runs over more than the keys (size {size})", softmax, 2)


def _blended(
    steps: tuple[ScoreStep, ...], keys: Dim, query_only: frozenset[Axis], space: AxisSpace
) -> tuple[ScoreStep, ...]:
    """Scores times a tensor of queries and keys are attention only as one half of scores * m + c (1 - m).

    Raises Refused for any other gate on single scores.
    """
    found: list[ScoreStep] = []
    for step in steps:
        axes = space.axes(step.layout) if isinstance(step, Scale) and step.layout else frozenset()
        if axes & set(keys) and axes & query_only:
            assert isinstance(step, Scale) and step.by is not None
            later = [s for s in steps if isinstance(s, Bias) and isinstance(s.bias, fx.Node) and s.node > step.node]
            if step.divide or not any(_reads(s.bias, root_of(step.by)) for s in later if isinstance(s.bias, fx.Node)):
                reason = "single scores are multiplied by a tensor that varies over queries and keys"
                raise Refused(reason, step.node, 2)
            found.append(Blend(step.node, step.by, step.layout))
        else:
            found.append(step)
    return tuple(found)


def _reads(node: fx.Node, source: fx.Node, depth: int = 6) -> bool:
    """Whether a node is computed from another one in a few operations."""
    if node is source:
        return True
    return depth > 0 and any(_reads(n, source, depth - 1) for n in node.all_input_nodes)


def _fitting_term(
    extra: Product, keys: Dim, query_only: frozenset[Axis], space: AxisSpace, softmax: fx.Node
) -> tuple[tuple[fx.Node, Layout], tuple[fx.Node, Layout]] | None:
    """(query, key) of a further product; None when its key varies with the query (relative positions: a bias)."""
    try:
        query, key = _term(extra, keys, space, softmax)
    except Refused:
        return None
    return None if space.axes(key[1]) & query_only else (query, key)


def _weight_labels(values: ValueProduct) -> tuple[str | None, ...]:
    found = values.contraction
    return found.lhs_labels if values.weights_are_lhs else found.rhs_labels


def _summed_axes(values: ValueProduct, space: AxisSpace) -> frozenset[Axis]:
    labels = _weight_labels(values)
    dims = [dim for label, dim in zip(labels, values.weights, strict=True) if label in values.contraction.summed]
    return space.axes(tuple(dims))


def _sums_over(values: ValueProduct, keys: Dim, space: AxisSpace) -> bool:
    return _summed_axes(values, space) == space.axes((keys,))


def _wrong_axis(values: ValueProduct, keys: Dim, scores: Layout, space: AxisSpace) -> str:
    resolved = space.resolve_layout(scores)

    def text(axes: Iterable[Axis]) -> str:
        """Axes as the dimensions of the scores that they are, else by name."""
        dims = {axis: n - len(resolved) for n, dim in enumerate(resolved) for axis in dim if len(dim) == 1}
        names = [f"axis {dims[a]}" if a in dims else f"axis {a.name!r} (size {a.size})" for a in axes]
        return " and ".join(names) or "nothing"

    summed = sorted(_summed_axes(values, space), key=lambda axis: axis.name)
    return (
        f"the softmax normalises {text(space.resolve(keys))} of the scores, "
        f"but the values are summed over {text(summed)}"
    )


def _value_operand(values: ValueProduct, space: AxisSpace) -> tuple[fx.Node, Layout, Layout]:
    """The values, their layout, and the layout of the product."""
    found = values.contraction
    value = found.rhs if values.weights_are_lhs else found.lhs
    labels = found.rhs_labels if values.weights_are_lhs else found.lhs_labels
    dims = {label: dim for label, dim in zip(_weight_labels(values), values.weights, strict=True) if label is not None}
    for label, size in zip(labels, shape_of(value), strict=True):
        if label is not None and label not in dims:
            dims[label] = space.fresh("e" if label not in found.summed else label, size)
    layout = tuple(dims[label] if label else () for label in labels)
    out = tuple(dims[label] if label else () for label in found.out_labels)
    return value, layout, out


def _divide_later(
    spelling: SoftmaxSpelling, values: ValueProduct, layout: Layout, space: AxisSpace
) -> tuple[fx.Node, Layout, Path]:
    """The division by the row sum when it comes after the value product, else the product itself."""
    output, tail = values.contraction.node, ()
    if spelling.divided_later is None:
        return output, layout, tail
    path: list[fx.Node] = []
    while True:
        users = list(output.users)
        if len(users) != 1:
            raise Refused("the value product is read before it is divided by the row sums", output, 2)
        user = users[0]
        step = layout_step(user)
        if step is not None and step.source is output:
            moved = step.apply(space.resolve_layout(layout), space)
            if moved is None:
                raise Refused("the value product is cut before it is divided by the row sums", user, 2)
            layout = moved
        elif set(args_of(user)[:2]) == {output, spelling.divided_later}:
            _check_rows(spelling, values, layout, space, user)
            path.append(user)
            return user, layout, tuple(path)
        else:
            raise Refused("the value product is not divided by the row sums", user, 2)
        path.append(user)
        output = user


def _check_rows(
    spelling: SoftmaxSpelling, values: ValueProduct, layout: Layout, space: AxisSpace, division: fx.Node
) -> None:
    """Raise Refused unless every row of the value product is divided by its own sum."""
    assert spelling.total is not None and spelling.divided_later is not None
    if values.path:
        raise Refused("the weights are reshaped before the value product and divided after it", division, 2)
    sums = layout_of_total(spelling.total, spelling.divided_later, values.weights, spelling.dim, space)
    if sums is None or not broadcasts(sums, space.resolve_layout(layout), space):
        raise Refused("the value product is divided by sums of other rows", division, 2)


def _weight_steps(
    spelling: SoftmaxSpelling, values: ValueProduct, steps: Sequence[ScoreStep]
) -> tuple[WeightStep, ...]:
    """The steps after the softmax. Raises Refused when they make the weights something else than attention."""
    found: list[WeightStep] = []
    masks = [root_of(step.condition) for step in steps if isinstance(step, Fill)]
    for step in values.steps:
        if isinstance(step, Rehidden):
            again = root_of(step.condition)
            if step.value != 0.0 or not any(_computes_the_same(again, mask) for mask in masks):
                before = "with another mask than before it" if masks else "and the scores before it are not"
                raise Refused(f"the weights are masked after the softmax, {before}", step.node, 2)
            found.append(NanToZero(step.node))
        elif isinstance(step, Changed):
            raise Refused(step.reason, step.node, 2)
        else:
            found.append(step)
    if spelling.inexact is not None:
        found.append(Inexact(spelling.weights, spelling.inexact))
    return tuple(found)


def _computes_the_same(one: object, other: object, depth: int = 8) -> bool:
    """Whether two arguments are the same operators of the same nodes: a mask that is compared twice."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_computes_the_same(a, b, depth) for a, b in zip(one, other, strict=True))
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return type(one) is type(other) and one == other
    number = read_scalar(one)
    if one is other or (number is not None and number == read_scalar(other)):
        return True
    alike = depth > 0 and one.op == other.op == "call_function" and one.target is other.target and is_pure(one)
    return alike and one.kwargs == other.kwargs and _computes_the_same(one.args, other.args, depth - 1)


def root_of(node: fx.Node) -> fx.Node:
    """What a mask was before layout operations, casts and negations."""
    while True:
        step = layout_step(node)
        if step is not None:
            node = step.source
        elif is_cast(node) or str(node.target) in ("aten.logical_not.default", "aten.bitwise_not.default"):
            node = args_of(node)[0]
        else:
            return node


def _factor(steps: Sequence[ScoreStep]) -> float:
    factor = 1.0
    for step in steps:
        if isinstance(step, Scale):
            factor *= step.factor
    return factor


def _region(
    spelling: SoftmaxSpelling,
    product: Product,
    second: Iterable[Product],
    values: ValueProduct,
    tail: Path,
) -> tuple[fx.Node, ...]:
    nodes = {*product.path, spelling.anchor, spelling.weights, *values.path, values.contraction.node, *tail}
    for extra in second:
        nodes.update(extra.path)
    # softmax by hand: what lies between the scores and the weights
    pending = [spelling.weights, *([spelling.divided_later] if spelling.divided_later else [])]
    while pending:
        node = pending.pop()
        if node in nodes and node is not spelling.weights and node is not spelling.anchor:
            continue
        nodes.add(node)
        pending.extend(n for n in node.all_input_nodes if n > spelling.scores and n not in nodes)
    return tuple(sorted(nodes))
