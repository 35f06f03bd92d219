"""Where a site's tensors come from, in one line each.

k ← cache(static, dim 2) ← rope(half, 64) ← linear k_proj 576→192 (3 heads × 64)
"""

from __future__ import annotations

from torch import fx

from ..axes import product
from ..compat import source_name
from ..mutations import Mutations
from ..provenance import attribute_path, tensor_name
from ..sites import AttentionSite
from .pieces import (
    Activation,
    CacheRead,
    Cast,
    Narrow,
    Norm,
    Opaque,
    Origin,
    Parts,
    Piece,
    PositionScale,
    Projection,
    Repeat,
    Rope,
    ScaleBy,
    Slice,
    origins,
)

__all__ = ["describe_origins"]


def describe_origins(site: AttentionSite, writes: Mutations | None = None) -> dict[str, str]:
    """One line for "q", "k" and "v"; further score products are "q2", "k2". Names are for reading only."""
    found = origins(site, writes)
    lines: dict[str, str] = {}
    for number, (query, key) in enumerate(zip(found.queries, found.keys, strict=True)):
        suffix = str(number + 1) if number else ""
        lines[f"q{suffix}"] = f"q{suffix} ← {_text(query, site)}"
        lines[f"k{suffix}"] = f"k{suffix} ← {_text(key, site)}"
    lines["v"] = f"v ← {_text(found.value, site)}"
    return lines


def _text(origin: Origin, site: AttentionSite) -> str:
    return " ← ".join(_piece(piece, site) for piece in origin) or "nothing"


def _piece(piece: Piece, site: AttentionSite) -> str:
    match piece:
        case Repeat():
            return f"repeated {piece.groups} times"
        case Cast():
            return str(piece.dtype).removeprefix("torch.")
        case ScaleBy():
            return "times a number" if piece.number is None else f"times {piece.number:.4g}"
        case PositionScale():
            return "times a number for its position"
        case Activation():
            return piece.name
        case Rope():
            place = f" from {piece.position} on" if piece.partial else ""
            return f"rope({piece.form}, {piece.width}{place})"
        case Norm():
            return f"{piece.kind}_norm"
        case CacheRead():
            return f"cache({piece.kind}, dim {piece.dim}{', starts here' if piece.fresh else ''})"
        case Parts():
            between = " | " if piece.along == "width" else " ; "
            return f"[{between.join(_text(child, site) for child in piece.children)}]"
        case Slice():
            return _slice(piece)
        case Narrow():
            return f"up-projection {_projection(piece.up, site)} ← latent {piece.width}"
        case Projection():
            return f"linear {_projection(piece, site)}"
        case Opaque():
            return _end(piece)
        case _:
            return type(piece).__name__


def _slice(piece: Slice) -> str:
    if piece.along == "tokens":
        return f"tokens {piece.start}:{piece.start + piece.length} of {piece.of}"
    every = "every " if piece.interleaved else ""
    return f"columns {piece.start}:{piece.start + piece.length} of {every}{piece.of}"


def _projection(piece: Projection, site: AttentionSite) -> str:
    outer = {*site.axes.heads, *site.axes.groups}
    heads = product(axis.size for axis in piece.axes if axis in outer)
    width = product(axis.size for axis in piece.axes if axis not in outer)
    by_head = bool(piece.axes) and piece.axes[0] in outer and heads * width == piece.out_width
    split = f" ({heads} heads × {width})" if heads != 1 and by_head else ""
    each = " for each head" if piece.per_head else ""
    return f"{_name(piece.parameter)} {piece.in_width}→{piece.out_width}{each}{split}"


def _name(parameter: fx.Node) -> str:
    """`q_proj` for `model.layers.0.self_attn.q_proj.weight`."""
    steps = (attribute_path(source_name(parameter)) or parameter.name).split(".")
    return steps[-2] if len(steps) > 1 and steps[-1] == "weight" else steps[-1]


def _end(piece: Opaque) -> str:
    node = piece.node
    if node.op == "placeholder":
        return f"input {tensor_name(node)}"
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    return f"{name} ({piece.reason})" if piece.reason else name
