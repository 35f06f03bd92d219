"""Absorbed or expanded: what attention over latents costs in each form, and from how many query tokens on which wins.

    expanded: keys and values of every head are made of the latents, then ordinary attention
    absorbed: the up-projections go into queries and results, and attention runs as wide as the latents

One layer and one sequence; H heads, S query tokens, T latents of width d_c, rotary keys of width d_r shared by all
heads, keys and values of widths d_n and d_v, e bytes a number.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import sympy

from .machine import Machine

__all__ = ["ABSORB", "EXPAND", "NEVER", "Cost", "Widths", "crossover", "explain", "threshold", "time"]

S, T, H, d_c, d_r, d_n, d_v, e = sympy.symbols("S T H d_c d_r d_n d_v e", positive=True)

NEVER = sys.maxsize
"""The threshold of a shape whose expanded form is never predicted to be faster."""


class Cost(NamedTuple):
    """Operations and bytes moved, as numbers or as formulas."""

    flops: Any
    bytes: Any


class Widths(NamedTuple):
    """Of the latent, and of a head's key and value that are made of it; the rotary part comes on top of the key."""

    latent: int
    key: int
    value: int
    rope: int = 0


_IN_AND_OUT = S * H * (d_n + d_r + d_v)
_LATENTS_AND_WEIGHTS = T * (d_c + d_r) + H * d_c * (d_n + d_v)

EXPAND = Cost(
    flops=2 * H * (T * d_c * (d_n + d_v) + S * T * (d_n + d_r + d_v)),
    bytes=e * (_LATENTS_AND_WEIGHTS + _IN_AND_OUT + 2 * T * H * (d_n + d_v)),  # keys and values written and read
)
ABSORB = Cost(
    flops=2 * H * (S * d_c * (d_n + d_v) + S * T * (2 * d_c + d_r)),
    bytes=e * (_LATENTS_AND_WEIGHTS + _IN_AND_OUT + 4 * S * H * d_c),  # wide queries and results written and read
)

CROSSOVER = d_c * (d_n + d_v) * T / ((2 * d_c - d_n - d_v) * T + d_c * (d_n + d_v))
"""S*, at which both forms take the same number of operations. It depends neither on the heads nor on d_r."""
FORMULA = "d_c·(d_n+d_v)·T / ((2·d_c−d_n−d_v)·T + d_c·(d_n+d_v))"


def crossover(widths: Widths, tokens: float = math.inf) -> float:
    """S* for T tokens or, without them, its limit for many; infinite if absorption never takes more operations."""
    made = widths.latent * (widths.key + widths.value)
    slope = 2 * widths.latent - widths.key - widths.value
    below = slope if math.isinf(tokens) else slope + made / tokens
    return made / below if below > 0 else math.inf


def time(cost: Cost, machine: Machine) -> float:
    """Seconds by the roofline: the slower of the two sides."""
    return float(max(cost.flops / machine.flops_per_s, cost.bytes / machine.bandwidth_bytes_per_s))


@functools.lru_cache(maxsize=4096)
def threshold(widths: Widths, heads: int, tokens: int, machine: Machine | None = None, itemsize: int = 4) -> int:
    """The number of query tokens from which on the expanded form is predicted to be faster; NEVER if it is not.

    Without a machine only operations count, so that this is the first number above `crossover`.
    """
    machine = machine or Machine(math.inf, 1.0)

    def costs(queries: float) -> tuple[float, float]:
        expand, absorb = _numbers()(queries, tokens, heads, *widths, itemsize)
        return time(Cost(*expand), machine), time(Cost(*absorb), machine)

    # Each form's time is the larger of two straight lines over S: the forms change places only where lines cross.
    at0, at1 = (_numbers()(queries, tokens, heads, *widths, itemsize) for queries in (0, 1))
    sides = (machine.flops_per_s, machine.bandwidth_bytes_per_s)
    expand, absorb = (
        [(a / side, (b - a) / side) for a, b, side in zip(low, high, sides, strict=True)]
        for low, high in zip(at0, at1, strict=True)
    )
    crossings = [(b0 - a0) / (a1 - b1) for a0, a1 in expand for b0, b1 in absorb if a1 != b1]
    least = NEVER
    after = {math.floor(s) + n for s in crossings if 0 < s < NEVER for n in (1, 2)}  # 1 may still be a tie
    for queries in sorted({1, *after}, reverse=True):
        expanding, absorbing = costs(queries)
        if expanding >= absorbing * (1 - 1e-12):
            break
        least = queries
    return least


def explain(
    widths: Widths, heads: int, tokens: int, queries: int, machine: Machine | None = None, itemsize: int = 4
) -> str:
    """The formula with its numbers, and the form it chooses; with a machine, a second line that decides by time."""
    limit = crossover(widths, tokens)
    if 2 * widths.latent <= widths.key + widths.value:
        text = f"absorbed takes fewer operations for every S ≤ T: 2·d_c ≤ d_n+d_v = {widths.key + widths.value}"
    else:
        text = f"absorbed below S* = {FORMULA} = {limit:.0f} query tokens at T = {tokens}"
    if machine is None:
        return f"{text}; here S = {queries}: {_form(queries, threshold(widths, heads, tokens))}"
    least = threshold(widths, heads, tokens, machine, itemsize)
    below = "for any number of query tokens" if least == NEVER else f"below {least} query tokens"
    return f"{text}\nby time ({machine}): absorbed {below}; here S = {queries}: {_form(queries, least)}"


def _form(queries: int, least: int) -> str:
    return "absorbed" if queries < least else "expanded"


@functools.cache
def _numbers() -> Callable[..., tuple[tuple[float, float], tuple[float, float]]]:
    """(S, T, H, d_c, d_n, d_v, d_r, e) -> ((flops, bytes) expanded, (flops, bytes) absorbed)."""
    symbols = (S, T, H, d_c, d_n, d_v, d_r, e)
    made: Callable[..., Any] = sympy.lambdify(symbols, (tuple(EXPAND), tuple(ABSORB)), modules="math")
    return made
