"""A corpus of attention spellings, and of programs that only look like attention."""

from . import (
    caches,
    calls,
    extras,
    fused,
    grouping,
    latent,
    latent_attention,
    latent_caches,
    latent_limits,
    latent_projects,
    latent_sources,
    layouts,
    library_layers,
    look_alikes,
    look_alikes_axes,
    look_alikes_weights,
    masks,
    modules,
    positions,
    products,
    scales,
    several,
    softmaxes,
    spellings,
)
from .base import EXTRA, MORE, MORE_LOOK_ALIKES, NOT_ATTENTION, SPELLINGS, Program

LISTS: dict[str, list[Program]] = {
    "SPELLINGS": SPELLINGS,
    "NOT_ATTENTION": NOT_ATTENTION,
    "EXTRA": EXTRA,
    "MORE": MORE,
    "MORE_LOOK_ALIKES": MORE_LOOK_ALIKES,
}
ALL: dict[str, Program] = {entry.name: entry for programs in LISTS.values() for entry in programs}

__all__ = ["ALL", "EXTRA", "LISTS", "MORE", "MORE_LOOK_ALIKES", "NOT_ATTENTION", "SPELLINGS", "Program"]
