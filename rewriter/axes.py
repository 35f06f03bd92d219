"""The axis algebra: a tensor's layout is a tuple of dimensions, a dimension is a product of named axes.

    [B, H*S, D]  is written  ((B,), (H, S), (D,))          major axis first; () has size 1

Layout operations act on axes, not on numbers. A view cuts the flat product of axes anew and, where a cut falls inside
an axis, splits that axis in two: (N) viewed as [B, H] makes N = B*H *everywhere* it occurs, which is why splits live in
the `AxisSpace` that all layouts of one site share. Two layouts are equal when they are equal after `resolve`.

Sizes are `int` where the graph is static and sympy expressions where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import sympy

Size: TypeAlias = "int | sympy.Expr"


@dataclass(frozen=True, eq=False)
class Axis:
    """One named index. Identity, not name or size, tells axes apart."""

    name: str
    size: Size

    def __repr__(self) -> str:
        return f"{self.name}:{self.size}"


Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


def flat(layout: Iterable[Dim]) -> Dim:
    """All axes of a layout in memory order."""
    return tuple(axis for dim in layout for axis in dim)


def product(sizes: Iterable[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def size_of(dim: Dim) -> Size:
    return product(axis.size for axis in dim)


def same_size(a: Size, b: Size) -> bool:
    """Equal for every value of the symbols, as far as polynomial arithmetic can tell."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b) or sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0


@dataclass
class AxisSpace:
    """The axes of one site, the splits they have undergone, and the sums made by `cat`."""

    hint: Callable[[sympy.Expr], int] | None = None
    """Example value of a symbolic size; decides only whether a quotient of symbols is a whole number."""

    splits: dict[Axis, Dim] = field(default_factory=dict)
    sums: dict[Axis, tuple[Dim, ...]] = field(default_factory=dict)
    """axis -> its parts in order, where a `cat` joined an axis with something else (an attention sink)."""

    def fresh(self, name: str, size: Size) -> Dim:
        """A new axis as a dimension; nothing for size 1, which carries no index."""
        return () if same_size(size, 1) else (Axis(name, size),)

    def fresh_layout(self, names: Sequence[str], sizes: Sequence[Size]) -> Layout:
        return tuple(self.fresh(name, size) for name, size in zip(names, sizes, strict=True))

    def resolve(self, dim: Dim) -> Dim:
        """The dimension with every split axis replaced by its parts."""
        if not any(axis in self.splits for axis in dim):
            return dim
        return self.resolve(tuple(part for axis in dim for part in self.splits.get(axis, (axis,))))

    def resolve_layout(self, layout: Layout) -> Layout:
        return tuple(self.resolve(dim) for dim in layout)

    def axes(self, *layouts: Layout) -> frozenset[Axis]:
        return frozenset(axis for layout in layouts for dim in layout for axis in self.resolve(dim))

    def same(self, a: Dim, b: Dim) -> bool:
        return self.resolve(a) == self.resolve(b)

    def factor(self, dim: Dim, sizes: Sequence[Size]) -> Layout | None:
        """Cut a flat product of axes into consecutive groups of the given sizes.

        An axis is split where a boundary falls inside it. None when the sizes do not cut the product evenly,
        in which case nothing has been split.
        """
        pending = list(self.resolve(dim))[::-1]
        planned: dict[Axis, Dim] = {}
        groups: list[Dim] = []
        for size in sizes:
            group: list[Axis] = []
            remaining = size
            while not same_size(remaining, 1):
                if not pending:
                    return None
                axis = pending.pop()
                if same_size(axis.size, remaining):
                    group.append(axis)
                    remaining = 1
                elif (rest := self._quotient(remaining, axis.size)) is not None:
                    group.append(axis)
                    remaining = rest
                elif (rest := self._quotient(axis.size, remaining)) is not None and axis not in self.sums:
                    major, minor = Axis(f"{axis.name}'", remaining), Axis(f'{axis.name}"', rest)
                    planned[axis] = (major, minor)
                    group.append(major)
                    pending.append(minor)
                    remaining = 1
                else:
                    return None
            groups.append(tuple(group))
        if pending:
            return None
        self.splits.update(planned)
        return self.resolve_layout(tuple(groups))

    def unify(self, keep: Dim, drop: Dim) -> bool:
        """Declare two dimensions to be the same index: the axes of `drop` become those of `keep`."""
        keep, drop = self.resolve(keep), self.resolve(drop)
        if keep == drop:
            return True
        if not same_size(size_of(keep), size_of(drop)):
            return False
        cut = self.factor(drop, [axis.size for axis in keep])
        if cut is None:  # the boundaries of `drop` may be the finer ones
            if self.factor(keep, [axis.size for axis in drop]) is None:
                return False
            return self.unify(keep, drop)
        for axis, dim in zip(keep, cut, strict=True):
            if dim == (axis,):
                continue
            if len(dim) == 1:
                self.splits[dim[0]] = (axis,)
            else:
                self.splits[axis] = dim
        return True

    def join(self, name: str, parts: Sequence[Dim]) -> Dim:
        """The axis a `cat` makes: the sum of its parts."""
        axis = Axis(name, sum((size_of(part) for part in parts), 0))
        self.sums[axis] = tuple(parts)
        return (axis,)

    def part(self, dim: Dim, start: Size, length: Size) -> Dim | None:
        """The part of a sum axis that a slice takes, when the slice falls on part boundaries."""
        dim = self.resolve(dim)
        if len(dim) != 1 or dim[0] not in self.sums:
            return None
        offset: Size = 0
        for piece in self.sums[dim[0]]:
            if same_size(offset, start) and same_size(size_of(piece), length):
                return self.resolve(piece)
            offset = offset + size_of(piece)
        return None

    def _quotient(self, a: Size, b: Size) -> Size | None:
        """a / b where that is a whole number, else None."""
        if isinstance(a, int) and isinstance(b, int):
            return a // b if b and a % b == 0 else None
        ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
        if ratio.is_Integer:
            return int(ratio)
        _, denominator = sympy.fraction(ratio)
        if not denominator.is_Integer or ratio.is_number:
            return None
        if denominator != 1:
            # s/8 is a size only if 8 divides s; the view that asked for it has guarded that, the hint confirms.
            numerator = self.hint(sympy.fraction(ratio)[0]) if self.hint else 0
            if numerator == 0 or numerator % int(denominator):
                return None
        return ratio


def render(dim: Dim) -> str:
    """'b', '(h g)', '1'."""
    if not dim:
        return "1"
    names = " ".join(axis.name for axis in dim)
    return names if len(dim) == 1 else f"({names})"
