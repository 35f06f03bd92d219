"""The mask of every attention of a call as pictures are made of it: which key each query sees, for one head.

What was proven is evaluated from its terms, on the inputs of the call where it reads them (padding, positions). A mask
that was not proven is taken as the tensor that the call made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .axes import Axis, Layout, size_of
from .capture import capture
from .explain import call_through
from .masks.materialise import materialise
from .masks.prove import HIDES
from .masks.terms import MaskProof, batch_index, tensors_read
from .masks_of_site import MaskTensor, describe_masks, index_along, mask_tensors, place_in
from .mutations import Mutations
from .normal_form import normalise
from .opening import decompositions
from .provenance import module_path, source_line
from .recognise import recognise
from .sites import AttentionSite
from .sizes import concrete

__all__ = ["EffectiveMask", "effective_masks"]

Values = Mapping[fx.Node, torch.Tensor]


@dataclass(frozen=True)
class EffectiveMask:
    """What one head of one site hides, at the sizes of the call."""

    path: str
    line: str
    words: str
    """As reports say it: "causal, window 6"."""
    visible: torch.Tensor | None
    """[queries, keys], true where the key is seen; None where the mask has no such form."""
    proven: bool
    data: bool
    """Whether it depends on what the call was given, and not on sizes alone."""
    heads: int
    """How many there are in the batch."""
    varies: bool
    """Whether other heads may see other keys."""


def effective_masks(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], head: int = 0
) -> list[EffectiveMask]:
    """The masks of one call, site by site. Raises IndexError for a head that a site does not have.

    Heads are counted through the batch: with 4 heads, head 5 is the second head of the second batch item.
    """
    found: list[EffectiveMask] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        normal = normalise(capture(gm, example_inputs, decompositions()))
        sites = recognise(normal.graph).sites

        def run(*inputs: Any) -> Any:
            values = _Recorder(normal, {node for site in sites for node in _nodes(site)}).values_of(inputs)
            found.extend(_mask(site, values, head) for site in sites)
            return gm.forward(*inputs)

        return run

    call_through(model, backend, False, args, kwargs)
    return found


class _Recorder(fx.Interpreter):
    """A run of a graph that writes to copies, and keeps some of the values as they were made."""

    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.written = Mutations.of(gm.graph).writes
        self.values: dict[fx.Node, torch.Tensor] = {}

    def values_of(self, inputs: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
        placeholders = self.graph.find_nodes(op="placeholder")
        self.run(*(x.clone() if n in self.written else x for n, x in zip(placeholders, inputs, strict=True)))
        return self.values

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted and isinstance(value, torch.Tensor):
            self.values[n] = value.detach().cpu().clone()
        return value


def _nodes(site: AttentionSite) -> Iterator[fx.Node]:
    """The tensors that the masks of a site are, and those that their terms read."""
    for mask, proof in zip(mask_tensors(site), site.masks, strict=True):
        yield mask.node
        yield from tensors_read(proof.terms)
        yield from (load.node for _, load in proof.loads)


def _mask(site: AttentionSite, values: Values, head: int) -> EffectiveMask:
    axes = site.axes
    queries, keys = (concrete(size_of(dim)) for dim in (axes.queries, axes.keys))
    lanes = axes.batch + axes.heads + axes.groups
    place = place_in(lanes, head)
    masks = list(zip(mask_tensors(site), site.masks, strict=True))
    layouts = [site.space.resolve_layout(mask.layout) for mask, _ in masks]
    parts: list[torch.Tensor | None] = [_flags(site, queries, keys)]
    for (mask, proof), layout in zip(masks, layouts, strict=True):
        parts.append(_visible(mask, proof, layout, site, values, place, (queries, keys)))
    drawn = [part for part in parts if part is not None]
    line = source_line(site.anchor)
    return EffectiveMask(
        module_path(site.anchor),
        line.short() if line else "",
        describe_masks(site),
        torch.stack(drawn).all(0) if len(drawn) == len(parts) else None,
        not (site.call and site.call.opaque) and not any(proof.opaque for _, proof in masks),
        any(proof.loads or any(True for _ in tensors_read(proof.terms)) for _, proof in masks),
        concrete(size_of(lanes)),
        any(set(dim) & set(place) for layout in layouts for dim in layout),
    )


def _flags(site: AttentionSite, queries: int, keys: int) -> torch.Tensor:
    """What the flags of a fused call leave visible."""
    visible = torch.ones(queries, keys, dtype=torch.bool)
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    if site.call is not None and site.call.causal:
        visible &= j <= i
    if site.call is not None and site.call.window:
        visible &= j > i - site.call.window
    return visible


def _visible(
    mask: MaskTensor,
    proof: MaskProof,
    layout: Layout,
    site: AttentionSite,
    values: Values,
    place: Mapping[Axis, int],
    grid: tuple[int, int],
) -> torch.Tensor | None:
    """The keys that one mask tensor leaves visible to the head and batch item of `place`."""
    own = [site.space.resolve(dim) for dim in (site.axes.queries, site.axes.keys)]
    order = [layout.index(dim) for dim in own if dim and dim in layout]
    others = [n for n in range(len(layout)) if n not in order]
    if own[1] not in layout or any(set(layout[n]) & {*own[0], *own[1]} for n in others):
        return None  # keys and queries share a dimension with other axes
    at = tuple(index_along(layout[n], place) for n in others)
    tensor = values[mask.node]
    if not proof.opaque:
        batch = {batch_index(n): tensor.shape[n] for n in others}
        return materialise(proof.terms, *grid, batch=batch, loads=proof.loads, tensors=values)[at]
    rows = tensor.permute(*others, *order)[at]
    if mask.form == "additive":
        return (rows > HIDES).expand(grid)
    return (rows.bool() if mask.form == "keep" else ~rows.bool()).expand(grid)
