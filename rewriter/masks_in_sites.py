"""Masks of sites in words."""

from __future__ import annotations

from collections.abc import Sequence

from .describe import mask_nodes
from .sites import AttentionSite


def mask_texts(sites: Sequence[AttentionSite]) -> list[str]:
    return ["opaque" if mask_nodes(site) else ("causal" if site.call and site.call.causal else "none") for site in sites]
