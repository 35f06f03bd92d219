"""An operand of attention as a product of weights and a narrower tensor, by the axis algebra.

    key[b h j d]   =   sum_c  up[h d c] latent[b j c] + bias[h d]        for each part of the width d

The walk goes against the data from the operand through layout operations, casts, joins along the width and numbers that
scale, up to a contraction with a tensor that has neither batch nor key axes: its weights are views of the model's. What
is met before such a contraction may be an `image` of a latent all the same; else it is left whole, as a rotated part or
a cache of expanded keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from .axes import Axis, AxisSpace, Dim, Layout, Size, same_size, size_of
from .contractions import Contraction, contraction
from .factored import Cut, Factor, Factored, Whole
from .images import image
from .layouts import Part, is_cast, is_tensor, layout_step, shape_of
from .nodes import args_of, argument
from .roles import peel
from .scalars import read_scalar
from .sites import AttentionSite, Operand

aten = torch.ops.aten


def factor(operand: Operand, width: Dim, site: AttentionSite) -> tuple[Factor, ...]:
    """The parts of an operand's width, in order."""
    start = _State(operand.node, operand.layout, 0, width)
    return tuple(_narrowest(part, site) for part in _walk(start, site))


def _narrowest(part: Factored | Whole, site: AttentionSite) -> Factor:
    """The part as an image of a latent, where no weights were met or the tensor that they are applied to is wider."""
    made = image(part.left_whole() if isinstance(part, Factored) else part, site)
    if made is None or (isinstance(part, Factored) and not _narrower(made, part)):
        return part
    return made


def _narrower(one: Factored, other: Factored) -> bool:
    a, b = size_of(one.latent_width), size_of(other.latent_width)
    return isinstance(a, int) and isinstance(b, int) and a < b and not other.padding


@dataclass(frozen=True)
class _State:
    """Where the walk is: the node, its layout, the columns that it makes, and what was passed on the way."""

    node: fx.Node
    layout: Layout
    start: Size
    width: Dim
    top: tuple[fx.Node, Layout] | None = None
    joined_by: fx.Node | None = None
    cuts: tuple[Cut, ...] = ()
    factor: float = 1.0
    tokens: Cut | None = None
    padding: int = 0


def _walk(state: _State, site: AttentionSite) -> list[Factor]:
    space = site.space
    state = replace(state, top=state.top or (state.node, state.layout))
    while True:
        node, layout = state.node, space.resolve_layout(state.layout)
        if (step := layout_step(node)) is not None:
            if isinstance(step, Part):
                if (before := _uncut(state, step, site)) is None:
                    break
                state = before
                continue
            undone = step.undo(layout, space)
            if undone is None:
                break
            state = replace(state, node=step.source, layout=undone)
        elif is_cast(node) and is_tensor(args_of(node)[0]):
            state = replace(state, node=args_of(node)[0], layout=layout)
        elif (scaled := scaled_by_number(node)) is not None:
            state = replace(state, node=scaled[0], layout=layout, factor=state.factor * scaled[1])
        elif (beside_zeros := _padded(state, layout, site)) is not None:
            return beside_zeros
        elif (parts := _joined(state, layout, space)) is not None:
            return [found for part in parts for found in _walk(part, site)]
        elif (found := _product(state, layout, site) or _sum(state, layout, site)) is not None:
            return [found]
        else:
            break
    return [Whole(*_columns(state, site))]


def _columns(state: _State, site: AttentionSite) -> tuple[Size, Size, Dim, Cut | None, Operand, fx.Node]:
    """What every part knows."""
    assert state.top is not None
    operand = peel(*state.top, site.space)
    reader = operand.chain[-2][0] if len(operand.chain) > 1 else state.joined_by or site.region[0]
    width = site.space.resolve(state.width)
    return state.start, size_of(width), width, state.tokens, operand, reader


def _uncut(state: _State, step: Part, site: AttentionSite) -> _State | None:
    """Against a slice, a split or a select: the dimension was a part of a wider one."""
    space = site.space
    layout = space.resolve_layout(state.layout)
    if set(space.resolve(site.axes.keys)) & set(layout[step.dim]):
        return _uncut_tokens(state, step, layout, site)
    whole = space.fresh("w", shape_of(step.source)[step.dim])
    taken = () if step.drop else layout[step.dim]
    rest = layout[step.dim :] if step.drop else layout[step.dim + 1 :]
    cut = Cut(taken, whole, step.start, step.length)
    return replace(state, node=step.source, layout=(*layout[: step.dim], whole, *rest), cuts=(*state.cuts, cut))


def _uncut_tokens(state: _State, step: Part, layout: Layout, site: AttentionSite) -> _State | None:
    """Against a slice of the tokens: weights are the same for each, so what they are applied to is sliced instead."""
    space = site.space
    if (
        step.drop
        or not isinstance(step.start, int)
        or layout[step.dim] != space.resolve(site.axes.keys)
        or state.tokens is not None
    ):
        return None
    whole = space.fresh("J", shape_of(step.source)[step.dim])
    cut = Cut(layout[step.dim], whole, step.start, step.length)
    before = (*layout[: step.dim], whole, *layout[step.dim + 1 :])
    return replace(state, node=step.source, layout=before, tokens=cut, top=(step.source, before), joined_by=state.node)


def scaled_by_number(node: fx.Node) -> tuple[fx.Node, float] | None:
    """x * number, x / number."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return None
    a, b = args_of(node)[:2]
    if node.target in (aten.mul.Tensor, aten.mul.Scalar) and not is_tensor(a):
        a, b = b, a
    number = read_scalar(b)
    if not is_tensor(a) or number is None or len(shape_of(a)) != len(shape_of(node)) or not number:
        return None
    return a, number if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / number


def _joined(state: _State, layout: Layout, space: AxisSpace) -> list[_State] | None:
    """cat along the width: a state for each part."""
    node = state.node
    if node.target is not aten.cat.default or state.cuts:
        return None
    dim = int(argument(node, 1, "dim", 0)) % len(layout)
    if not layout[dim] or layout[dim] != space.resolve(state.width):
        return None
    states: list[_State] = []
    start = state.start
    for part in args_of(node)[0]:
        length = shape_of(part)[dim]
        own = space.fresh("d", length)
        inner = (*layout[:dim], own, *layout[dim + 1 :])
        states.append(_State(part, inner, start, own, None, node, (), state.factor, state.tokens))
        start = start + length
    return states


def _padded(state: _State, layout: Layout, site: AttentionSite) -> list[Factor] | None:
    """Against zeros on the right of the width: the parts of what they were put beside, if weights make one of them."""
    node, space = state.node, site.space
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default) or state.cuts or state.padding:
        return None
    source, widths = args_of(node)[0], list(args_of(node)[1])
    whole = node.target is aten.pad.default  # the other one has no mode
    value = argument(node, 3 if whole else 2, "value", None)
    zeros = value in (None, 0) and (not whole or argument(node, 2, "mode", "constant") == "constant")
    if len(widths) != 2 or widths[0] != 0 or not isinstance(widths[1], int) or widths[1] <= 0 or not zeros:
        return None
    if layout[-1] != space.resolve(state.width):
        return None
    own = space.fresh("d", shape_of(source)[-1])
    inner = (*layout[:-1], own)
    before = replace(
        state, node=source, layout=inner, width=own, padding=widths[1], top=(source, inner), joined_by=node
    )
    parts = _walk(before, site)
    return parts if any(isinstance(part, Factored) for part in parts) else None


def _product(state: _State, layout: Layout, site: AttentionSite) -> Factored | None:
    """The node as weights times a latent, or None."""
    found = contraction(state.node)
    if found is None or len(found.summed) != 1 or found.alpha != 1.0 or found.beta != 1.0:
        return None
    for latent_is_lhs in (True, False):
        factored = _read(state, layout, found, latent_is_lhs, site)
        if factored is not None:
            return factored
    return None


def _read(
    state: _State, layout: Layout, found: Contraction, latent_is_lhs: bool, site: AttentionSite
) -> Factored | None:
    space = site.space
    if len(found.out_labels) != len(layout):
        return None
    of_label = {label: dim for label, dim in zip(found.out_labels, layout, strict=True) if label is not None}
    (summed,) = found.summed
    latent, weight = (found.lhs, found.rhs) if latent_is_lhs else (found.rhs, found.lhs)
    latent_labels, weight_labels = (
        (found.lhs_labels, found.rhs_labels) if latent_is_lhs else (found.rhs_labels, found.lhs_labels)
    )
    size = shape_of(latent)[latent_labels.index(summed)]
    width = space.fresh("c", size)
    if not width:
        return None
    of_label[summed] = width

    def layout_of(labels: tuple[str | None, ...]) -> Layout:
        return tuple(() if label is None else of_label.get(label, ()) for label in labels)

    latent_layout, weight_layout = layout_of(latent_labels), layout_of(weight_labels)
    keys = set(space.resolve(site.axes.keys if state.tokens is None else state.tokens.whole))
    # A parameter may have axes that the site takes for batch: heads that were split in two look like it.
    learned = peel(weight, weight_layout, space).root.op in ("placeholder", "get_attr")
    tokens = keys if learned else keys | set(site.axes.batch)
    own_width = _with_wholes(space.resolve(state.width), state.cuts, space)
    if space.axes(weight_layout) & tokens or space.axes(latent_layout) & own_width:
        return None
    if not keys <= space.axes(latent_layout):
        return None
    bias_layout = _aligned(found.addend, layout)
    if space.axes(bias_layout) & tokens:
        return None
    return Factored(
        *_columns(state, site),
        latent=peel(latent, latent_layout, space),
        latent_width=width,
        weight=weight,
        weight_layout=weight_layout,
        contraction=state.node,
        bias=found.addend,
        bias_layout=bias_layout,
        factor=state.factor,
        cuts=state.cuts,
        padding=state.padding,
    )


def _sum(state: _State, layout: Layout, site: AttentionSite) -> Factored | None:
    """W c + B (A c) = (W + B A) c: the products of an adapter that was not merged."""
    node = state.node
    if node.target is not aten.add.Tensor or node.kwargs or not all(map(is_tensor, args_of(node)[:2])):
        return None
    found: list[Factored] = []
    for operand in args_of(node)[:2]:
        shapes = shape_of(operand), shape_of(node)
        if len(shapes[0]) != len(shapes[1]) or not all(map(same_size, *shapes)):
            return None
        parts = _walk(replace(state, node=operand, layout=layout), site)
        if len(parts) != 1 or not isinstance(parts[0], Factored) or parts[0].tokens is not None:
            return None
        found.append(parts[0])
    one, other = sorted(found, key=lambda part: part.bias is None)
    if other.bias is not None:
        return None
    for first, second in ((one, other), (one, _from_behind(other, site)), (_from_behind(one, site), other)):
        if first is None or second is None or not set(second.heads(site)) <= set(first.heads(site)):
            continue
        if _same_latent(first, second, site.space):
            return replace(first, addends=(*first.addends, second))
    return None


def _from_behind(part: Factored, site: AttentionSite) -> Factored | None:
    """B (A c) as a product with c, where the tensor that B is applied to is A c."""
    if part.inner is not None or part.addends:
        return None
    latent = part.latent
    found = _walk(_State(latent.node, latent.layout, 0, part.latent_width), site)
    inner = found[0] if len(found) == 1 else None
    if not isinstance(inner, Factored) or inner.bias is not None or inner.heads(site):
        return None
    return replace(part, latent=inner.latent, latent_width=inner.latent_width, inner=inner)


def _same_latent(one: Factored, other: Factored, space: AxisSpace) -> bool:
    """Whether two products are made of the same tensor, token for token."""

    def source(part: Factored) -> tuple[fx.Node, Layout]:
        node, layout = part.latent.chain[-1]
        width = space.resolve(part.latent_width)
        return node, tuple(() if dim == width else dim for dim in space.resolve_layout(layout))

    return source(one) == source(other) and same_size(size_of(one.latent_width), size_of(other.latent_width))


def _aligned(addend: fx.Node | None, layout: Layout) -> Layout:
    """The layout of what is added to a tensor, its last dimensions under the tensor's last."""
    if addend is None:
        return ()
    shape = shape_of(addend)
    dims = layout[len(layout) - len(shape) :]
    return tuple(() if same_size(n, 1) else dim for n, dim in zip(shape, dims, strict=True))


def _with_wholes(width: Dim, cuts: tuple[Cut, ...], space: AxisSpace) -> set[Axis]:
    """The axes of the width, and those of which they are a part."""
    found = set(width)
    for cut in cuts:
        if set(space.resolve(cut.taken)) & found or not cut.taken:
            found |= set(space.resolve(cut.whole))
    return found
