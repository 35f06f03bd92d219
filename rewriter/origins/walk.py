"""The walk of `origins`: against the data, one node at a time, with the layout in hand as far as it is known."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy
from torch import fx

from ..axes import Axis, AxisSpace, Dim, Layout, Size, product, same_size
from ..layouts import Expand, Part, Repeat, Step, is_cast, is_tensor, layout_step, shape_of
from ..mutations import Mutations, base_of
from ..registry import patterns
from ..sizes import hints_near
from .pieces import Along, CacheRead, Cast, Found, Narrow, Opaque, Origin, Parts, Piece, Projection, Reading, Slice
from .pieces import Repeat as RepeatPiece

__all__ = ["DEPTH", "Walk", "find_producer", "is_bottleneck"]

log = logging.getLogger(__name__)

BUDGET = 400
"""Nodes that the origin of one operand may come by. Real ones take about thirty."""
DEPTH = 6
"""Joins within joins."""


def find_producer(node: fx.Node, reading: Reading) -> Found | None:
    """What the first pattern that knows a node says of it. A pattern that fails knows nothing."""
    for read in patterns("producer"):
        try:
            found = read(node, reading)
        except Exception as error:
            log.debug("producer %s at %s: %s: %s", getattr(read, "__name__", read), node, type(error).__name__, error)
            continue
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


@dataclass
class _Cut:
    """A slice whose meaning shows further up: the axis that was cut, and where its piece stands."""

    axis: Axis
    start: Size
    length: Size
    before: Dim
    at: int


@dataclass(frozen=True)
class _Place:
    """A tensor, the node that reads it, and its layout where that is known."""

    node: fx.Node
    at: fx.Node
    layout: Layout | None


class Walk:
    """One operand. The budget is shared by all of its parts, so that the walk is bounded on every graph."""

    def __init__(self, mutations: Mutations, start: fx.Node, tokens: set[Axis], given_latents: bool = True) -> None:
        self.mutations = mutations
        self.given_latents = given_latents
        """Whether an input of the graph may be a latent."""

        self.space = AxisSpace(hints_near(start))
        self.tokens = tokens
        self.budget = BUDGET
        self.bases: dict[fx.Node, fx.Node] = {}

    def base(self, node: fx.Node) -> fx.Node:
        """The node whose storage this one lies in."""
        if node not in self.bases:
            self.bases[node] = base_of(node)
        return self.bases[node]

    def origin(self, node: fx.Node, at: fx.Node, layout: Layout | None, depth: int = 0) -> Origin:
        return _Branch(self, depth).run(_Place(node, at, layout))


class _Branch:
    """One way up, until it ends or parts."""

    def __init__(self, walk: Walk, depth: int) -> None:
        self.walk, self.depth, self.space = walk, depth, walk.space
        self.pieces: list[Piece] = []
        self.path: list[fx.Node] = []
        self.cuts: list[_Cut] = []

    def run(self, start: _Place) -> Origin:
        place: _Place | None = start
        while place is not None:
            node = place.node
            self.walk.budget -= 1
            self.path.append(node)
            try:
                place = self.step(place)
            except Exception as error:  # an unknown graph is no reason to fail
                log.debug("origin at %s: %s: %s", node, type(error).__name__, error)
                place = self.end(node, "cannot be read")
        return Origin(tuple(self.pieces), tuple(self.path))

    def step(self, place: _Place) -> _Place | None:
        """Take one node; the next place, or None at the end."""
        node = place.node
        if self.walk.budget < 0 or self.depth > DEPTH:
            return self.end(node, "the way is too long")
        if not is_tensor(node):
            return self.end(node, "no tensor")
        reading = self.reading(place)
        found = find_producer(node, reading)
        changed = any(write > node for write in reading.writes) and (
            self.walk.base(node) is node or node in reading.writes
        )
        if changed and (found is None or not found.sees_writes):
            return self.end(node, "written to before it is read")
        if found is not None:
            return self.found(found, place)
        if is_cast(node) and isinstance(node.args[0], fx.Node):
            return self.cast(place, node.args[0])
        layout = layout_step(node)
        if layout is not None:
            return self.layout(layout, place)
        if str(node.target) in ("aten.cat.default", "aten.concat.default"):
            return self.parts(place)
        return self.end(node, "")

    def end(self, node: fx.Node, reason: str) -> _Place | None:
        self.pieces.append(Opaque(node, reason))
        return None

    def reading(self, place: _Place) -> Reading:
        layout = self.space.resolve_layout(place.layout) if place.layout is not None else None
        tokens = self.tokens()
        dims = tuple(i for i, dim in enumerate(layout or ()) if tokens.intersection(dim))
        writes = self.walk.mutations.writes
        before = writes.get(self.walk.base(place.node), ()) if writes else ()
        return Reading(place.at, tuple(w for w in before if w < place.at), dims, layout, self.depth)

    def tokens(self) -> frozenset[Axis]:
        return self.space.axes(tuple((axis,) for axis in self.walk.tokens))

    # ** pieces by patterns **

    def found(self, found: Found, place: _Place) -> _Place | None:
        piece, source = found.piece, found.source
        if isinstance(piece, Projection):
            return self.projection(piece, found, place)
        if piece is not None:
            self.pieces.append(piece)
        if source is None:
            return None
        layout = found.layout
        if layout is None and place.layout is not None and is_tensor(source):
            layout = self.carried(place, source, piece)
        return _Place(source, place.node if not self.shares(place.node, source) else place.at, layout)

    def carried(self, place: _Place, source: fx.Node, piece: Piece | None) -> Layout | None:
        """The layout of what a piece was made from: the same, but for the tokens that a cache adds."""
        before, after = shape_of(source), shape_of(place.node)
        assert place.layout is not None
        if len(before) != len(after):
            return None
        layout = list(place.layout)
        for dim, (old, new) in enumerate(zip(before, after, strict=True)):
            if isinstance(piece, CacheRead) and dim == piece.dim:
                layout[dim] = self.new_axis("t", old)
                self.walk.tokens.update(layout[dim])
            elif not same_size(old, new):
                return None
        return tuple(layout)

    def projection(self, piece: Projection, found: Found, place: _Place) -> _Place | None:
        """A projection ends the walk, unless it projects a latent, or every head by itself: then the way goes on."""
        used = self.settle(piece)
        if self.walk.budget > 0 and self.depth <= DEPTH and found.source is not None:
            rest = _Branch(self.walk, self.depth + 1)
            latent = rest.run(_Place(found.source, place.node, found.layout))
            narrow = is_bottleneck(latent, piece, piece.out_width, used, self.walk.given_latents)
            if narrow or piece.per_head:
                latent_piece = Narrow(place.node, found.source, piece.in_width, piece)
                self.pieces.append(piece if piece.per_head else latent_piece)
                self.pieces.extend(latent.pieces)
                self.path.extend(latent.path)
                return None
        self.pieces.append(piece)
        return None

    def settle(self, piece: Projection) -> Size:
        """Say of the slices on the way which elements of the projection's result they take, and how many are left."""
        axes = self.space.resolve(piece.axes)
        used = piece.out_width
        for cut in self.cuts:
            whole = self.space.resolve((cut.axis,))
            first = next((i for i, axis in enumerate(axes) if axis in whole), None)
            slice_ = self.pieces[cut.at]
            if first is None or not isinstance(slice_, Slice):
                continue
            inner = product(axis.size for axis in axes[first:] if axis not in whole)
            start, length, of = (size * inner for size in (cut.start, cut.length, cut.axis.size))
            self.pieces[cut.at] = Slice(slice_.node, "width", start, length, of, interleaved=first > 0)
            if isinstance(used, int) and isinstance(length, int) and isinstance(of, int) and of:
                used = used * length // of
        return used

    # ** what needs no pattern **

    def shares(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether later writes to `source` show in `node`."""
        return bool(self.walk.mutations.writes) and self.walk.base(node) is self.walk.base(source)

    def next(self, place: _Place, source: fx.Node, layout: Layout | None) -> _Place:
        return _Place(source, place.at if self.shares(place.node, source) else place.node, layout)

    def cast(self, place: _Place, source: fx.Node) -> _Place:
        if place.node.meta["val"].dtype != source.meta["val"].dtype:
            self.pieces.append(Cast(place.node, place.node.meta["val"].dtype))
        return self.next(place, source, place.layout)

    def layout(self, step: Step, place: _Place) -> _Place:
        layout = place.layout
        if isinstance(step, Part):
            return self.part(step, place)
        if isinstance(step, Expand | Repeat):
            groups = _repetitions(step)
            if not same_size(groups, 1):
                self.pieces.append(RepeatPiece(place.node, groups))
        if layout is not None:
            layout = step.undo(self.space.resolve_layout(layout), self.space)
        return self.next(place, step.source, layout)

    def part(self, step: Part, place: _Place) -> _Place:
        """The dimension that was cut gets an axis for the whole of it."""
        before = shape_of(step.source)
        along = self.along(step, place)
        self.pieces.append(Slice(place.node, along, step.start, step.length, before[step.dim]))
        if place.layout is None:
            return self.next(place, step.source, None)
        layout = list(self.space.resolve_layout(place.layout))
        taken = () if step.drop else layout.pop(step.dim)
        whole = self.new_axis("w", before[step.dim])
        layout.insert(step.dim, whole)
        if along == "tokens":
            self.walk.tokens.update(whole)
        elif whole:
            self.cuts.append(_Cut(whole[0], step.start, step.length, taken, len(self.pieces) - 1))
        return self.next(place, step.source, tuple(layout))

    def along(self, step: Part, place: _Place) -> Along:
        if step.drop or place.layout is None:
            rank = len(shape_of(step.source))
            return "other" if step.drop else self.reading(replace(place, layout=None)).along(step.dim, rank)
        return self.reading(place).along(step.dim, len(place.layout))

    def new_axis(self, name: str, size: Size) -> Dim:
        return self.space.fresh(name, size)

    def parts(self, place: _Place) -> _Place | None:
        """A join: of the one part that is read further down, or of all of them."""
        node = place.node
        tensors = [t for t in node.args[0] if isinstance(t, fx.Node)]  # type: ignore[union-attr]
        rank = len(shape_of(node))
        dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank  # type: ignore[arg-type]
        tensors = [t for t in tensors if len(shape_of(t)) == rank and not same_size(shape_of(t)[dim], 0)]
        if (taken := self.taken(place, tensors, dim)) is not None:
            return taken
        along = self.reading(place).along(dim, rank)
        children = []
        for tensor in tensors:
            layout = None
            if place.layout is not None:
                axis = self.new_axis("p", shape_of(tensor)[dim])
                layout = (*place.layout[:dim], axis, *place.layout[dim + 1 :])
                if along == "tokens":
                    self.walk.tokens.update(axis)
            children.append(self.walk.origin(tensor, node, layout, self.depth + 1))
        self.pieces.append(Parts(node, along, tuple(children)))
        return None

    def taken(self, place: _Place, tensors: list[fx.Node], dim: int) -> _Place | None:
        """The part of a join that a slice takes, when the slice falls on the boundaries; the slice is then no piece."""
        if place.layout is None or not self.cuts or self.space.resolve(place.layout[dim]) != (self.cuts[-1].axis,):
            return None
        cut, offset = self.cuts[-1], 0  # type: tuple[_Cut, Size]
        for tensor in tensors:
            size = shape_of(tensor)[dim]
            if same_size(offset, cut.start) and same_size(size, cut.length) and cut.before:
                self.cuts.pop()
                self.pieces.pop(cut.at)
                for later in self.cuts:
                    later.at -= later.at > cut.at
                layout = (*place.layout[:dim], cut.before, *place.layout[dim + 1 :])
                return self.next(place, tensor, layout)
            offset = offset + size
        return None


def _repetitions(step: Expand | Repeat) -> Size:
    if isinstance(step, Repeat):
        return product(step.counts)
    return product(size for size, repeated in zip(step.after, step.repeated(), strict=True) if repeated)


def is_bottleneck(latent: Origin, up: Projection, expanded: Size, used: Size, given: bool) -> bool:
    """Whether the source of a projection is narrower than both what it was made from and what is made of it.

    A cache of it takes the place of what it was made from; with `given` so does an input, if the `used` part of what is
    made of it is wider.
    """
    number = hints_near(up.node)
    if not _less(up.in_width, expanded, number):
        return False
    for piece in latent:
        match piece:
            case CacheRead():
                return True
            case Projection() | Narrow():
                down = piece if isinstance(piece, Projection) else piece.up
                return _less(up.in_width, down.in_width, hints_near(down.node))
            case Opaque(node=node):
                return given and node.op == "placeholder" and _less(up.in_width, used, number)
            case Parts():
                return False
    return False


def _less(a: Size, b: Size, number: Callable[[sympy.Expr], int]) -> bool:
    """Compares symbols by their examples: whether a tensor is narrow decides what pays, not what is right."""
    return (a if isinstance(a, int) else number(a)) < (b if isinstance(b, int) else number(b))
