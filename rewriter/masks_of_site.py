"""The masks of a site: which tensors they are, and what they were proven to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from .axes import Axis, Dim, Layout, size_of
from .layouts import is_tensor
from .masks.prove import Form, MaskReader
from .masks.terms import Flags, MaskProof, Opaque
from .sites import AttentionSite, Bias, Fill
from .sizes import concrete


@dataclass(frozen=True)
class MaskTensor:
    """A tensor that hides keys or biases scores, with the form in which it does."""

    node: fx.Node
    form: Form
    layout: Layout
    reader: fx.Node


def mask_tensors(site: AttentionSite) -> tuple[MaskTensor, ...]:
    """The masks and biases among the score steps, in order; what softmax ignores is left out."""
    found: list[MaskTensor] = []
    for step in site.steps:
        if isinstance(step, Fill):
            found.append(MaskTensor(step.condition, "keep" if step.keep else "hide", step.layout, step.node))
        elif isinstance(step, Bias) and is_tensor(step.bias) and site.space.axes(step.layout) & set(site.axes.keys):
            found.append(MaskTensor(step.bias, "additive", step.layout, step.node))  # type: ignore[arg-type]
    return tuple(found)


def prove_masks(site: AttentionSite, reader: MaskReader) -> tuple[MaskProof, ...]:
    """A proof for every mask tensor of the site."""
    return tuple(_prove(mask, site, reader) for mask in mask_tensors(site))


def _prove(mask: MaskTensor, site: AttentionSite, reader: MaskReader) -> MaskProof:
    layout = site.space.resolve_layout(mask.layout)
    key_dim = _position(layout, site.space.resolve(site.axes.keys))
    query_dim = _position(layout, site.space.resolve(site.axes.queries))
    mixed = [dim for i, dim in enumerate(layout) if i != query_dim and set(dim) & set(site.axes.queries)]
    if key_dim is None or mixed:
        return MaskProof((Opaque("the mask mixes keys or queries with other axes in one dimension", mask.node),))
    return reader.prove(mask.node, query_dim=query_dim, key_dim=key_dim, form=mask.form, at=mask.reader)


def _position(layout: Layout, dim: Dim) -> int | None:
    return layout.index(dim) if dim and dim in layout else None


def proven_flags(site: AttentionSite) -> tuple[Flags | None, fx.Node | None]:
    """The flags that take the place of the only mask, and its tensor; None where no flags do."""
    tensors = mask_tensors(site)
    if not tensors:
        return None, None
    (proof, *more), mask = site.masks, tensors[0].node
    if more or (site.call is not None and site.call.causal):
        return None, mask
    if proof.keeps_all:
        return Flags(), mask
    return (proof.flags if proof.rows_visible else None), mask


def describe_masks(site: AttentionSite) -> str:
    """ "causal", "causal, window 4096; bias", "none"."""
    words = []
    for mask, proof in zip(mask_tensors(site), site.masks, strict=True):
        bias = mask.form == "additive" and proof.fill is None and proof.opaque
        words.append("bias" if bias else proof.describe())
    if site.call is not None and site.call.causal:
        words.append("causal")
    if site.call is not None and site.call.opaque:
        words.append("opaque")
    kept = [word for word in dict.fromkeys(words) if word != "none"]
    return "; ".join(kept) or "none"


def place_in(axes: Dim, index: int) -> dict[Axis, int]:
    """The index on every axis that makes up one place in their product, the last axis running fastest."""
    count = concrete(size_of(axes))
    if not 0 <= index < count:
        raise IndexError(f"there is no head {index}: the batch has {count} together, counted from 0")
    place: dict[Axis, int] = {}
    for axis in reversed(axes):
        index, place[axis] = divmod(index, concrete(axis.size))
    return place


def index_along(dim: Dim, place: Mapping[Axis, int]) -> int:
    """The index along a dimension at a place; axes that the place does not name count as 0."""
    flat = 0
    for axis in dim:
        flat = flat * concrete(axis.size) + place.get(axis, 0)
    return flat
