"""What a mask is proven to be: a conjunction of terms, each of which says when key j is visible to query i.

Terms are plain values. Their expressions are over sizes, over values that the graph loads (`MaskProof.loads`), and, in
the indices of tensors, over the index variables I (query), J (key) and one `batch_index` per other dimension.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import sympy
from torch import fx

from ..provenance import tensor_name
from .index_values import Load

I = sympy.Symbol("i", integer=True, nonnegative=True)  # noqa: E741
J = sympy.Symbol("j", integer=True, nonnegative=True)

Indices: TypeAlias = tuple[sympy.Expr, ...]
Relation: TypeAlias = Literal["==", "!=", ">=", "<="]


LONG = 100
"""Characters of the longest term that is written out."""


def batch_index(dim: int) -> sympy.Symbol:
    """The index variable of a dimension of the mask that is neither queries nor keys."""
    return sympy.Symbol(f"b{dim}", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Causal:
    """j <= i + offset."""

    offset: sympy.Expr


@dataclass(frozen=True)
class Window:
    """j > i + lower; a causal window of w keys has lower = offset - w."""

    lower: sympy.Expr


@dataclass(frozen=True)
class Keys:
    """start <= j < stop, for every query; None leaves a side open."""

    start: sympy.Expr | None
    stop: sympy.Expr | None


@dataclass(frozen=True)
class Prefix:
    """j <= i + offset or j < length."""

    offset: sympy.Expr
    length: sympy.Expr


@dataclass(frozen=True)
class Chunk:
    """floor((i + query_offset) / size) == floor((j + key_offset) / size)."""

    size: sympy.Expr
    query_offset: sympy.Expr
    key_offset: sympy.Expr


@dataclass(frozen=True)
class BlockDiagonal:
    """node[query_indices] == node[key_indices]: both positions belong to the same segment."""

    node: fx.Node
    query_indices: Indices
    key_indices: Indices
    epoch: int = 0


@dataclass(frozen=True)
class Ordered:
    """node[key_indices] <= node[query_indices] + offset: causal by positions that are data."""

    node: fx.Node
    query_indices: Indices
    key_indices: Indices
    offset: sympy.Expr
    epoch: int = 0


@dataclass(frozen=True)
class Padding:
    """node[indices] relation value, the same for every query.

    Indices may point outside of the tensor for keys that another term hides.
    """

    node: fx.Node
    indices: Indices
    relation: Relation = "!="
    value: sympy.Expr = sympy.S.Zero
    epoch: int = 0


@dataclass(frozen=True)
class Either:
    """At least one of the terms holds; none of them is Opaque."""

    terms: tuple[MaskTerm, ...]


@dataclass(frozen=True)
class Opaque:
    """Not understood: why, as a sentence, and the node it is about. Nothing may be concluded."""

    reason: str
    node: fx.Node


MaskTerm: TypeAlias = Causal | Window | Keys | Prefix | Chunk | BlockDiagonal | Ordered | Padding | Either | Opaque


@dataclass(frozen=True)
class Flags:
    """What a fused call is told instead of a mask: j <= i, and j > i - window where there is one."""

    causal: bool = False
    window: int = 0


@dataclass(frozen=True)
class MaskProof:
    """Key j is visible to query i exactly if all terms hold; without terms everything is visible."""

    terms: tuple[MaskTerm, ...]
    fill: float | None = None
    """The value added where hidden, the mildest of several; None for a boolean mask, or if nothing is hidden."""
    uniform: bool = True
    """Whether all hidden entries have the value `fill`."""
    rows_visible: bool = False
    """Whether every query provably sees a key. If not, a finite fill and -inf differ."""
    loads: tuple[tuple[sympy.Symbol, Load], ...] = ()
    """The values in the terms' expressions that the graph reads from tensors."""

    @property
    def keeps_all(self) -> bool:
        return not self.terms

    @property
    def flags(self) -> Flags | None:
        """The mask as flags of a fused call: j <= i, or i - window < j <= i; None for any other."""
        match self.terms:
            case (Causal(offset),) if offset == 0:
                return Flags(causal=True)
            case (Causal(offset), Window(lower)) | (Window(lower), Causal(offset)) if (
                offset == 0 and lower.is_Integer and lower < 0
            ):
                return Flags(causal=True, window=-int(lower))
            case _:
                return None

    @property
    def opaque(self) -> tuple[Opaque, ...]:
        return tuple(term for term in self.terms if isinstance(term, Opaque))

    def describe(self) -> str:
        """The terms in a few words: "causal, window 4096, padding"."""
        causal = next((term for term in self.terms if isinstance(term, Causal)), None)
        words = ", ".join(dict.fromkeys(self._brief(term, causal) for term in self.terms)) or "none"
        for _, load in self.loads:  # symbols are named after nodes, so that no two are one
            words = re.sub(rf"\b{load.node.name}\b", tensor_name(load.node), words)
        return words

    def _brief(self, term: MaskTerm, causal: Causal | None) -> str:
        """A term in words, or what its formula reads where that is longer than a line."""
        if isinstance(term, Opaque) or len(words := _words(term, causal)) <= LONG:
            return _words(term, causal)
        nodes = dict.fromkeys(load.node for symbol, load in self.loads if re.search(rf"\b{symbol.name}\b", words))
        read = " and ".join(tensor_name(node).rpartition(".")[2] for node in nodes)
        return "keys by a formula" + (f" in {read}" if read else "")


def _words(term: MaskTerm, causal: Causal | None = None) -> str:
    match term:
        case Causal(offset):
            return "causal" if offset == 0 else f"causal from {offset}"
        case Window(lower) if causal is not None:
            return f"window {sympy.expand(causal.offset - lower)}"
        case Window(lower):
            return f"keys after i{_signed(lower)}"
        case Keys(None, stop):
            return f"keys before {stop}"
        case Keys(start, None):
            return f"keys from {start}"
        case Keys(start, stop):
            return f"keys {start} to {stop}"
        case Prefix(offset, length):
            return f"prefix {length} or {_words(Causal(offset))}"
        case Chunk(size):
            return f"chunks of {size}"
        case BlockDiagonal(node):
            return f"segments of {tensor_name(node)}"
        case Ordered(node):
            return f"causal by {tensor_name(node)}"
        case Padding():
            return "padding"
        case Either(terms):
            return "(" + " or ".join(map(_words, terms)) + ")"
        case Opaque(reason):
            return f"opaque: {reason}"


def _signed(expr: sympy.Expr) -> str:
    return f" - {-expr}" if expr.could_extract_minus_sign() else f" + {expr}"


def tensors_read(terms: Sequence[MaskTerm]) -> Iterator[fx.Node]:
    """The tensors whose values the terms compare."""
    for term in terms:
        if isinstance(term, Either):
            yield from tensors_read(term.terms)
        elif isinstance(node := getattr(term, "node", None), fx.Node):
            yield node
