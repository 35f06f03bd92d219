"""Graphs for the tests of origins, and origins in a short notation: `rope(half 8) rms(8) linear(32>32)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from latent.rewriter.capture import capture
from latent.rewriter.normal_form import normalise
from latent.rewriter.origins.pieces import (
    Activation,
    CacheRead,
    Cast,
    Narrow,
    Norm,
    Opaque,
    Origin,
    Origins,
    Parts,
    Piece,
    Projection,
    Repeat,
    Rope,
    ScaleBy,
    Slice,
    origins,
)
from latent.rewriter.recognise import recognise
from latent.rewriter.sites import AttentionSite
from torch import Tensor, fx

B, H, S, D = 2, 4, 6, 8


def graphs(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> list[fx.GraphModule]:
    """The graphs of a function in normal form, as a backend gets them."""
    kept: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        kept.append(normalise(capture(gm, inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return kept


def sites(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> list[AttentionSite]:
    return [site for gm in graphs(function, *args, dynamic=dynamic, **kwargs) for site in recognise(gm.graph)]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores: Tensor = query @ key.transpose(-1, -2) * D**-0.5
    return scores.softmax(-1) @ value


def heads(*sizes: int) -> Tensor:
    return torch.randn(*(sizes or (B, H, S, D)))


def origins_of(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Origins:
    """The origins of the only site of a function."""
    (site,) = sites(function, *args, dynamic=dynamic)
    return origins(site)


def key_of(make: Callable[..., Tensor], *args: Any, dynamic: bool | None = None) -> str:
    """Where the keys come from when `make` makes them, which are as wide as D."""
    query, value = heads(), heads()

    def function(query: Tensor, value: Tensor, *rest: Any) -> Tensor:
        key = make(*rest)
        return attend(query, key, value[:, :, :1].expand(-1, -1, key.shape[2], -1))

    return text(origins_of(function, query, value, *args, dynamic=dynamic).key)


def text(origin: Origin) -> str:
    return " ".join(_short(piece) for piece in origin)


def _short(piece: Piece) -> str:
    match piece:
        case Repeat(groups=groups):
            return f"repeat({groups})"
        case Cast(dtype=dtype):
            return str(dtype).removeprefix("torch.")
        case ScaleBy(number=number):
            return f"scale({number if number is None else format(number, '.6g')})"
        case Activation(name=name):
            return name
        case Rope():
            return f"rope({piece.form} {piece.width}{f' at {piece.position}' if piece.partial else ''})"
        case Norm():
            return f"{piece.kind}({piece.width})"
        case CacheRead():
            return f"cache({piece.kind} {piece.dim}{' fresh' if piece.fresh else ''})"
        case Parts():
            return f"{piece.along}[{' | '.join(text(child) for child in piece.children)}]"
        case Slice():
            end = piece.start + piece.length
            return f"{piece.along}({piece.start}:{end} of {'each ' if piece.interleaved else ''}{piece.of})"
        case Narrow():
            return f"narrow({piece.width}>{piece.up.out_width})"
        case Projection():
            flags = f"{' T' * piece.transposed}{' bias' * (piece.bias is not None)}{' given' * (not piece.learned)}"
            return f"linear({piece.in_width}>{piece.out_width}{flags}{' per head' * piece.per_head})"
        case Opaque(node=node):
            return "input" if node.op == "placeholder" else f"?{str(node.target).split('.')[1]}"
        case _:
            raise TypeError(type(piece))
