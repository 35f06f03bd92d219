"""How many heads each layer uses, so that all layers together use no more than they may and the model loses least.

What a layer loses with n heads is measured with that layer changed and all others as they are. The sum over layers is
then made least under the limit on the number of heads, exactly, layer by layer:

    best_l(m) = min_n best_{l-1}(m - n) + cost_l(n)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

__all__ = ["cheapest", "choices", "costs_of"]

CHOICES = 4
"""Numbers of heads that are tried for a layer, all of its heads included."""


def choices(least: int, heads: int) -> list[int]:
    """Numbers of heads to try: from `least` to all, in even steps."""
    steps = max(1, min(CHOICES - 1, heads - least))
    return sorted({heads - round(n * (heads - least) / steps) for n in range(steps + 1)})


def costs_of(
    layers: Sequence[Sequence[int]], lost: Callable[[int, int], float], progress: Callable[[int, int], None]
) -> list[dict[int, float]]:
    """What each layer loses with each number of heads that it can choose; nothing with the last, all of its heads.

    `lost(layer, heads)` measures one; `progress` is told how many were measured, and of how many.
    """
    total, done, costs = sum(len(counts) - 1 for counts in layers), 0, []
    for layer, (*fewer, every) in enumerate(layers):
        measured = {every: 0.0}
        for heads in fewer:
            progress(done, total)
            measured[heads], done = lost(layer, heads), done + 1
        costs.append(measured)
    progress(done, total)
    return costs


def cheapest(costs: Sequence[Mapping[int, float]], most: int) -> list[int]:
    """A number of heads for each layer, `most` together at most, of least cost. Raises ValueError where none fit."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for cost in costs:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (lost, counts) in best.items():
            for heads, more in cost.items():
                found = (lost + more, (*counts, heads))
                if used + heads <= most and (used + heads not in longer or found < longer[used + heads]):
                    longer[used + heads] = found
        best = longer
    if not best:
        raise ValueError(f"{most} heads are too few for {len(costs)} layers")
    return list(min(best.values())[1])
