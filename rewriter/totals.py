"""Row sums of exponentials: whether a divisor meets the rows it was summed from."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from .axes import AxisSpace, Layout
from .layouts import Expand, layout_step, shape_of


def layout_of_total(total: fx.Node, divisor: fx.Node, layout: Layout, dim: int, space: AxisSpace) -> Layout | None:
    """The layout of `divisor`, made from the sum `total` over `dim` of a tensor with `layout`."""
    kept = len(shape_of(total)) == len(layout)
    current: Layout | None = (*layout[:dim], *([()] if kept else []), *layout[dim + 1 :])
    for node in reversed(list(_between(total, divisor))):
        step = layout_step(node)
        if step is not None and current is not None:
            current = step.apply(space.resolve_layout(current), space)
        if isinstance(step, Expand) and current is not None:  # repeating a sum changes nothing
            current = tuple(() if again else dim for dim, again in zip(current, step.repeated(), strict=True))
    return current


def _between(total: fx.Node, divisor: fx.Node) -> Iterator[fx.Node]:
    node = divisor
    while node is not total:
        yield node
        step = layout_step(node)
        carriers = [step.source] if step else [n for n in node.all_input_nodes if n == total or total < n]
        node = carriers[0]


def broadcasts(divisor: Layout, layout: Layout, space: AxisSpace) -> bool:
    """Whether every dimension of `divisor` is the same axis as the one it is aligned with, or has size 1."""
    if len(divisor) > len(layout):
        return False
    aligned = zip(divisor, layout[len(layout) - len(divisor) :], strict=True)
    return all(not space.resolve(a) or space.same(a, b) for a, b in aligned)
