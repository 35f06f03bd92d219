"""Buffers that are filled piece by piece become one `cat`.

    b = empty(n, 8); b[:, :4] = x; b[:, 4:] = y   ->   b = cat((x, y), 1)

Multi-head latent attention in transformers joins the two halves of its keys so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .compat import FakeTensor, statically_known_true, switches_mode
from .mutations import Mutations

__all__ = ["resolve_filled_buffers"]

aten = torch.ops.aten

_FRESH = {
    aten.empty.memory_format,
    aten.new_empty.default,
    aten.zeros.default,
    aten.new_zeros.default,
    aten.full.default,
    aten.new_full.default,
}
Size = int | torch.SymInt


@dataclass(frozen=True)
class Region:
    """The part start .. start + length of one dimension, all of the others; dim None is the whole buffer."""

    dim: int | None = None
    start: Size = 0
    length: Size = 0
    dropped: bool = False


@dataclass(frozen=True)
class Piece:
    """One write of `source` into `region`."""

    write: fx.Node
    source: fx.Node
    region: Region


def resolve_filled_buffers(gm: fx.GraphModule) -> int:
    """Replace every buffer that is written piece by piece, completely, before it is read. In place; -> how many."""
    resolved, mutations = 0, None
    for node in list(gm.graph.nodes):
        if node.target in _FRESH and node.kwargs.get("memory_format") is None and _is_written(node):
            mutations = mutations or Mutations.of(gm.graph)
            pieces = _resolve(node, mutations)
            resolved += bool(pieces)
            if 0 < pieces < len(mutations.writes[node]):  # the other writes are to the cat now
                mutations = None
    return resolved


def _is_written(buffer: fx.Node) -> bool:
    return any(user.target in (aten.slice.Tensor, aten.select.int, aten.narrow.default) for user in buffer.users)


def _resolve(buffer: fx.Node, mutations: Mutations) -> int:
    """The number of writes that became a cat; 0 when the buffer stays."""
    pieces = _pieces(buffer) or []
    dims = {piece.region.dim for piece in pieces}
    dim = dims.pop() if len(dims) == 1 else None
    if dim is None:
        return 0
    whole = buffer.meta["val"]
    ordered = _covering(pieces, whole.shape[dim])
    if ordered is None or not _order_safe(buffer, pieces, mutations) or not all(_fits(p, whole) for p in pieces):
        return 0
    _replace(buffer, ordered, pieces, dim)
    return len(pieces)


# ** finding the pieces **


def _pieces(buffer: fx.Node) -> list[Piece] | None:
    """The writes into slices of a buffer in order, or None when such a slice is used in another way as well."""
    found: list[Piece] = []
    for user in buffer.users:
        region = _narrow(user, buffer, Region())
        uses = list(_writes_through(user, region)) if region is not None else []
        pieces = [piece for piece in uses if piece is not None]
        if pieces and len(pieces) < len(uses):
            return None
        found += pieces
    return sorted(found, key=lambda piece: piece.write)


def _writes_through(view: fx.Node, region: Region) -> Iterator[Piece | None]:
    """The writes through one view and views of it; None stands for any other use."""
    for user in view.users:
        inner = _narrow(user, view, region)
        if inner is not None:
            yield from _writes_through(user, inner)
        elif user.target is aten.copy_.default and user.args[0] is view and user.args[1] is not view:
            source = user.args[1]
            yield Piece(user, source, region) if isinstance(source, fx.Node) and not user.users else None
        else:
            yield None


def _narrow(view: fx.Node, source: fx.Node, region: Region) -> Region | None:
    """The region that a slice of a slice takes, or None when `view` is no such thing."""
    if view.op != "call_function" or not view.args or view.args[0] is not source:
        return None
    if view.target is aten.alias.default:
        return region
    if view.target not in (aten.slice.Tensor, aten.select.int, aten.narrow.default) or region.dropped:
        return None
    before = source.meta["val"].shape
    dim = int(view.args[1]) % len(before) if len(view.args) > 1 else 0  # type: ignore[arg-type]
    if view.target is aten.select.int:
        taken = Region(dim, _from_zero(view.args[2], before[dim]), 1, dropped=True)
    else:
        if len(view.args) > 4 and view.args[4] != 1:
            return None
        length = view.meta["val"].shape[dim]
        if statically_known_true(length == before[dim]):
            return region
        taken = Region(dim, _from_zero(view.args[2] if len(view.args) > 2 else 0, before[dim]), length)
    if region.dim is None:
        return taken
    if region.dim != dim:
        return None
    return Region(dim, region.start + taken.start, taken.length, taken.dropped)


def _from_zero(argument: Any, size: Size) -> Size:
    """A start as an offset from the front."""
    value: Size = argument.meta["val"] if isinstance(argument, fx.Node) else argument or 0
    return value + size if statically_known_true(value < 0) else value


# ** judging **


def _covering(pieces: Sequence[Piece], size: Size) -> list[Piece] | None:
    """The pieces from front to back when they fill `size` without a gap or an overlap, else None."""
    rest, ordered, position = list(pieces), [], 0
    while rest:
        piece = next((p for p in rest if statically_known_true(p.region.start == position)), None)
        if piece is None:
            return None
        rest.remove(piece)
        ordered.append(piece)
        position = position + piece.region.length  # type: ignore[assignment]
    return ordered if statically_known_true(position == size) else None


def _order_safe(buffer: fx.Node, pieces: Sequence[Piece], mutations: Mutations) -> bool:
    """Nobody reads before the last write, no source changes on the way, and no mode is switched between the writes."""
    first, last = pieces[0].write, pieces[-1].write
    if any(not last < reader for reader in _readers(buffer, pieces)):
        return False
    if any(mutations.write_between(piece.source, piece.write, last) for piece in pieces):
        return False
    node = first
    while node is not last and not switches_mode(node.target):
        node = node.next
    return node is last


def _readers(buffer: fx.Node, pieces: Sequence[Piece]) -> list[fx.Node]:
    """What uses a buffer and is no slice that is written through; slices that are read belong here."""
    written = set()
    for piece in pieces:
        view = piece.write.args[0]
        while isinstance(view, fx.Node) and view is not buffer:
            written.add(view)
            view = view.args[0]
    return [user for user in buffer.users if user not in written]


def _fits(piece: Piece, whole: torch.Tensor) -> bool:
    """Whether the source can be brought to the shape and dtype of its region by operators that need no symbols."""
    source, target = piece.source.meta["val"], piece.write.args[0].meta["val"]  # type: ignore[union-attr]
    return source.device == whole.device and _expansion(source.shape, target.shape) is not None


def _expansion(before: Sequence[Size], after: Sequence[Size]) -> list[int] | None:
    """The sizes to hand to `expand`, [] when the shapes agree, None when one of them is not a plain number."""
    lead = len(after) - len(before)
    sizes: list[int] = []
    for position, size in enumerate(after):
        if position >= lead and statically_known_true(before[position - lead] == size):
            sizes.append(-1)
        elif isinstance(size, int):
            sizes.append(size)
        else:
            return None
    return sizes if lead or any(size != -1 for size in sizes) else []


# ** replacing **


def _replace(buffer: fx.Node, ordered: Sequence[Piece], pieces: Sequence[Piece], dim: int) -> None:
    graph, last, readers = buffer.graph, pieces[-1].write, _readers(buffer, pieces)
    parts = [_as_part(piece, buffer.meta["val"].dtype, dim, last) for piece in ordered]
    joined = _emit(graph, last, last, aten.cat.default, parts, dim)
    for reader in readers:
        reader.replace_input_with(buffer, joined)
    for piece in reversed(pieces):
        view = piece.write.args[0]
        graph.erase_node(piece.write)
        while isinstance(view, fx.Node) and not view.users:
            source = view.args[0]
            graph.erase_node(view)
            view = None if view is buffer else source


def _as_part(piece: Piece, dtype: torch.dtype, dim: int, before: fx.Node) -> fx.Node:
    """The source as `copy_` writes it: in the buffer's dtype and the region's shape."""
    part, graph = piece.source, before.graph
    if part.meta["val"].dtype != dtype:
        part = _emit(graph, before, piece.write, aten.to.dtype, part, dtype)
    if sizes := _expansion(part.meta["val"].shape, piece.write.args[0].meta["val"].shape):  # type: ignore[union-attr]
        part = _emit(graph, before, piece.write, aten.expand.default, part, sizes)
    if piece.region.dropped:
        part = _emit(graph, before, piece.write, aten.unsqueeze.default, part, dim)
    return part


def _emit(graph: fx.Graph, before: fx.Node, like: fx.Node, target: object, *args: object) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(target, args)  # type: ignore[arg-type]
    _describe(node, like)
    return node


def _describe(node: fx.Node, like: fx.Node) -> None:
    """Origin of `like`, and the value that the operator gives for the values of its arguments."""
    args = fx.node.map_arg(node.args, lambda given: given.meta["val"])
    mode = next(v.fake_mode for v in torch.utils._pytree.tree_leaves(args) if isinstance(v, FakeTensor))
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    with mode:
        node.meta["val"] = node.target(*args)  # type: ignore[operator]
