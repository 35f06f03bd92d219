"""Proves what an attention mask does, from the arithmetic that makes it.

A mask is read as a truth value in the index variables i (query) and j (key), brought to conjunctive form, and every
clause becomes a term. What holds for all sizes vanishes; what is not understood is Opaque and says why. A comparison
with one query and one key position is Causal or Window with its exact offset: nothing is causal by resemblance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import sympy
from torch import fx

from ..provenance import tensor_name
from .clauses import Naming, term_of
from .index_algebra import IndexReader
from .index_numbers import as_float
from .index_values import (
    FALSE,
    TRUE,
    Bool,
    Number,
    UnreadError,
    Value,
    Where,
    as_number,
    choose,
    compare,
    conjunction,
    is_bool,
    negation,
)
from .logic import AtLeast, Clause, TooComplexError, clauses
from .materialise import materialise
from .terms import (
    BlockDiagonal,
    Causal,
    Chunk,
    Either,
    Keys,
    MaskProof,
    MaskTerm,
    Opaque,
    Ordered,
    Padding,
    Prefix,
    Window,
)

__all__ = [
    "BlockDiagonal",
    "Causal",
    "Chunk",
    "Either",
    "Form",
    "Keys",
    "MaskProof",
    "MaskReader",
    "MaskTerm",
    "Opaque",
    "Ordered",
    "Padding",
    "Prefix",
    "Window",
    "materialise",
    "prove_mask",
]

Form = Literal["keep", "hide", "additive"]

HIDES = -1e4
"""Additive values up to here hide a key."""


def prove_mask(
    node: fx.Node,
    *,
    query_dim: int | None,
    key_dim: int,
    form: Form,
    at: fx.Node | None = None,
    reader: MaskReader | None = None,
) -> MaskProof:
    """What the mask `node` does, as the node `at` sees it (default: all its readers, which must see the same).

    `query_dim` and `key_dim` are dimensions of `node`; None or a dimension of size 1 is broadcast. Forms: "keep" is
    true where visible, "hide" is true where not, "additive" is 0 where visible and -1e4 or less where not.
    """
    return (reader or MaskReader(node.graph)).prove(node, query_dim=query_dim, key_dim=key_dim, form=form, at=at)


@dataclass(frozen=True)
class MaskReader:
    """Proves the masks of one graph, each once. To be made anew when the graph has changed."""

    graph: fx.Graph
    _index: IndexReader = field(init=False, repr=False, compare=False)
    _memo: dict[object, MaskProof] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", IndexReader(self.graph))

    def prove(
        self, node: fx.Node, *, query_dim: int | None, key_dim: int, form: Form, at: fx.Node | None = None
    ) -> MaskProof:
        rank = node.meta["val"].dim()
        query_dim = None if query_dim is None else query_dim % rank
        key_dim %= rank
        epoch = len(self._index.storages.writes_before(node, at))
        key = (node, query_dim, key_dim, form, epoch, at is None)
        if key not in self._memo:
            self._memo[key] = self._prove(node, query_dim, key_dim, form, at)
        return self._memo[key]

    def _prove(self, node: fx.Node, query_dim: int | None, key_dim: int, form: Form, at: fx.Node | None) -> MaskProof:
        reader = self._index
        if at is None and any(node < write for write in reader.storages.writes_before(node, None)):
            return MaskProof((Opaque("The mask is written to after it was made", node),))
        names = Naming(reader, node, query_dim, key_dim)
        value = reader.element(node, names.indices, at)
        try:
            keep, hidden = self._visible(value, form, names)
            found = clauses(keep, reader.ranges, names.indexed())
        except UnreadError as unread:
            return MaskProof((Opaque(str(unread), node),))
        except TooComplexError:
            return MaskProof((Opaque("The mask has too many conditions", node),))
        terms = _merged([term_of(clause, names, node) for clause in found])
        return MaskProof(
            terms,
            fill=max(hidden) if hidden else None,
            uniform=len(hidden) < 2,
            rows_visible=_rows_visible(found, names),
            loads=names.loads(),
        )

    def _visible(self, value: Value, form: Form, names: Naming) -> tuple[Bool, set[float]]:
        """The condition under which a key is visible, and the values added elsewhere."""
        if form != "additive":
            keep = value if is_bool(value) else compare("ne", as_number(value), sympy.S.Zero)
            return (keep if form == "keep" else negation(keep)), set()
        if is_bool(value):
            raise UnreadError("The mask is boolean, and adding it hides nothing")
        hidden: set[float] = set()
        return self._additive(value, TRUE, hidden, names), hidden

    def _additive(self, value: Number, path: Bool, hidden: set[float], names: Naming) -> Bool:
        """Where the number is 0, when on this path all others are large and negative."""
        if isinstance(value, Where):
            other = conjunction(path, negation(value.condition))
            return choose(
                value.condition,
                self._additive(value.then, conjunction(path, value.condition), hidden, names),
                self._additive(value.other, other, hidden, names),
            )
        if value == 0:
            return TRUE
        if value.is_number and value is not sympy.nan and as_float(value) <= HIDES:
            if path == TRUE or clauses(path, self._index.ranges, names.indexed()) != ((),):
                hidden.add(as_float(value))
            return FALSE
        if clauses(path, self._index.ranges, names.indexed()) == ((),):
            return FALSE  # never happens
        raise UnreadError(self._no_mask(value))

    def _no_mask(self, value: sympy.Expr) -> str:
        loads = [self._index.loads[s] for s in value.free_symbols if s in self._index.loads]
        name = tensor_name(loads[0].node) if loads else ""
        if loads and value not in self._index.loads:
            return f"The additive values depend on {name}, and may be other than 0 and large and negative"
        if loads:
            return f"The additive values are not known: {name} {loads[0].reason}"
        return "The additive values are not 0 and a large negative number"


def _merged(terms: list[MaskTerm]) -> tuple[MaskTerm, ...]:
    """Causal first; one lower and one upper bound on the keys become one term."""
    starts = [t for t in terms if isinstance(t, Keys) and t.stop is None]
    stops = [t for t in terms if isinstance(t, Keys) and t.start is None]
    if len(starts) == 1 and len(stops) == 1:
        terms = [t for t in terms if t not in (starts[0], stops[0])] + [Keys(starts[0].start, stops[0].stop)]
    order = (Causal, Window, Prefix, Keys, Chunk, BlockDiagonal, Ordered, Either, Padding, Opaque)
    return tuple(sorted(terms, key=lambda term: order.index(type(term))))


def _rows_visible(found: tuple[Clause, ...], names: Naming) -> bool:
    """Whether one choice of j, as a function of i, satisfies every clause for all i."""
    bounds = [lit.expr for clause in found for lit in clause if isinstance(lit, AtLeast)]
    if names.j is None or any(not isinstance(lit, AtLeast) for clause in found for lit in clause):
        return not found
    last = names.ranges.sizes[names.j] - 1
    candidates = [sympy.S.Zero, last, *([] if names.i is None else [names.i])]
    candidates += [expr.xreplace({names.j: sympy.S.Zero}) for expr in bounds if expr.coeff(names.j) == -1]
    return any(_satisfies(found, names, sympy.expand(j), last) for j in candidates)


def _satisfies(found: tuple[Clause, ...], names: Naming, j: sympy.Expr, last: sympy.Expr) -> bool:
    holds = names.ranges.nonnegative
    return (
        holds(j)
        and holds(last - j)
        and all(
            any(isinstance(lit, AtLeast) and holds(sympy.expand(lit.expr.xreplace({names.j: j}))) for lit in clause)
            for clause in found
        )
    )
