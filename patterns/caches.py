"""Reads of a cache: tokens of earlier calls, held by an input of the graph, with the tokens of this call.

The walk goes on at the new tokens. A tensor that is written to is read as the last write before the reader left it.
"""

from __future__ import annotations

import torch
from torch import fx

from ..rewriter.axes import same_size
from ..rewriter.compat import source_name
from ..rewriter.layouts import Part, is_cast, is_tensor, layout_step, shape_of
from ..rewriter.mutations import base_of
from ..rewriter.origins.pieces import CacheKind, CacheRead, Found, Reading
from ..rewriter.registry import pattern

aten = torch.ops.aten

_CAT = {aten.cat.default, aten.concat.default}
_FRESH = {
    aten.zeros.default,
    aten.new_zeros.default,
    aten.zeros_like.default,
    aten.full.default,
    aten.new_full.default,
    aten.empty.memory_format,
    aten.new_empty.default,
    aten.empty_like.default,
}
_LIFTS = {aten.lift_fresh_copy.default, aten.lift_fresh.default}
_REORDERS = {aten.index_select.default, aten.index.Tensor}
_BY_INDEX = {
    aten.index_copy_.default,
    aten.index_copy.default,
    aten.scatter_.src,
    aten.scatter.src,
}
_BY_INDICES = {aten.index_put_.default, aten.index_put.default, aten._unsafe_index_put.default}
_BY_SLICE = {aten.slice_scatter.default, aten.select_scatter.default}


def buffer_of(node: object) -> fx.Node | None:
    """The input that holds earlier tokens: no parameter, and reached by layout operations, casts and reorderings."""
    while isinstance(node, fx.Node):
        step = layout_step(node)
        if step is not None and not isinstance(step, Part):
            node = step.source
        elif is_cast(node) or (node.target in _REORDERS and is_tensor(node)):
            node = node.args[0]
        else:
            break
    if not isinstance(node, fx.Node) or node.op != "placeholder" or not is_tensor(node):
        return None
    source = source_name(node)
    return None if "._parameters[" in source or ("._buffers[" in source and not _is_written(node)) else node


def _is_written(node: fx.Node) -> bool:
    """Buffers of a module are caches where they are written to, constants elsewhere."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            schema = getattr(user.target, "_schema", None)
            if schema is not None and schema.is_mutable and user.args and base_of(user) is base_of(node):
                return True
            if layout_step(user) is not None and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


# ** joined **


@pattern("producer")
def concatenated(node: fx.Node, reading: Reading) -> Found | None:
    """cat([past, new], tokens), where past is an input, or empty in the call that starts the cache."""
    joined = _joined(node, reading)
    if joined is None:
        return None
    buffer, new, dim = joined
    sliding = any(
        isinstance(step := layout_step(user), Part) and step.dim == dim and _is_returned(user) for user in node.users
    )
    return Found(CacheRead(node, "sliding" if sliding else "concatenated", buffer, dim, new), new)


@pattern("producer")
def concatenated_sliding(node: fx.Node, reading: Reading) -> Found | None:
    """cat([past, new], tokens)[-window:]."""
    step = layout_step(node)
    if not isinstance(step, Part) or step.drop:
        return None
    joined = _joined(step.source, reading)
    if joined is None or joined[2] != step.dim:
        return None
    return Found(CacheRead(node, "sliding", joined[0], joined[2], joined[1]), joined[1])


def _joined(node: fx.Node, reading: Reading) -> tuple[fx.Node, fx.Node, int] | None:
    """(past, new, dimension) of a join of the two along the tokens."""
    if node.target not in _CAT:
        return None
    tensors = node.args[0]
    if not isinstance(tensors, list | tuple) or len(tensors) != 2:
        return None
    past, new = tensors
    rank = len(shape_of(node))
    dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank  # type: ignore[arg-type]
    if not isinstance(past, fx.Node) or not isinstance(new, fx.Node) or reading.along(dim, rank) != "tokens":
        return None
    buffer = past if _is_empty(past, dim) else buffer_of(_uncut(past, dim))
    return (buffer, new, dim) if buffer is not None and is_tensor(new) else None


def _uncut(past: fx.Node, dim: int) -> fx.Node:
    """What is kept of the past when the window slides before the join."""
    step = layout_step(past)
    return step.source if isinstance(step, Part) and step.dim == dim and not step.drop else past


def _is_empty(node: fx.Node, dim: int) -> bool:
    while node.target in _LIFTS or is_cast(node):
        node = node.args[0]  # type: ignore[assignment]
    shape = shape_of(node)
    none = any(same_size(size, 0) for size in shape)
    return none and (node.op == "get_attr" or node.target in _FRESH or node.op == "placeholder")


def _is_returned(node: fx.Node) -> bool:
    return node.graph.output_node() in node.users


# ** written in place **


@pattern("producer")
def written_in_place(node: fx.Node, reading: Reading) -> Found | None:
    """index_copy_(buffer, tokens, positions, new), buffer[.., positions] = new, buffer[.., a:b] = new; a later read."""
    writes = reading.writes
    if not writes or (base_of(node) is not node and node not in writes):
        return None
    write, base = writes[-1], base_of(node)
    if write.target is aten.copy_.default and base_of(write.args[0]) is base:  # type: ignore[arg-type]
        return _copied(node, write, base, writes[:-1])
    found = _indexed(write, reading)
    if found is None:
        return None
    target, dim, position, new = found
    return _cache(node, target, dim, position, new, writes[:-1])


@pattern("producer")
def written_anew(node: fx.Node, reading: Reading) -> Found | None:
    """index_copy(buffer, tokens, positions, new), scatter, index_put: the buffer with new tokens, as another tensor."""
    if node.target not in _BY_INDEX | _BY_INDICES | _BY_SLICE or reading.writes:
        return None
    found = _indexed(node, reading)
    return None if found is None else _cache(node, *found, ())


def _indexed(write: fx.Node, reading: Reading) -> tuple[fx.Node, int, object, fx.Node] | None:
    """(target, dimension, position, new) of a write by index along the tokens."""
    target = write.args[0]
    if not isinstance(target, fx.Node) or not is_tensor(target):
        return None
    rank = len(shape_of(target))
    if write.target in _BY_INDEX:
        dim, position, new = write.args[1:4]
    elif write.target in _BY_INDICES:
        used = [(i, index) for i, index in enumerate(write.args[1]) if index is not None]  # type: ignore[arg-type]
        if len(used) != 1 or (len(write.args) > 3 and write.args[3]):
            return None
        (dim, position), new = used[0], write.args[2]
    elif write.target in _BY_SLICE:
        new, dim = write.args[1], write.args[2] if len(write.args) > 2 else write.kwargs.get("dim", 0)
        position = write.args[3] if len(write.args) > 3 else write.kwargs.get("start")
    else:
        return None
    dim = int(dim) % rank  # type: ignore[arg-type]
    known = len(shape_of(target)) == rank and reading.layout is not None and len(reading.layout) == rank
    along = reading.along(dim, rank) if known else ("tokens" if dim != rank - 1 else "width")
    return (target, dim, position, new) if along == "tokens" and isinstance(new, fx.Node) else None


def _cache(
    node: fx.Node, target: fx.Node, dim: int, position: object, new: fx.Node, earlier: tuple[fx.Node, ...]
) -> Found | None:
    """What was written into: an input, a fresh tensor, or an input whose tokens moved on by one."""
    kind: CacheKind = "static"
    if target.target is aten.roll.default:
        kind, target = "sliding", target.args[0]  # type: ignore[assignment]
    buffer = buffer_of(target)
    if buffer is None:
        base = base_of(target)
        if base.target not in _FRESH:
            return None
        buffer = base
    return Found(CacheRead(node, kind, buffer, dim, new, position, earlier), new, sees_writes=True)


def _copied(node: fx.Node, write: fx.Node, base: fx.Node, earlier: tuple[fx.Node, ...]) -> Found | None:
    """buffer[a:b] = new; with all of the buffer, the buffer is what was copied."""
    target, new = write.args[0], write.args[1]
    if not isinstance(target, fx.Node) or not isinstance(new, fx.Node) or not is_tensor(new):
        return None
    cut: Part | None = None
    while target is not base:
        step = layout_step(target)
        if isinstance(step, Part):
            if cut is not None:
                return None
            cut = step
        elif step is None or shape_of(step.source) != shape_of(target):
            return None
        target = step.source
    if cut is None:
        return Found(None, new, sees_writes=True) if shape_of(new) == shape_of(base) else None
    rank = len(shape_of(base))
    if (base.op != "placeholder" and base.target not in _FRESH) or cut.dim == rank - 1:
        return None
    if base.op == "placeholder" and buffer_of(base) is None:
        return None
    return Found(CacheRead(node, "slice assigned", base, cut.dim, new, cut.start, earlier), new, sees_writes=True)
