"""An operand of attention as an affine image of a narrower tensor, by whatever steps it is made.

    k_j = f(c_j) = U c_j + b,  the same f for every token      =>      U = f(I) - f(0),  b = f(0)

The walk goes against the data through steps that are linear in what depends on the tokens: products with weights, sums,
scales for a column or a head, joins and cuts of the width, casts. Where all ways meet in one tensor that is a latent,
and the narrowest such is taken. Its weights are made by running the same steps on unit vectors, so no spelling of
adapters, biases or quantised weights needs a reader of its own; work on weights alone is done once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .axes import Axis, Dim, Layout, size_of
from .emit import Emitter
from .factored import Factored, Whole
from .layouts import Expand, Identity, Part, Permute, View, layout_step
from .linear_walk import LinearWalk, drops_nothing
from .nodes import args_of, argument
from .roles import peel
from .sites import AttentionSite

__all__ = ["Image", "image"]

aten = torch.ops.aten

_WITH_ADDEND = {aten.addmm.default, aten.baddbmm.default}
_WITH_BIAS = {aten.linear.default, aten.conv1d.default}


@dataclass(frozen=True)
class Image(Factored):
    """Columns start .. of the operand's width: f of a latent. `steps` lead from the latent to `weight`, in order."""

    steps: tuple[tuple[fx.Node, Layout], ...] = ()
    adds: frozenset[fx.Node] = frozenset()
    """The steps that add what does not depend on the latent."""

    constants: tuple[tuple[fx.Node, fx.Node], ...] = ()
    """What else the steps read, and the step."""

    token: Axis | None = None
    batch: frozenset[Axis] = frozenset()
    """With `token` the axes over which f is the same."""

    def emit_weight(self, emit: Emitter, site: AttentionSite, heads: Dim, dtype: torch.dtype) -> fx.Node:
        """[heads, width, latent width]: f without what it adds, of unit vectors."""
        count = int(size_of(site.space.resolve(self.latent_width)))
        like = self.latent.node.meta["val"]
        rows = emit.call(aten.eye.default, count, dtype=like.dtype, device=like.device)
        unit = site.space.fresh("u", count)
        made, layout = _Run(self, emit, site, unit, linear=True).of(rows)
        return emit.relayout(emit.cast(made, dtype), layout, (heads, self.width, unit))

    def emit_bias(self, emit: Emitter, site: AttentionSite, heads: Dim, dtype: torch.dtype) -> fx.Node | None:
        """[heads or 1, width]: f of zeros."""
        if self.bias is None:
            return None
        count = int(size_of(site.space.resolve(self.latent_width)))
        like = self.latent.node.meta["val"]
        zeros = emit.call(aten.zeros.default, [1, count], dtype=like.dtype, device=like.device)
        made, layout = _Run(self, emit, site, (), linear=False).of(zeros)
        return emit.relayout(emit.cast(made, dtype), layout, (heads, self.width))

    def reads(self) -> tuple[tuple[fx.Node, fx.Node], ...]:
        return ((self.latent.node, self.steps[0][0]), *self.constants, *((node, node) for node, _ in self.steps))


def image(part: Whole, site: AttentionSite) -> Image | None:
    """The part as an image of the narrowest tensor that all of it is made of, or None."""
    keys = site.space.resolve(part.keys(site))
    if len(keys) != 1 or part.tokens is not None:
        return None
    walk = LinearWalk(site, keys[0])
    cut = walk.narrowest(*part.operand.chain[-1])
    if cut is None:
        return None
    node, layout = cut
    steps = tuple((n, walk.space.resolve_layout(walk.layouts[n])) for n in sorted(walk.layouts) if node < n)
    root, root_layout = part.operand.chain[-1]
    inside, same = {n for n, _ in steps}, {keys[0], *walk.batch}
    adds = [n for n in walk.adds if n in inside]
    width = tuple(axis for dim in layout for axis in dim if axis not in same)
    weight_layout = tuple(tuple(a for a in dim if a not in same) for dim in walk.space.resolve_layout(root_layout))
    return Image(
        part.start,
        part.length,
        part.width,
        part.tokens,
        part.operand,
        part.reader,
        latent=peel(node, layout, walk.space),
        latent_width=width,
        weight=root,
        weight_layout=weight_layout,
        contraction=root,
        bias=next(iter(adds), None),
        steps=steps,
        adds=frozenset(adds),
        constants=tuple((constant, reader) for constant, reader in walk.constants if reader in inside),
        token=keys[0],
        batch=frozenset(walk.batch),
    )


class _Run:
    """The steps of an image once more, on rows of its latent's width in place of the tokens."""

    def __init__(self, made: Image, emit: Emitter, site: AttentionSite, rows: Dim, *, linear: bool) -> None:
        self.made, self.emit, self.space, self.rows, self.linear = made, emit, site.space, rows, linear
        self.values: dict[fx.Node, fx.Node] = {}

    def of(self, rows: fx.Node) -> tuple[fx.Node, Layout]:
        made, layout = self.made, self._changed(self.made.latent.chain[0][1])
        width = self.space.resolve(made.latent_width)
        self.values[made.latent.node] = self.emit.relayout(rows, (self.rows, width), layout)
        for node, its_layout in made.steps:
            self.values[node] = self._step(node, self._changed(its_layout))
        root, layout = made.steps[-1]
        return self.values[root], self._changed(layout)

    def _changed(self, layout: Layout) -> Layout:
        """With the rows where the tokens were, and one sequence."""
        token, batch = self.made.token, self.made.batch
        rows: dict[Axis, Dim] = {axis: (axis,) for axis in self.space.axes(layout) - batch}
        rows |= {} if token is None else {token: self.rows}
        return tuple(
            tuple(row for axis in dim for row in rows.get(axis, ())) for dim in self.space.resolve_layout(layout)
        )

    def _step(self, node: fx.Node, layout: Layout) -> fx.Node:
        call, values = self.emit.call, self.values
        step = layout_step(node)
        if step is not None:
            source = values[step.source]
            match step:
                case View():
                    return call(aten.reshape.default, source, self._sizes(layout))
                case Expand():
                    return call(aten.expand.default, source, self._sizes(layout))
                case Permute():
                    return call(aten.permute.default, source, list(step.order))
                case Part():
                    end = step.start + step.length
                    taken = call(aten.slice.Tensor, source, step.dim, step.start, end)
                    return call(aten.squeeze.dim, taken, step.dim) if step.drop else taken
                case Identity():
                    return source
                case _:
                    return self._again(node)
        if drops_nothing(node):
            return values[args_of(node)[0]]
        if self.linear and node in self.made.adds:
            return self._without_addend(node)
        return self._again(node)

    def _sizes(self, layout: Layout) -> list[Any]:
        return [self.emit.size(dim) for dim in layout]

    def _again(self, node: fx.Node) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values.get(n, n))
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        return self.emit.call(target, *args, **kwargs)

    def _without_addend(self, node: fx.Node) -> fx.Node:
        args = args_of(node)
        if node.target in _WITH_ADDEND:
            a, b = (self.values.get(n, n) for n in args[1:3])
            return self.emit.call(aten.matmul.default, a, b)
        if node.target in _WITH_BIAS:
            a, b = (self.values.get(n, n) for n in args[:2])
            return self.emit.call(node.target, a, b, None, *args[3:])
        first, second = args[:2]
        if first in self.values:
            return self.values[first]
        alpha = argument(node, 2, "alpha", 1)
        times = -alpha if node.target is aten.sub.Tensor else alpha
        return self.emit.call(aten.mul.Tensor, self.values[second], times)
