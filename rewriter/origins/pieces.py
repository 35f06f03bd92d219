"""Where queries, keys and values come from, by what the data flow computes: the pieces, and how a site's are found.

    q = rope(rms_norm(x W_q))   is   (Rope, Norm, Projection)            from the attention backwards
    k = [U (cached norm(x D)) | rope(x W)]   is   (Parts((Narrow, CacheRead, Norm, Slice, Projection), (Rope, ...)),)

Every spelling of a piece is a registered pattern of kind "producer" (`patterns/producers`), a function
`(node, reading) -> Found | None`. Layout operations, casts and joins along an axis are followed here. Read-only: a node
that no pattern knows ends the walk in `Opaque`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import fx

from ..axes import Dim, Layout, Size
from ..compat import source_name
from ..mutations import Mutations, mutations
from ..sites import AttentionSite, Operand

__all__ = [
    "Activation",
    "CacheRead",
    "Cast",
    "Found",
    "Narrow",
    "Norm",
    "Opaque",
    "Origin",
    "Origins",
    "Parts",
    "Piece",
    "PositionScale",
    "Projection",
    "Reading",
    "Repeat",
    "Rope",
    "ScaleBy",
    "Slice",
    "origin",
    "origins",
]

Along = Literal["width", "tokens", "other"]
CacheKind = Literal["concatenated", "static", "sliding", "slice assigned"]
RopeForm = Literal["half", "interleaved", "complex", "other"]


# ** pieces **


@dataclass(frozen=True)
class Piece:
    """One operation on the way of a tensor; `node` computes it."""

    node: fx.Node


@dataclass(frozen=True)
class Repeat(Piece):
    """Every element `groups` times (repeated key heads, one key for all heads)."""

    groups: Size


@dataclass(frozen=True)
class Cast(Piece):
    """Another dtype."""

    dtype: torch.dtype


@dataclass(frozen=True)
class ScaleBy(Piece):
    """Times a number; None where it is a symbol, which is then `by`."""

    number: float | None
    by: fx.Node | None = None


@dataclass(frozen=True)
class PositionScale(Piece):
    """source · by, one number for every token, which is made of its position and of nothing else."""

    source: fx.Node
    by: fx.Node


@dataclass(frozen=True)
class Activation(Piece):
    """A function of each element by itself."""

    name: str


@dataclass(frozen=True)
class Rope(Piece):
    """Pairs of the width rotated by an angle that depends on the position.

    half: the pairs are [i, i + width/2]; interleaved and complex: [2i, 2i + 1]; other: other pairs. With `partial` only
    `width` elements from `position` on are rotated. `angles` are the factors: cosine and sine, or one complex number.
    """

    form: RopeForm
    width: Size
    partial: bool = False
    position: Size = 0
    angles: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Norm(Piece):
    """Divided by a root mean square (rms), centred as well (layer), or by its length (l2), over the last `width`."""

    kind: Literal["rms", "layer", "l2"]
    over: tuple[int, ...]
    """The normalised dimensions, counted from the end: (-1,)."""

    width: Size
    weight: fx.Node | None = None


@dataclass(frozen=True)
class CacheRead(Piece):
    """Tokens of earlier calls with those of this one, which `written` holds; the walk goes on there.

    `buffer` is the input that holds the earlier ones, or the fresh tensor where this call starts the cache. `write` is
    the operator that joins, at `position` (a node, a number, or None at the end); `earlier` are further writes of this
    graph to the same buffer.
    """

    kind: CacheKind
    buffer: fx.Node
    dim: int
    written: fx.Node
    position: object = None
    earlier: tuple[fx.Node, ...] = ()

    @property
    def source(self) -> str:
        """Where the buffer comes from in the user's program; "" when unknown."""
        return source_name(self.buffer)

    @property
    def fresh(self) -> bool:
        """Whether this call starts the cache."""
        return self.buffer.op != "placeholder"


@dataclass(frozen=True)
class Parts(Piece):
    """Joined from several tensors, along the width ([nope | rope]) or along the tokens; each with its own origin."""

    along: Along
    children: tuple[Origin, ...]


@dataclass(frozen=True)
class Slice(Piece):
    """A part of a wider tensor: `length` of each `of` elements, from `start` on.

    `interleaved`: once for every head, where heads lie outside of the parts; else one block for all heads.
    """

    along: Along
    start: Size
    length: Size
    of: Size
    interleaved: bool = False


@dataclass(frozen=True)
class Projection(Piece):
    """source · weight + bias over `in_width`.

    `parameter` is the input that holds the weight; `learned` says that it is a parameter or buffer of a module, and not
    a tensor given to the call. `transposed` weights are stored [in, out]. With `per_head` the weight has one matrix for
    each head of its source, and the widths are those of one. `axes` are those that the weight gives to the result.
    """

    weight: fx.Node
    bias: fx.Node | None
    in_width: Size
    out_width: Size
    source: fx.Node
    parameter: fx.Node
    learned: bool = True
    transposed: bool = False
    per_head: bool = False
    axes: Dim = ()


@dataclass(frozen=True)
class Narrow(Piece):
    """Expanded from a latent that is narrower than what is made of it and than what it was made from."""

    latent: fx.Node
    width: Size
    up: Projection


@dataclass(frozen=True)
class Opaque(Piece):
    """Where the walk ends."""

    reason: str = ""


@dataclass(frozen=True)
class Origin:
    """The pieces from the attention backwards, and every node the walk came by."""

    pieces: tuple[Piece, ...]
    path: tuple[fx.Node, ...] = ()

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    @overload
    def __getitem__(self, at: int) -> Piece: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Piece, ...]: ...
    def __getitem__(self, at: int | slice) -> Piece | tuple[Piece, ...]:
        return self.pieces[at]

    def everywhere(self) -> Iterator[Piece]:
        """The pieces, those of parts after the parts themselves."""
        for piece in self.pieces:
            yield piece
            if isinstance(piece, Parts):
                for child in piece.children:
                    yield from child.everywhere()


# ** what producers are given, and what they answer **


@dataclass(frozen=True)
class Reading:
    """How a tensor is read: by `at`, which sees the `writes` to its storage, in order."""

    at: fx.Node
    writes: tuple[fx.Node, ...] = ()
    token_dims: tuple[int, ...] = ()
    """The dimensions that hold tokens, where they are known."""

    layout: Layout | None = None
    depth: int = 0

    def along(self, dim: int, rank: int) -> Along:
        """What dimension `dim` of a tensor of `rank` dimensions holds."""
        if dim in self.token_dims:
            return "tokens"
        width = rank - 2 if rank - 1 in self.token_dims else rank - 1
        if dim == width:
            return "width"
        return "other" if self.token_dims or dim != rank - 2 else "tokens"


@dataclass(frozen=True)
class Found:
    """A piece, or None where the node only passes on, and where the walk goes on (None: nowhere).

    `layout` is that of `source`; without it the source is laid out like the node where their shapes agree.
    """

    piece: Piece | None
    source: fx.Node | None
    layout: Layout | None = None
    sees_writes: bool = False
    """Whether the piece is about what was written to the node's storage."""


# ** origins **


@dataclass(frozen=True)
class Origins:
    """Of a site: one query and one key for each score product, and the value."""

    queries: tuple[Origin, ...]
    keys: tuple[Origin, ...]
    value: Origin

    @property
    def query(self) -> Origin:
        return self.queries[0]

    @property
    def key(self) -> Origin:
        return self.keys[0]


def origin(
    operand: Operand,
    mutations: Mutations,
    tokens: Dim = (),
    site: AttentionSite | None = None,
    given_latents: bool = True,
) -> Origin:
    """The pieces that an operand of a site is made of.

    `tokens` are the axes of its tokens; `given_latents`: an input of the graph may be a latent.
    """
    from .walk import Walk

    region = set(site.region) if site is not None else set(operand.node.users)
    readers = [user for user in operand.node.users if user in region]
    at = min(readers) if site is not None and readers else max(operand.node.users, default=operand.node)
    layout = site.space.resolve_layout(operand.layout) if site is not None else operand.layout
    return Walk(mutations, operand.node, set(tokens), given_latents).origin(operand.node, at, layout)


def origins(site: AttentionSite, writes: Mutations | None = None) -> Origins:
    """Where the queries, keys and values of a site come from."""
    writes = mutations(site.anchor.graph) if writes is None else writes
    rows, columns = site.axes.queries, site.axes.keys
    return Origins(
        tuple(origin(term.query, writes, rows, site, given_latents=False) for term in site.terms),
        tuple(origin(term.key, writes, columns, site) for term in site.terms),
        origin(site.value, writes, columns, site),
    )
