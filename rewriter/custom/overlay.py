"""A pattern laid over a site: the site's axes, sizes and scalars by the pattern's names, or the first difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..axes import Dim, Layout, same_size, size_of
from ..canonical import groups_repeated, width_of
from ..compat import symint_of
from ..masks.terms import Flags
from ..plain_form import PlainForm
from ..sites import AttentionSite, Bias, Fill
from ..sizes import concrete
from .pattern import Letters, Pattern, PatternError


@dataclass(frozen=True)
class Overlay:
    """The site's axes by letter, its sizes (numbers or SymInts) by name, and the scalars with which both agree."""

    pattern: Pattern
    form: PlainForm
    axes: Mapping[str, Dim]
    sizes: Mapping[str, Any]
    scalars: Mapping[str, float]
    proven: tuple[fx.Node, ...]
    """The tensors whose proof the agreement relies on."""

    def layout(self, letters: Letters) -> Layout:
        return tuple(tuple(axis for letter in text for axis in self.axes[letter]) for text in letters)

    def example_sizes(self) -> dict[str, int]:
        return {name: concrete(size) for name, size in self.sizes.items()}


class Differs(Exception):
    """The site is not what the pattern says: the reason, the node, and how many comparisons were passed before."""

    def __init__(self, reason: str, node: fx.Node, passed: int) -> None:
        super().__init__(reason)
        self.reason, self.node, self.passed = reason, node, passed


def lay_over(pattern: Pattern, form: PlainForm) -> Overlay:
    """Raises Differs with the first difference."""
    site, scores = form.site, form.scores
    axes = _axes(pattern, form)
    if bool(scores.sinks) != (pattern.has("sinks") or pattern.sink is not None):
        raise Differs(_one_has("sinks", bool(scores.sinks)), site.anchor, 1)
    if pattern.sink is not None and scores.sinks[0].sink != pattern.sink:
        raise Differs(f"differs at the sinks: the pattern's are {pattern.sink:g}", site.anchor, 1)
    proven = _compare_masks(pattern, form)
    if (scores.cap is not None) != pattern.capped:
        raise Differs(_one_has("soft cap", scores.cap is not None), site.anchor, 3)
    sizes = _sizes(pattern, axes, site)
    return Overlay(pattern, form, axes, sizes, _scalars(pattern, sizes, form), proven)


def _axes(pattern: Pattern, form: PlainForm) -> dict[str, Dim]:
    """The site's axes by letter. A pattern without a letter has its axes in the letter beside it."""
    site, own = form.site, set(pattern.letters)
    repeated = groups_repeated(site)
    if repeated and repeated != set(site.axes.groups):
        raise Differs("some of the heads that share keys are repeated and some are not", site.key.node, 0)
    axes = site.axes
    batch, heads = _outer(site)
    groups = axes.groups
    if "g" not in own:
        heads, groups = heads + groups, ()
    if "h" not in own:
        batch, heads = batch + heads, ()
    if "b" not in own:
        batch, heads = (), batch + heads
    if (batch and "b" not in own) or (heads and "h" not in own):
        raise Differs("differs at the batch: the pattern has no dimension for batch or heads", site.anchor, 0)
    width = width_of(site)
    if len(site.terms) > 1:  # products side by side are one product
        width = site.space.fresh("d", sum(size_of(width_of(site, n)) for n in range(len(site.terms))))
    return {
        "b": batch,
        "h": heads,
        "g": groups,
        "i": axes.queries,
        "j": axes.keys,
        "d": width,
        "e": axes.value_width,
    }


def _outer(site: AttentionSite) -> tuple[Dim, Dim]:
    """Batch and key heads. Where one axis alone is left of both, its place says which of the two has size 1."""
    axes = site.axes
    shared = axes.batch + axes.heads
    layout = site.space.resolve_layout(site.output_layout)
    if len(shared) != 1 or len(layout) < 4:
        return axes.batch, axes.heads
    place = next(i for i, dim in enumerate(layout) if shared[0] in dim)
    beside_groups = bool(set(layout[place]) & set(axes.groups))
    return (shared, ()) if place == 0 and not beside_groups else ((), shared)


def _compare_masks(pattern: Pattern, form: PlainForm) -> tuple[fx.Node, ...]:
    """-> the tensors whose proof the match relies on."""
    site = form.site
    if not pattern.has("mask"):
        if form.flags == pattern.flags:
            return (form.proven,) if form.proven is not None else ()
        ours = _flags_text(pattern.flags)
        theirs = _flags_text(form.flags) if form.flags is not None else "a mask tensor that flags do not express"
        advice = "" if form.flags is not None and pattern.flags != Flags() else "; a mask argument would match any"
        raise Differs(f"differs at the mask: the pattern has {ours}, the site {theirs}{advice}", site.anchor, 2)
    if not form.has_mask:
        raise Differs(
            "differs at the mask: the pattern adds one, the site has none; declare it with | None", site.anchor, 2
        )
    (slot,) = (slot for slot in pattern.slots.values() if slot.kind == "mask")
    batch, heads = _outer(site)
    names = {**{a: "head" for a in heads + site.axes.groups}, **{a: "batch" for a in batch}}
    for step in form.scores.masks:
        varying = site.space.axes(step.layout) if isinstance(step, Bias | Fill) else frozenset()
        for axis in varying & set(names):
            letter = "b" if names[axis] == "batch" else "h"
            if letter not in "".join(slot.layout) and letter in pattern.letters:
                reason = f"the site's varies from {names[axis]} to {names[axis]}, the pattern's does not"
                raise Differs(f"differs at the mask: {reason}", step.node, 2)
    return ()


def _one_has(what: str, site_has: bool) -> str:
    with_it, without = ("site", "pattern") if site_has else ("pattern", "site")
    return (
        f"differs at the {what}: the {with_it} has {'' if what.endswith('s') else 'a '}{what}, the {without} has none"
    )


def _flags_text(flags: Flags) -> str:
    if flags.window:
        return f"a causal window of {flags.window}"
    return "a causal mask" if flags.causal else "none"


def _sizes(pattern: Pattern, axes: Mapping[str, Dim], site: AttentionSite) -> dict[str, Any]:
    """The site's sizes by name: numbers, or SymInts."""
    found: dict[str, Any] = {}
    for name, meanings in pattern.names.items():
        options = [size_of(tuple(axis for letter in text for axis in axes[letter])) for text in sorted(meanings)]
        if not all(same_size(options[0], other) for other in options[1:]):
            shown = " and ".join(map(str, options))
            raise Differs(f"differs at the sizes: the pattern's {name} is {shown} here", site.anchor, 4)
        found[name] = symint_of(options[0], site.query.node.meta["val"])
    return found


def _scalars(pattern: Pattern, sizes: Mapping[str, Any], form: PlainForm) -> dict[str, float]:
    """The scalars with which the pattern has the site's numbers."""
    anchor = form.site.anchor
    known = {name: concrete(size) for name, size in sizes.items()}
    symbolic = [name for name, size in sizes.items() if not isinstance(size, int)]
    others = {name: size + (name in symbolic) for name, size in known.items()}
    at = dict(pattern.example.scalars)
    wanted = (form.scores.scale,) if form.scores.cap is None else (form.scores.scale, form.scores.cap)
    try:
        if symbolic and pattern.numbers(others, at) != pattern.numbers(known, at):
            reason = f"the pattern's numbers depend on sizes that are symbolic: {', '.join(symbolic)}"
            raise Differs(reason, anchor, 5)
        scalars = pattern.solve(known, wanted)
        found = pattern.numbers(known, scalars)
    except PatternError as error:
        raise Differs(f"at these sizes {error}", anchor, 5) from None
    for what, ours, its in zip(("scale", "soft cap"), found, wanted, strict=False):
        if not math.isclose(ours, its, rel_tol=1e-9):
            raise Differs(f"differs at the {what}: the pattern's is {ours:g}, the site's {its:g}", anchor, 5)
    return scalars
