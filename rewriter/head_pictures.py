"""Masks that differ by head as pictures, one for each head, as `mask_pictures` draws them: # seen, . hidden.

What decides has to be known when compiling: sizes, and buffers of modules that the graph does not write to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .axes import size_of
from .mask_pictures import flags_at, places
from .masks.materialise import materialise
from .masks.terms import MaskProof, batch_index, tensors_read
from .masks_of_site import index_along, mask_tensors, place_in
from .mutations import Mutations
from .provenance import is_learned
from .sites import AttentionSite
from .sizes import concrete

__all__ = ["head_pictures", "known_buffers"]

SIDE = 16
"""The most rows and columns."""
HEADS = 64
Buffers = Mapping[fx.Node, torch.Tensor]


def known_buffers(graph: fx.Graph, inputs: Sequence[Any], writes: Mutations) -> dict[fx.Node, torch.Tensor]:
    """The buffers among the inputs whose values a compilation may look at."""
    placeholders = graph.find_nodes(op="placeholder")
    return {
        node: value
        for node, value in zip(placeholders, inputs, strict=True)
        if is_learned(node) and type(value) is torch.Tensor and node not in writes.writes
    }


def head_pictures(
    site: AttentionSite, hints: Mapping[sympy.Symbol, int], buffers: Buffers
) -> tuple[tuple[str, ...], ...]:
    """By head; () where all heads see the same keys, and where what they see is not known."""
    outer = site.axes.heads + site.axes.groups
    masks = [
        (proof, site.space.resolve_layout(mask.layout))
        for mask, proof in zip(mask_tensors(site), site.masks, strict=True)
    ]
    differ = any(set(dim) & set(outer) for _, layout in masks for dim in layout)
    count = sympy.sympify(size_of(outer)).subs(hints)
    queries, keys = (places(dim, hints, SIDE) for dim in (site.axes.queries, site.axes.keys))
    if not differ or not count.is_Integer or count > HEADS or queries is None or keys is None:
        return ()
    if not all(_is_known(proof, buffers) for proof, _ in masks):
        return ()
    own = [site.space.resolve(dim) for dim in (site.axes.queries, site.axes.keys)]
    parts = []
    for proof, layout in masks:
        others = [n for n, dim in enumerate(layout) if dim not in own]
        batch = {batch_index(n): concrete(size_of(layout[n])) for n in others}
        seen = materialise(
            proof.terms, queries, keys, sizes=hints, batch=batch, loads=proof.loads, tensors=dict(buffers)
        )
        parts.append((seen, [layout[n] for n in others]))
    pictures = []
    for head in range(int(count)):
        place = place_in(outer, head)
        visible = flags_at(site, queries, keys)
        for seen, dims in parts:
            visible = visible & seen[tuple(index_along(dim, place) for dim in dims)]
        pictures.append(tuple("".join("#" if each else "." for each in row) for row in visible.tolist()))
    return tuple(pictures) if len(set(pictures)) > 1 else ()


def _is_known(proof: MaskProof, buffers: Buffers) -> bool:
    read = {*tensors_read(proof.terms), *(load.node for _, load in proof.loads)}
    return not proof.opaque and read <= buffers.keys()
