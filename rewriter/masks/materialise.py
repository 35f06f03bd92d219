"""A mask proof as a tensor, for certificates and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .index_bounds import plain
from .index_values import Load
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
    Window,
)

Values = Mapping[sympy.Symbol, int]


def materialise(
    terms: Sequence[MaskTerm],
    queries: int | torch.Tensor,
    keys: int | torch.Tensor,
    *,
    sizes: Values | None = None,
    batch: Values | None = None,
    loads: Sequence[tuple[sympy.Symbol, Load]] = (),
    tensors: Mapping[fx.Node, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The visible keys, true, as [.. batch, queries, keys], of all or of chosen queries and keys.

    Symbolic sizes are looked up in `sizes`, the sizes of batch index variables in `batch`, in the order of the result's
    dimensions; terms that read tensors need these, and the `loads` of the proof. Raises ValueError for Opaque terms.
    """
    grid = _Grid(queries, keys, dict(sizes or {}), dict(batch or {}), dict(loads), dict(tensors or {}))
    visible = torch.ones(grid.shape, dtype=torch.bool)
    for term in terms:
        visible = visible & grid.holds(term)
    return visible


class _Grid:
    def __init__(
        self,
        queries: int | torch.Tensor,
        keys: int | torch.Tensor,
        sizes: dict[sympy.Symbol, int],
        batch: dict[sympy.Symbol, int],
        loads: dict[sympy.Symbol, Load],
        tensors: dict[fx.Node, torch.Tensor],
    ) -> None:
        given = [torch.arange(n) if isinstance(n, int) else n for n in (*batch.values(), queries, keys)]
        self.shape = tuple(map(len, given))
        self.loads, self.tensors = loads, tensors
        self.values: dict[sympy.Symbol, Any] = dict(sizes)
        for dim, (variable, indices) in enumerate(zip([*batch, I, J], given, strict=True)):
            self.values[variable] = indices.view([-1 if d == dim else 1 for d in range(len(self.shape))])

    def holds(self, term: MaskTerm) -> torch.Tensor:
        i, j = self.values[I], self.values[J]
        match term:
            case Causal(offset):
                return self.tensor(j <= i + self.number(offset))
            case Window(lower):
                return self.tensor(j > i + self.number(lower))
            case Keys(start, stop):
                begun = True if start is None else j >= self.number(start)
                return self.tensor(begun) & self.tensor(True if stop is None else j < self.number(stop))
            case Prefix(offset, length):
                return self.holds(Causal(offset)) | self.holds(Keys(None, length))
            case Chunk(size, query_offset, key_offset):
                c = self.number(size)
                return self.tensor((i + self.number(query_offset)) // c == (j + self.number(key_offset)) // c)
            case BlockDiagonal(node, query, key):
                return self.tensor(self.element(node, query) == self.element(node, key))
            case Ordered(node, query, key, offset):
                return self.tensor(self.element(node, key) <= self.element(node, query) + self.number(offset))
            case Padding(node, indices, relation, value):
                element, number = self.element(node, indices), self.number(value)
                compared = {"==": torch.eq, "!=": torch.ne, ">=": torch.ge, "<=": torch.le}[relation](element, number)
                return self.tensor(compared)
            case Either(terms):
                return torch.stack([self.holds(t).expand(self.shape) for t in terms]).any(0)
            case Opaque(reason):
                raise ValueError(f"an opaque mask has no values: {reason}")

    @staticmethod
    def tensor(value: Any) -> torch.Tensor:
        return torch.as_tensor(value)

    def element(self, node: fx.Node, indices: Indices) -> torch.Tensor:
        """Elements of a tensor; places outside of it, which other terms hide, give any element."""
        tensor = self.tensors[node]
        places = [
            torch.as_tensor(self.number(index)).clamp(0, size - 1)
            for index, size in zip(indices, tensor.shape, strict=True)
        ]
        return tensor[tuple(places)] if places else tensor

    def number(self, expr: sympy.Expr) -> Any:
        """The value of an expression on the grid."""
        expr = plain(expr)
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            if expr not in self.values:
                load = self.loads[expr]
                self.values[expr] = self.element(load.node, load.indices)
            return self.values[expr]
        if expr.is_Add:
            return sum(map(self.number, expr.args))
        if expr.is_Mul:
            result: Any = 1
            for factor in expr.args:
                result = result * self.number(factor)
            return result
        if isinstance(expr, sympy.floor):
            above, below = sympy.fraction(sympy.together(expr.args[0]))
            return self.number(sympy.expand(above)) // self.number(sympy.expand(below))
        if type(expr).__name__ in ("Max", "Min"):
            choose = torch.maximum if type(expr).__name__ == "Max" else torch.minimum
            first, *others = (torch.as_tensor(self.number(option)) for option in expr.args)
            for other in others:
                first = choose(first, other)
            return first
        raise ValueError(f"{expr} is not evaluated")
