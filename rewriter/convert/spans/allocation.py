"""Which span each head gets, so that heads cache no more than they may and lose least: an integer program (HiGHS).

    minimise Σ cost[h, c] x[h, c]   with   Σ_c x[h, c] = 1,   Σ rows_N(c) x[h, c] <= density · N · heads for every N,

and, where a layer may have but k different spans, x[h, c] <= y[layer of h, c], Σ_c y[layer, c] <= k. All whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..layers import ConversionRefused
from .plan import SpanPlan
from .span import Full, Span, Window

__all__ = ["Allocation", "allocate", "candidates", "pareto", "window_of"]

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
"""Windows that heads choose from, as shares of the length."""


@dataclass(frozen=True)
class Allocation:
    """A plan, the share of tokens that it caches at each length, and what its heads lose by the measure asked for."""

    plan: SpanPlan
    density: dict[int, float]
    cost: float
    gap: float
    """How far the cost may be above the least there is, as a share of it."""


def candidates(lengths: Sequence[int], sinks: int, rows: int | None = None) -> list[Span]:
    """Spans to choose from: for one length windows, for several also windows that grow with the length.

    Where a length is beyond the text's `rows` all of them grow: what fixed windows would lose there is not seen.
    """
    rows = max(lengths) if rows is None else rows
    shortest = min(*lengths, rows)
    fixed = {max(1, round(share * shortest) - sinks) for share in SHARES}
    found: list[Span] = [Window(sinks, alpha) for alpha in sorted(fixed)] if max(lengths) <= rows else []
    if len(set(lengths)) > 1 or not found:
        found += [Window(sinks, max(1, shortest // 32 - sinks), share) for share in SHARES]
    return [*found, Full()]


def window_of(density: float, lengths: Sequence[int], sinks: int) -> Span:
    """The widest window that caches at most so much of each length. Raises ConversionRefused."""
    shortest = min(lengths)
    if density >= 1:
        return Full()
    room = int(density * shortest) - sinks
    if room < 1:
        raise ConversionRefused("density", f"{density} of {shortest} tokens leaves no room beside {sinks} sinks")
    return Window(sinks, room) if len(set(lengths)) == 1 else Window(sinks, 1, density - (sinks + 1) / shortest)


def allocate(
    costs: Sequence[Tensor],
    choices: Sequence[Span],
    density: float,
    lengths: Sequence[int],
    classes: int = 0,
    seconds: float = 60,
) -> Allocation:
    """The plan of least cost. `costs` [key heads, choices] of each layer. Raises ConversionRefused."""
    try:
        from scipy.optimize import Bounds, milp
    except ImportError as error:
        raise ConversionRefused(
            "density", "choosing spans needs scipy", 'Install it with: pip install "torch-latent[convert]"'
        ) from error
    groups = [len(cost) for cost in costs]
    heads, count = sum(groups), len(choices)
    flat = [value for cost in costs for value in cost.flatten().tolist()]
    largest = max(*flat, 1e-30)
    kinds = len(groups) * count if classes else 0
    found = milp(
        [value / largest for value in flat] + [0.0] * kinds,
        integrality=[1] * (heads * count + kinds),
        bounds=Bounds(0, 1),
        constraints=_constraints(groups, choices, density, lengths, classes),
        options={"mip_rel_gap": 1e-4, "time_limit": seconds},
    )
    if found.x is None:
        least = {n: min(span.rows(n) for span in choices) / n for n in lengths}
        n = max(least, key=lambda n: least[n])
        raise ConversionRefused(
            "density", f"{density} of {n} tokens is too little", f"The narrowest span takes {least[n]:.3f}."
        )
    picked = found.x[: heads * count].reshape(heads, count).argmax(1).tolist()
    spans = iter(choices[c] for c in picked)
    plan = SpanPlan(tuple(tuple(next(spans) for _ in range(n)) for n in groups))
    achieved = {n: plan.density(n) for n in lengths}
    if any(share > density + 1e-9 for share in achieved.values()):
        raise AssertionError(f"the plan overspends: {achieved} where {density} was asked for")
    cost = sum(flat[h * count + c] for h, c in enumerate(picked))
    return Allocation(plan, achieved, cost, float(found.mip_gap or 0))


def _constraints(
    groups: Sequence[int], choices: Sequence[Span], density: float, lengths: Sequence[int], classes: int
) -> list[Any]:
    from scipy.optimize import LinearConstraint
    from scipy.sparse import eye_array, hstack, kron

    heads, count = sum(groups), len(choices)
    layer = [n for n, size in enumerate(groups) for _ in range(size)]
    none = len(groups) * count if classes else 0

    def over(matrix: Any) -> Any:
        """The same over all variables, those of layers last."""
        return hstack([matrix, _zeros(matrix.shape[0], none)], format="csr") if none else matrix.tocsr()

    made = [LinearConstraint(over(kron(eye_array(heads), [[1.0] * count])), 1, 1)]
    for n in lengths:
        rows = kron([[1.0] * heads], [[float(span.rows(n)) for span in choices]])
        made.append(LinearConstraint(over(rows), 0, density * n * heads))
    if classes:
        spread = _zeros(heads, len(groups)).tolil()
        spread[range(heads), layer] = 1
        uses = hstack([eye_array(heads * count), -kron(spread.tocsr(), eye_array(count))], format="csr")
        made.append(LinearConstraint(uses, -1, 0))
        kinds = hstack(
            [_zeros(len(groups), heads * count), kron(eye_array(len(groups)), [[1.0] * count])], format="csr"
        )
        made.append(LinearConstraint(kinds, 0, classes))
    return made


def _zeros(rows: int, columns: int) -> Any:
    from scipy.sparse import csr_array

    return csr_array((rows, columns))


def pareto(
    costs: Sequence[Tensor],
    choices: Sequence[Span],
    densities: Sequence[float],
    lengths: Sequence[int],
    classes: int = 0,
    seconds: float = 60,
) -> list[Allocation]:
    """One allocation for each density, without those that another one beats in cost and in every density."""
    found = [allocate(costs, choices, density, lengths, classes, seconds) for density in sorted(densities)]
    return [one for one in found if not any(_beats(other, one) for other in found)]


def _beats(one: Allocation, other: Allocation) -> bool:
    pairs = [(one.cost, other.cost), *((one.density[n], other.density[n]) for n in one.density)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
