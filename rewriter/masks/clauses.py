"""From clauses to terms: which comparisons are causal, a window, padding, or not understood."""

from __future__ import annotations

from functools import cached_property

import sympy
from torch import fx

from ..provenance import tensor_name
from .index_algebra import IndexReader
from .index_bounds import Ranges
from .index_call import shape_of
from .index_values import Load
from .logic import AtLeast, Clause, Equal, Literal, Loaded, Unclear
from .terms import (
    BlockDiagonal,
    Causal,
    Chunk,
    Either,
    I,
    Indices,
    J,
    Keys,
    MaskTerm,
    Opaque,
    Ordered,
    Padding,
    Prefix,
    Relation,
    Window,
    batch_index,
)


class Naming:
    """The index variables of one mask, inside of the reader and in the terms."""

    def __init__(self, reader: IndexReader, node: fx.Node, query_dim: int | None, key_dim: int) -> None:
        self.reader = reader
        self._public: dict[sympy.Symbol, sympy.Symbol] = {}
        self._used: dict[sympy.Symbol, Load] = {}
        self.i: sympy.Symbol | None = None
        self.j: sympy.Symbol | None = None
        indices: list[sympy.Expr] = []
        for dim, size in enumerate(shape_of(node)):
            name = "i" if dim == query_dim else "j" if dim == key_dim else f"b{dim}"
            variable = self.ranges.index(name, size)
            self._public[variable] = {"i": I, "j": J}.get(name) or batch_index(dim)
            if size == 1:
                indices.append(sympy.S.Zero)
                continue
            indices.append(variable)
            if name == "i":
                self.i = variable
            elif name == "j":
                self.j = variable
        self.indices = tuple(indices)

    @property
    def ranges(self) -> Ranges:
        return self.reader.ranges

    @cached_property
    def query(self) -> frozenset[sympy.Symbol]:
        return frozenset() if self.i is None else frozenset([self.i])

    @cached_property
    def key(self) -> frozenset[sympy.Symbol]:
        return frozenset() if self.j is None else frozenset([self.j])

    def indexed(self) -> frozenset[sympy.Symbol]:
        """The loaded values that differ between queries or between keys."""
        own = self.query | self.key
        return frozenset(symbol for symbol, load in self.reader.loads.items() if _free(load.indices) & own)

    def public(self, expr: sympy.Expr) -> sympy.Expr:
        """The expression in the variables of the terms; loaded values are noted."""
        replaced = dict(self._public)
        for symbol in expr.free_symbols & self.reader.loads.keys():
            load = self.reader.loads[symbol]
            shown = ", ".join(str(self.public(index)) for index in load.indices)
            name = load.node.name + (f"[{shown}]" if shown else "") + "'" * load.epoch
            replaced[symbol] = sympy.Symbol(name, **symbol.assumptions0)
            self._used[replaced[symbol]] = Load(load.node, self.publics(load.indices), load.epoch, load.reason)
        return expr.xreplace(replaced)

    def publics(self, indices: Indices) -> Indices:
        return tuple(map(self.public, indices))

    def loads(self) -> tuple[tuple[sympy.Symbol, Load], ...]:
        return tuple(self._used.items())


def _free(indices: Indices) -> set[sympy.Symbol]:
    return set().union(*(index.free_symbols for index in indices))


def term_of(clause: Clause, names: Naming, mask: fx.Node) -> MaskTerm:
    terms = tuple(_Reading(names, mask).term(literal) for literal in clause)
    if not terms:
        return Keys(None, sympy.S.Zero)  # nothing is visible
    if opaque := next((term for term in terms if isinstance(term, Opaque)), None):
        return opaque
    if len(terms) == 1:
        return terms[0]
    causal = [t for t in terms if isinstance(t, Causal)]
    stops = [t for t in terms if isinstance(t, Keys) and t.start is None and t.stop is not None]
    if len(terms) == 2 and causal and stops and stops[0].stop is not None:
        return Prefix(causal[0].offset, stops[0].stop)
    return Either(terms)


class _Reading:
    """What one literal says about queries and keys."""

    def __init__(self, names: Naming, mask: fx.Node) -> None:
        self.names, self.mask = names, mask

    def term(self, literal: Literal) -> MaskTerm:
        match literal:
            case Loaded(load, holds):
                return self.loaded(load, "!=" if holds else "==", sympy.S.Zero)
            case AtLeast(expr):
                return self.at_least(expr)
            case Equal(expr, holds):
                return self.equal(expr, holds)
            case Unclear(_, reason):
                return self.unread(reason)

    # ** loaded values **

    def varying(self, expr: sympy.Expr) -> dict[sympy.Symbol, Load]:
        """The loaded values in an expression that depend on the query or on the key."""
        loads = self.names.reader.loads
        return {s: loads[s] for s in expr.free_symbols & self.names.indexed()}

    def loaded(self, load: Load, relation: Relation, value: sympy.Expr) -> MaskTerm:
        """load relation value."""
        free = _free(load.indices)
        if self.positions(value):
            return Opaque(f"Positions are compared with {tensor_name(load.node)}, which {load.reason}", load.node)
        if free & self.names.query and free & self.names.key:
            return Opaque(f"{tensor_name(load.node)} {load.reason}", load.node)
        if not free & self.names.key:
            what = "whole queries" if free & self.names.query else "all keys at once"
            return Opaque(f"{tensor_name(load.node)} hides {what}, and it {load.reason}", load.node)
        return Padding(load.node, self.names.publics(load.indices), relation, self.names.public(value), load.epoch)

    def pair(self, expr: sympy.Expr) -> tuple[Load, Load, sympy.Expr] | None:
        """expr = query's element - key's element + rest, of one tensor."""
        found = self.varying(expr)
        if len(found) != 2:
            return None
        (a, one), (b, two) = found.items()
        if _free(one.indices) & self.names.key:
            (a, one), (b, two) = (b, two), (a, one)
        rest = sympy.expand(expr - a + b)
        apart = not _free(one.indices) & self.names.key and not _free(two.indices) & self.names.query
        if one.node is not two.node or one.epoch != two.epoch or not apart or rest.has(a, b) or self.positions(rest):
            return None
        return one, two, rest

    def positions(self, expr: sympy.Expr) -> set[sympy.Symbol]:
        return set(expr.free_symbols & (self.names.query | self.names.key))

    # ** comparisons **

    def at_least(self, expr: sympy.Expr) -> MaskTerm:
        """expr >= 0."""
        if found := self.varying(expr):
            return self.loaded_at_least(expr, found)
        i, j = self.names.i, self.names.j
        query = expr.coeff(i) if i is not None else sympy.S.Zero
        key = expr.coeff(j) if j is not None else sympy.S.Zero
        rest = sympy.expand(expr - query * (i or 0) - key * (j or 0))
        if self.positions(rest):
            return self.strange(expr)
        rest = self.names.public(rest)
        match int(query) if query.is_Integer else None, int(key) if key.is_Integer else None:
            case 1, -1:
                return Causal(rest)
            case -1, 1:
                return Window(-rest - 1)
            case 0, -1:
                return Keys(None, rest + 1)
            case 0, 1:
                return Keys(-rest, None)
            case _, 0:
                return self.unread(f"hides all keys of some queries: {self.shown(expr)} >= 0")
        return self.strange(expr)

    def strange(self, expr: sympy.Expr) -> Opaque:
        return self.unread(f"does not compare one key with one query position: {self.shown(expr)} >= 0")

    def unread(self, reason: str) -> Opaque:
        return Opaque(f"{tensor_name(self.mask)} {reason}", self.mask)

    def shown(self, expr: sympy.Expr) -> str:
        return str(self.names.public(expr))

    def loaded_at_least(self, expr: sympy.Expr, found: dict[sympy.Symbol, Load]) -> MaskTerm:
        if (pair := self.pair(expr)) is not None:
            query, key, rest = pair
            indices = self.names.publics(query.indices), self.names.publics(key.indices)
            return Ordered(query.node, *indices, self.names.public(rest), query.epoch)
        symbol, load = next(iter(found.items()))
        factor, rest = self.single(expr, symbol)
        if len(found) > 1 or factor is None or rest.has(symbol):
            return Opaque(f"{tensor_name(load.node)} {load.reason}", load.node)
        return self.loaded(load, ">=" if factor > 0 else "<=", -rest if factor > 0 else rest)

    @staticmethod
    def single(expr: sympy.Expr, symbol: sympy.Symbol) -> tuple[int | None, sympy.Expr]:
        """The factor 1 or -1 of a symbol, and the rest."""
        factor = expr.coeff(symbol)
        return (int(factor) if factor in (1, -1) else None), sympy.expand(expr - factor * symbol)

    def equal(self, expr: sympy.Expr, holds: bool) -> MaskTerm:
        """expr == 0, or != 0."""
        found = self.varying(expr)
        for signed in (expr, -expr):
            pair = self.pair(sympy.expand(signed))
            if pair is not None and holds and pair[2] == 0:
                indices = self.names.publics(pair[0].indices), self.names.publics(pair[1].indices)
                return BlockDiagonal(pair[0].node, *indices, pair[0].epoch)
        if not found:
            chunk = self.chunk(expr) if holds else None
            return chunk or self.unread(f"compares {self.shown(expr)} with 0")
        symbol, load = next(iter(found.items()))
        factor, rest = self.single(expr, symbol)
        if len(found) > 1 or factor is None or rest.has(symbol):
            return Opaque(f"{tensor_name(load.node)} {load.reason}", load.node)
        return self.loaded(load, "==" if holds else "!=", -rest if factor > 0 else rest)

    def chunk(self, expr: sympy.Expr) -> Chunk | None:
        """±(floor((j + p) / c) - floor((i + q) / c) + k) = 0, which is p + k·c for p."""
        i, j = self.names.i, self.names.j
        floors = [term for term in expr.as_coefficients_dict() if isinstance(term, sympy.floor)]
        if i is None or j is None or len(floors) != 2:
            return None
        query, key = floors if floors[1].has(j) else reversed(floors)
        sign = expr.coeff(key)
        rest = sympy.expand(expr - sign * (key - query))
        inner_i, inner_j = sympy.expand(query.args[0]), sympy.expand(key.args[0])
        step = inner_j.coeff(j)
        if sign not in (1, -1) or self.positions(rest) or step == 0 or inner_i.coeff(i) != step:
            return None
        size = 1 / step
        shift_i, shift_j = sympy.expand((inner_i - step * i) * size), sympy.expand((inner_j - step * j) * size)
        if self.positions(shift_i) or self.positions(shift_j):
            return None
        shift_j = sympy.expand(shift_j + sign * rest * size)
        return Chunk(self.names.public(size), self.names.public(shift_i), self.names.public(shift_j))
