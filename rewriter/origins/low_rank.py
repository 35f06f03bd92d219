"""Keys and values that descend from one narrow tensor, by algebra: linear maps and their widths.

    k = U_k c, v = U_v c        c is narrower than k and v together, and than what it was made from

Whether a native latent model, a converted one or a shared basis made it so is all the same. In the absorbed form
nothing is expanded: keys and values are the latent, and the queries have one matrix for each head that leads to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from torch import fx

from ..axes import Size
from ..layouts import Expand, Identity, Permute, View, is_cast, layout_step
from ..mutations import Mutations, mutations
from ..sites import AttentionSite
from .pieces import (
    CacheRead,
    Cast,
    Narrow,
    Origin,
    Origins,
    Parts,
    Piece,
    Projection,
    Repeat,
    ScaleBy,
    Slice,
    origins,
)
from .walk import Walk, is_bottleneck

__all__ = ["LowRank", "MLAForm", "low_rank"]


class MLAForm(Enum):
    """What attention reads, and what is kept from call to call."""

    EXPANDED = "expanded"
    """Keys and values of every head, made of the latent of this call."""

    CACHED_LATENT = "cached latent"
    """Keys and values of every head, made of latents that a cache holds."""

    CACHED_EXPANDED = "cached expanded"
    """Keys and values of every head, held by a cache."""

    ABSORBED = "absorbed"
    """The latent itself."""


@dataclass(frozen=True)
class LowRank:
    """The narrow tensor that keys and values have in common.

    `key` and `value` are the projections out of it, the same one where it makes both; in the absorbed form `key` is
    the one that leads the queries to it, and `value` is None. `key_way` and `value_way` are the pieces between
    attention and the latent's projection; `others` are the parts of the keys beside that one.
    """

    form: MLAForm
    latent: fx.Node
    width: Size
    expanded: Size | None
    key: Projection
    value: Projection | None
    cache: CacheRead | None = None
    key_way: tuple[Piece, ...] = ()
    value_way: tuple[Piece, ...] = ()
    others: tuple[Origin, ...] = ()
    other_ways: tuple[tuple[Piece, ...], ...] = ()
    """The pieces between attention and those of `others` that come from the latent all the same."""

    @property
    def linear(self) -> bool:
        """Whether keys and values are linear in the latent, the same for every token: what absorption needs."""
        plain = (Slice, Repeat, Cast, ScaleBy, CacheRead, Parts)
        ways = (self.key_way, self.value_way, *self.other_ways)
        return all(isinstance(piece, plain) for way in ways for piece in way)


def low_rank(site: AttentionSite, writes: Mutations | None = None, found: Origins | None = None) -> LowRank | None:
    """The narrow common producer of a site's keys and values, or None."""
    writes = mutations(site.anchor.graph) if writes is None else writes
    found = origins(site, writes) if found is None else found
    return _expanded(found, writes) or _absorbed(found)


@dataclass(frozen=True)
class _Strand:
    """One way from attention up to a projection, and what comes behind it."""

    way: tuple[Piece, ...]
    up: Projection | None
    narrow: bool
    behind: tuple[Piece, ...]
    origin: Origin


def _strands(origin: Origin, before: tuple[Piece, ...] = ()) -> Iterator[_Strand]:
    """The ways through the parts of the width, each up to its first projection."""
    for at, piece in enumerate(origin.pieces):
        way = before + origin.pieces[:at]
        if isinstance(piece, Projection | Narrow):
            up = piece if isinstance(piece, Projection) else piece.up
            yield _Strand(way, up, isinstance(piece, Narrow), origin.pieces[at + 1 :], origin)
            return
        if isinstance(piece, Parts) and piece.along == "width":
            for child in piece.children:
                yield from _strands(child, (*way, piece))
            return
    yield _Strand(before + origin.pieces, None, False, (), origin)


def _expanded(found: Origins, writes: Mutations) -> LowRank | None:
    keys = [strand for origin in found.keys for strand in _strands(origin)]
    for value in _strands(found.value):
        for key in keys:
            if key.up is None or value.up is None or _bare(key.up.source) is not _bare(value.up.source):
                continue
            if key.up.per_head or value.up.per_head:
                continue
            whole = key.up.out_width if key.up.node is value.up.node else key.up.out_width + value.up.out_width
            if not key.narrow and not value.narrow and not _is_latent(key.up, whole, writes):
                continue
            cached = [p for p in (*key.way, *value.way) if isinstance(p, CacheRead)]
            behind = [p for p in _of_latent(key, value) if isinstance(p, CacheRead)]
            form = MLAForm.CACHED_EXPANDED if cached else MLAForm.CACHED_LATENT if behind else MLAForm.EXPANDED
            others = [other for other in keys if other is not key]
            latent = _bare(key.up.source)
            return LowRank(
                form=form,
                latent=latent,
                width=key.up.in_width,
                expanded=whole,
                key=key.up,
                value=value.up,
                cache=next(iter((*cached, *behind)), None),
                key_way=key.way,
                value_way=value.way,
                others=tuple(other.origin for other in others),
                other_ways=tuple(o.way for o in others if o.up is not None and _bare(o.up.source) is latent),
            )
    return None


def _of_latent(key: _Strand, value: _Strand) -> Iterator[Piece]:
    """The pieces behind the latent, up to what made it."""
    for piece in key.behind or value.behind:
        if isinstance(piece, Projection | Narrow):
            return
        yield piece


def _is_latent(up: Projection, whole: Size, writes: Mutations) -> bool:
    """Where two projections are each no wider than their source, whether both together are."""
    behind = Walk(writes, up.source, set(), given_latents=False).origin(up.source, up.node, None)
    return is_bottleneck(behind, up, whole, whole, given=False)


def _absorbed(found: Origins) -> LowRank | None:
    """Keys and values are one tensor, and a matrix for each head leads the queries to it."""
    keys = [strand for origin in found.keys for strand in _strands(origin)]
    ups = [strand.up for origin in found.queries for strand in _strands(origin) if strand.up and strand.up.per_head]
    reach = _reach(found.value)
    for key in keys:
        own = set(_reach(key.origin))
        shared = next((node for node in reach if node in own), None)
        up = next((up for up in ups if shared is not None and _has_width(shared, up.out_width)), None)
        if shared is None or up is None:
            continue
        cache = next((p for p in (*found.value, *key.way) if isinstance(p, CacheRead)), None)
        others = tuple(other.origin for other in keys if other is not key)
        return LowRank(MLAForm.ABSORBED, _bare(shared), up.out_width, None, up, None, cache, others=others)
    return None


def _reach(origin: Origin) -> list[fx.Node]:
    """The nodes that an operand passes by before anything is computed."""
    computed = (p.node for p in origin if not isinstance(p, Slice | Repeat | Cast | CacheRead))
    end = next(computed, None)
    nodes = list(origin.path)
    return nodes[: nodes.index(end) + 1] if end in nodes else nodes


def _has_width(node: fx.Node, width: Size) -> bool:
    value = node.meta.get("val")
    return getattr(value, "ndim", 0) > 0 and bool(value.shape[-1] == width)  # type: ignore[union-attr]


def _bare(node: fx.Node) -> fx.Node:
    """Without the layout operations and casts that lead to it."""
    while True:
        step = layout_step(node)
        if isinstance(step, View | Permute | Identity | Expand):
            node = step.source
        elif is_cast(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return node
