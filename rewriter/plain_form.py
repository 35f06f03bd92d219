"""What patterns and sites are compared by: the score form with every number in front of it, and what the mask is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from .factors import scaled_by_number
from .layouts import is_cast
from .masks.terms import Flags
from .masks_of_site import proven_flags
from .nodes import args_of
from .roles import peel
from .score_form import ScoreForm, Unusual, readable_sinks, score_form, unusual_weights
from .sites import AttentionSite, Operand, Scale

__all__ = ["PlainForm", "plain_form", "to_source"]


@dataclass(frozen=True)
class PlainForm:
    """softmax( cap · tanh(scale · q·k / cap) + mask | sinks ) v, where `site` has operands without numbers."""

    site: AttentionSite
    scores: ScoreForm
    own: Flags
    """What a fused call hides beside its mask tensor."""

    flags: Flags | None
    """All that is hidden, where flags say it: Flags() for nothing. None: a tensor that no flags express."""

    proven: fx.Node | None
    """The mask tensor that `flags` take the place of."""

    reads: tuple[tuple[fx.Node, fx.Node], ...] = ()
    """The tensors behind the numbers that were taken out, and what read them before."""

    @property
    def has_mask(self) -> bool:
        return bool(self.scores.masks) or self.own != Flags()


def plain_form(site: AttentionSite) -> PlainForm | Unusual:
    """The form of a site, or what is unusual about it."""
    if (call := site.call) is not None and (call.opaque or call.scale is None):
        reason = f"also applies {call.opaque}" if call.opaque else "has a scale that depends on a symbolic width"
        return Unusual(f"{call.name} {reason}", call.anchor)
    if (unusual := unusual_weights(site)) is not None:
        return unusual
    site, reads = _numbers_in_front(site)
    scores = score_form(site)
    if isinstance(scores, Unusual):
        return scores
    if (unusual := readable_sinks(scores, site)) is not None:
        return unusual
    own = Flags(call.causal, call.window) if call is not None else Flags()
    flags, tensor = proven_flags(site)
    if not scores.masks:
        flags, tensor = own, None
    return PlainForm(site, scores, own, flags, tensor, reads)


def _numbers_in_front(site: AttentionSite) -> tuple[AttentionSite, tuple[tuple[fx.Node, fx.Node], ...]]:
    """(a q)·(b k) = a b (q·k), so that a scale is found on whichever side it was applied."""
    terms, reads = [], []
    for term in site.terms:
        query, on_query, read_query = _without_numbers(term.query, site)
        key, on_key, read_key = _without_numbers(term.key, site)
        terms.append(replace(term, query=query, key=key, factor=term.factor * on_query * on_key))
        reads += [*read_query, *read_key]
    if not reads:
        return site, ()
    whole = terms[0].factor  # the first term's own; what the others differ by stays with them
    terms = [replace(term, factor=term.factor / whole) for term in terms]
    return replace(site, terms=tuple(terms), steps=(Scale(site.anchor, whole), *site.steps)), tuple(reads)


def _without_numbers(operand: Operand, site: AttentionSite) -> tuple[Operand, float, list[tuple[fx.Node, fx.Node]]]:
    factor, reads = 1.0, []
    while (found := scaled_by_number(operand.root)) is not None:
        source, number = found
        reads.append((source, operand.root))
        operand, factor = peel(source, operand.chain[-1][1], site.space), factor * number
    return operand, factor, reads


def to_source(operand: Operand, site: AttentionSite) -> Operand:
    """The operand's root and what it was before casts."""
    while is_cast(operand.root):
        operand = peel(args_of(operand.root)[0], operand.chain[-1][1], site.space)
    return operand
