"""An operand of attention as a product of weights and a narrower tensor, by the axis algebra.

    key[b h j d]   =   sum_c  up[h d c] latent[b j c] + bias[h d]        for each part of the width d

The walk goes against the data from the operand through layout operations, casts, joins along the width and numbers that
scale, up to a contraction with a tensor that has neither batch nor key axes. What is met before such a contraction is
left whole: a rotated part, or a cache of expanded keys.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import fx

from .axes import Axis, AxisSpace, Dim, Layout, Size, flat, same_size, size_of
from .canonical import place
from .contractions import Contraction, contraction
from .emit import Emitter
from .layouts import Part, is_cast, is_tensor, layout_step, shape_of
from .nodes import args_of, argument
from .roles import peel
from .scalars import read_scalar
from .sites import AttentionSite, Operand

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """`taken` are the elements of `whole` from `start` on."""

    taken: Dim
    whole: Dim
    start: Size
    length: Size


@dataclass(frozen=True)
class _Part:
    """Columns start .. of the operand's width. With `tokens` the operand has only some of the tensor's tokens."""

    start: Size
    length: Size
    width: Dim
    tokens: Cut | None
    operand: Operand
    reader: fx.Node
    """What reads the end of the operand's chain."""

    @property
    def end(self) -> fx.Node:
        """What the part is made by, behind layout operations."""
        return self.operand.root

    def keys(self, site: AttentionSite) -> Dim:
        """The axes of the tokens in the tensors that the part is made of."""
        return site.space.resolve(site.axes.keys if self.tokens is None else self.tokens.whole)

    def emit_of_keys(
        self, emit: Emitter, site: AttentionSite, operand: Operand, heads: Dim, width: Dim, dtype: torch.dtype
    ) -> fx.Node:
        """A tensor of the part as [batch, heads, keys, width]."""
        emit.learn(operand.chain)
        node = place(emit, operand, (site.axes.batch, heads, self.keys(site), width), site)
        if self.tokens is not None:
            length = emit.size(site.space.resolve(site.axes.keys))
            start = self.tokens.start
            end = length + start if isinstance(length, int) else emit.call(operator.add, length, start)
            node = emit.call(aten.slice.Tensor, node, 2, start, end)
        return emit.cast(node, dtype)


@dataclass(frozen=True)
class Factored(_Part):
    """Columns start .. of the operand's width: weights times a latent, plus a bias, times a number."""

    latent: Operand
    latent_width: Dim
    weight: fx.Node
    weight_layout: Layout
    contraction: fx.Node
    bias: fx.Node | None = None
    bias_layout: Layout = ()
    factor: float = 1.0
    cuts: tuple[Cut, ...] = ()

    def emit_weight(self, emit: Emitter, site: AttentionSite, heads: Dim, dtype: torch.dtype) -> fx.Node:
        """[heads, width, latent width], a view of the weight."""
        return self._emit(emit, site, self.weight, self.weight_layout, (heads, self.width, self.latent_width), dtype)

    def emit_bias(self, emit: Emitter, site: AttentionSite, heads: Dim, dtype: torch.dtype) -> fx.Node | None:
        """[heads or 1, width]."""
        if self.bias is None:
            return None
        return self._emit(emit, site, self.bias, self.bias_layout, (heads, self.width), dtype)

    def _emit(
        self, emit: Emitter, site: AttentionSite, node: fx.Node, layout: Layout, target: Layout, dtype: torch.dtype
    ) -> fx.Node:
        space = site.space
        for cut in reversed(self.cuts):  # the one nearest to the weight first
            layout, whole = space.resolve_layout(layout), space.resolve(cut.whole)
            merged = (whole, *(dim for dim in ((a,) for a in flat(layout)) if dim[0] not in whole))
            node = emit.relayout(node, layout, merged)
            end = cut.start + cut.length
            node = emit.call(aten.slice.Tensor, node, 0, cut.start, end)
            layout = (cut.taken, *merged[1:])
        node = emit.cast(emit.relayout(node, layout, target), dtype)
        return node if self.factor == 1.0 else emit.call(aten.mul.Tensor, node, self.factor)

    def left_whole(self) -> Whole:
        """The part as what it is, whatever it was made of."""
        return Whole(self.start, self.length, self.width, self.tokens, self.operand, self.reader)

    def heads(self, site: AttentionSite) -> Dim:
        """The head axes that the weight tells apart."""
        space = site.space
        found = set(space.axes(self.weight_layout))
        for cut in self.cuts:
            found |= space.axes((cut.taken,))
        return tuple(a for a in (*site.axes.heads, *site.axes.groups) if a in found)


@dataclass(frozen=True)
class Whole(_Part):
    """Columns start .. of the operand's width that are no such product, and the node at which the walk ended."""


Factor = Factored | Whole


def factor(operand: Operand, width: Dim, site: AttentionSite) -> tuple[Factor, ...]:
    """The parts of an operand's width, in order."""
    start = _State(operand.node, operand.layout, 0, width)
    return tuple(_walk(start, site))


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
        elif (parts := _joined(state, layout, space)) is not None:
            return [found for part in parts for found in _walk(part, site)]
        elif (found := _product(state, layout, site)) is not None:
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
    )


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
