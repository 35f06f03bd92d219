"""What a mask was proven to do as a small picture, of sizes alone: no values of tensors are looked at.

A row per query and a letter per key: # seen, . hidden, ? decided by a tensor (padding, positions, a bias). Of many
queries or keys some are shown, the first and the last among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch

from .axes import Dim, size_of
from .masks.materialise import materialise
from .masks.terms import Either, MaskTerm
from .masks_of_site import mask_tensors
from .sites import AttentionSite

__all__ = ["SIDE", "flags_at", "mask_picture", "places"]

SIDE = 32
"""The most rows and columns."""


def mask_picture(site: AttentionSite, hints: Mapping[sympy.Symbol, int]) -> tuple[str, ...]:
    """The rows, at the example sizes where they are symbols; () without a mask and where nothing is known of it."""
    queries, keys = (places(dim, hints) for dim in (site.axes.queries, site.axes.keys))
    terms = [term for proof in site.masks for term in proof.terms]
    known = [term for term in terms if _is_known(term, hints)]
    flags = site.call is not None and (site.call.causal or site.call.window > 0)
    if queries is None or keys is None or not (known or flags):
        return ()
    unsure = len(known) < len(terms) or len(site.masks) < len(mask_tensors(site))
    seen = materialise(known, queries, keys, sizes=hints) & flags_at(site, queries, keys)
    letters = "?" if unsure or (site.call is not None and site.call.opaque) else "#"
    return tuple("".join(letters if each else "." for each in row) for row in seen.tolist())


def places(dim: Dim, hints: Mapping[sympy.Symbol, int], most: int = SIDE) -> torch.Tensor | None:
    """The indices that are shown."""
    size = sympy.sympify(size_of(dim)).subs(hints)
    if not size.is_Integer or size < 1:
        return None
    return torch.linspace(0, int(size) - 1, min(int(size), most)).round().long()


def _is_known(term: MaskTerm, hints: Mapping[sympy.Symbol, int]) -> bool:
    """Whether a term holds or not by sizes alone."""
    if isinstance(term, Either):
        return all(_is_known(each, hints) for each in term.terms)
    fields: Sequence[object] = list(vars(term).values())
    exprs = [value for value in fields if value is not None]
    return all(isinstance(value, sympy.Expr) and value.free_symbols <= hints.keys() for value in exprs)


def flags_at(site: AttentionSite, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What the flags of a fused call leave visible."""
    i, j = queries[:, None], keys[None, :]
    seen = torch.ones(len(queries), len(keys), dtype=torch.bool)
    if site.call is not None and site.call.causal:
        seen &= j <= i
    if site.call is not None and site.call.window:
        seen &= j > i - site.call.window
    return seen
