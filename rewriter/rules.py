"""The vocabulary of a rewrite: what a rule answers, and what became of the answer.

class MyRewrite:                                    registered with @latent.rewrite("my_rewrite", exact=True)
    '''The equation, in one line.'''
    def match(self, site) -> Match | Refusal        read-only; a refusal gives its reason
    def benefit(self, match) -> Benefit             bytes and operations before and after
    def build(self, match, emit) -> fx.Node         new nodes for `site.output`; never edits in place

For its check a class may have `examples = ((function, dict(q="B H S D", ...)),)`, functions that it should match, and
`example_sizes = {"S": (2, 8)}`, least and largest sizes. The short form, `latent.replace`, is in `rewriter.custom`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import sympy
from torch import fx

from .emit import Emitter
from .sites import AttentionSite


@dataclass(frozen=True)
class Refusal:
    """No, with the reason in words and the node it is about."""

    reason: str
    node: fx.Node | None = None


@dataclass(frozen=True)
class Match:
    """Yes: the site, and what `build` wants to know about it.

    `evaluate` names nodes whose values the rewrite relies on (a proven mask): the certificate computes them from the
    graph's inputs, where it feeds random tensors for everything else.
    """

    site: AttentionSite
    facts: Mapping[str, Any] = field(default_factory=dict)
    evaluate: tuple[fx.Node, ...] = ()
    reads: tuple[tuple[fx.Node, fx.Node], ...] = ()
    """Tensors that the replacement reads and that are none of the site's operands, and what read them before."""


RIDGE = 10
"""Operations in the time of a byte: about that of a CPU; a GPU does ten times more, which favours moving less."""


@dataclass(frozen=True)
class Cost:
    """Floating point operations and bytes moved, as numbers or expressions in the symbolic sizes."""

    flops: sympy.Expr
    bytes: sympy.Expr


@dataclass(frozen=True)
class Benefit:
    before: Cost
    after: Cost

    def pays(self, hints: Mapping[sympy.Symbol, int]) -> bool:
        """Whether it takes no longer at the example sizes, with a byte moved in the time of `RIDGE` operations."""
        known = self.at(hints)
        return known.bytes_after * RIDGE + known.flops_after <= known.bytes_before * RIDGE + known.flops_before

    def at(self, hints: Mapping[sympy.Symbol, int]) -> Estimate:
        """The same in numbers, at the example sizes."""
        exprs = (self.before.flops, self.before.bytes, self.after.flops, self.after.bytes)
        return Estimate(*(float(sympy.sympify(expr).subs(hints)) for expr in exprs))


@dataclass(frozen=True)
class Estimate:
    """A benefit in numbers."""

    flops_before: float
    bytes_before: float
    flops_after: float
    bytes_after: float


@dataclass(frozen=True)
class Timing:
    """Seconds of what was replaced and of what replaces it, both compiled, on random inputs of the site's sizes."""

    before: float
    after: float
    device: str


class Rewrite(Protocol):
    def match(self, site: AttentionSite) -> Match | Refusal: ...

    def benefit(self, match: Match) -> Benefit: ...

    def build(self, match: Match, emit: Emitter) -> fx.Node: ...


Outcome = Literal["applied", "refused", "not paying", "undone", "failed", "off"]


@dataclass(frozen=True)
class Verdict:
    """What became of one rewrite at one site."""

    site: int
    rewrite: str
    outcome: Outcome
    reason: str = ""
    line: str = ""
    error: float | None = None
    """Largest relative error of the certificate, where one was made."""

    certificate: str = ""
    """The name of the certificate, which identical sites share."""

    estimate: Estimate | None = None
    """What the rewrite was expected to save, where it matched."""

    timing: Timing | None = None
    """What it saves, where that was measured."""
