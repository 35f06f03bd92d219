"""Which earlier tokens a head sees: the kinds of spans, in whole numbers that work on tensors of positions too.

A head keeps some tokens for good (the first ones, or every so many blocks) and sees besides them its band: the newest
ones, itself included. Positions p count from 0 at a sequence's first token that is no padding; n = p + 1 is its length
so far, which rules in the length take: a token's span is its own, whatever comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

__all__ = ["Full", "Span", "Strided", "Window", "seen", "seen_in_band"]

Count = TypeVar("Count", int, Tensor)

_UNIT = 1 << 16
"""Shares of the length are whole multiples of 1 / _UNIT, so that every device rounds spans alike."""


@dataclass(frozen=True)
class Full:
    """Every token up to its own."""

    kind: ClassVar[str] = "full"

    def faults(self) -> list[str]:
        return []

    def kept(self, n: int) -> int:
        """How many of n tokens are kept for good."""
        return 0

    def keeps(self, p: Tensor) -> Tensor:
        """Whether a token is kept for good."""
        return p < p

    def slot(self, p: Tensor) -> Tensor:
        """Which of the kept tokens it is."""
        return p

    def token(self, slot: Tensor) -> Tensor:
        """The position of a kept token."""
        return slot

    def band(self, n: Count) -> Count:
        """How many of the newest tokens the n-th sees."""
        return n

    @property
    def elastic(self) -> bool:
        """Whether a band may be shorter than what is held for it."""
        return True

    def recent(self, p: Tensor) -> Tensor:
        """Whether it is the position of a token that is not kept for good."""
        return p >= 0

    def held(self, n: int) -> int:
        """How many of the newest tokens must be held, so that the n-th and all after it find their bands."""
        return n

    def rows(self, n: int) -> int:
        """How many of n tokens a cache holds."""
        return n

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class Window:
    """The first `sinks` tokens, and of n tokens the last alpha + beta · n."""

    sinks: int = 0
    alpha: int = 1
    beta: float = 0.0

    kind: ClassVar[str] = "window"

    def faults(self) -> list[str]:
        """What is wrong with the numbers."""
        found = []
        if self.sinks < 0:
            found.append(f"sinks is {self.sinks}; it is a number of tokens")
        if self.alpha < 1:
            found.append(f"alpha is {self.alpha}; a token sees itself at least, so it is 1 or more")
        if not 0 <= self.beta < 1:
            found.append(f"beta is {self.beta}; it is a share of the length, below 1 (a head that sees all is `full`)")
        return found

    def kept(self, n: int) -> int:
        return min(n, self.sinks)

    def keeps(self, p: Tensor) -> Tensor:
        return (p >= 0) & (p < self.sinks)

    def slot(self, p: Tensor) -> Tensor:
        return p

    def token(self, slot: Tensor) -> Tensor:
        return slot

    def band(self, n: Count) -> Count:
        return self.alpha + n * round(self.beta * _UNIT) // _UNIT

    @property
    def elastic(self) -> bool:
        return self.beta > 0

    def recent(self, p: Tensor) -> Tensor:
        return p >= self.sinks

    def held(self, n: int) -> int:
        return min(n, self.band(n))

    def rows(self, n: int) -> int:
        return _rows(self, n)

    def __str__(self) -> str:
        span = f"last {self.alpha}" + (f" + {self.beta:g} n" if self.beta else "")
        return span + (f", first {self.sinks}" if self.sinks else "")


@dataclass(frozen=True)
class Strided:
    """In blocks: the last `local`, its own included, and each block k with (k + offset + 1) mod stride = 0 (S2)."""

    block: int
    local: int
    stride: int
    offset: int = 0

    kind: ClassVar[str] = "strided"

    def faults(self) -> list[str]:
        least = {"block": 1, "local": 1, "stride": 1, "offset": 0}
        wrong = {name: getattr(self, name) for name in least if getattr(self, name) < least[name]}
        return [f"{name} is {value}; it is at least {least[name]}" for name, value in wrong.items()]

    @property
    def _first(self) -> int:
        """The first block that is kept."""
        return self.stride - 1 - self.offset % self.stride

    def kept(self, n: int) -> int:
        cycles, rest = divmod(n, self.stride * self.block)
        return cycles * self.block + min(max(rest - self._first * self.block, 0), self.block)

    def keeps(self, p: Tensor) -> Tensor:
        return (p >= 0) & ((p // self.block + self.offset + 1) % self.stride == 0)

    def slot(self, p: Tensor) -> Tensor:
        return (p // self.block - self._first) // self.stride * self.block + p % self.block

    def token(self, slot: Tensor) -> Tensor:
        return (self._first + slot // self.block * self.stride) * self.block + slot % self.block

    def band(self, n: Count) -> Count:
        return (self.local - 1) * self.block + (n - 1) % self.block + 1

    @property
    def elastic(self) -> bool:
        return True

    def recent(self, p: Tensor) -> Tensor:
        return (p >= 0) & ~self.keeps(p)

    def held(self, n: int) -> int:
        return min(n, self.local * self.block)

    def rows(self, n: int) -> int:
        return _rows(self, n)

    def __str__(self) -> str:
        return f"last {self.local} blocks of {self.block}, one in {self.stride} (offset {self.offset})"


Span = Full | Window | Strided


def _rows(span: Span, n: int) -> int:
    """Everything while the band is as long as the sequence; then the kept ones and as many as the band has."""
    held = span.held(n)
    return n if held >= n else span.kept(n) + held


def seen_in_band(span: Span, query: Tensor, key: Tensor) -> Tensor:
    """Whether a query sees a key because it is new; those that are kept for good are left to `seen`."""
    return (key <= query) & (query - key < span.band(query + 1)) & span.recent(key)


def seen(span: Span, query: Tensor, key: Tensor) -> Tensor:
    """Whether the query at one position sees the key at another; positions below 0 are padding."""
    return seen_in_band(span, query, key) | (span.keeps(key) & (key <= query))
