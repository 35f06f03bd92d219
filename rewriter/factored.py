"""What an operand of attention is made of: parts of its width, each weights times a latent, or left whole."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from .axes import Dim, Layout, Size, flat
from .canonical import place
from .emit import Emitter
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
    inner: Factored | None = None
    """What makes the tensor that `weight` is applied to out of `latent`: the weights are one product of both."""

    padding: int = 0
    """Zeros to the right of the columns: nothing to keys, and part of the result to values."""

    addends: tuple[Factored, ...] = ()
    """Further products with the same latent."""

    def emit_weight(self, emit: Emitter, site: AttentionSite, heads: Dim, dtype: torch.dtype) -> fx.Node:
        """[heads, width, latent width]: a view of the weight, or what several weights come to."""
        between = self.latent_width if self.inner is None else self.inner.width
        weight = self._emit(emit, site, self.weight, self.weight_layout, (heads, self.width, between), dtype)
        if self.inner is not None:
            weight = emit.call(aten.matmul.default, weight, self.inner.emit_weight(emit, site, (), dtype))
        for addend in self.addends:
            weight = emit.call(aten.add.Tensor, weight, addend.emit_weight(emit, site, heads, dtype))
        return weight

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

    def reads(self) -> tuple[tuple[fx.Node, fx.Node], ...]:
        """The tensors that it is made of and where they are read, and what it was made by, which nothing may change."""
        made_of = (self.latent.node, self.weight, self.bias, self.contraction)
        own = tuple((n, self.contraction) for n in made_of if n is not None)
        others = self.addends if self.inner is None else (*self.addends, self.inner)
        return own + tuple(read for other in others for read in other.reads())

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
