"""Where a graph runs under autocast: the user's around the call, and regions of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import fx

from .compat import autocast_switch, autocast_switches

__all__ = ["autocast_at", "in_own_dtypes", "keep_from_autocast", "without_autocast"]

Result = TypeVar("Result")


def in_own_dtypes(body: Callable[..., Result]) -> Callable[..., Result]:
    """The body of an operator, out of reach of autocast, which is for the calls that the user wrote.

    It would narrow products whose other operands go to a kernel as they are, and results would not have the dtypes
    that graphs are made for.
    """

    @functools.wraps(body)
    def run(first: torch.Tensor, *others: Any, **named: Any) -> Result:
        with without_autocast(first.device.type):
            return body(first, *others, **named)

    return run


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Switches autocast off within the block; costs next to nothing where it is off."""
    return torch.autocast(device, enabled=False) if _is_active(device) else contextlib.nullcontext()


def _is_active(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@contextlib.contextmanager
def autocast_at(node: fx.Node) -> Iterator[None]:
    """Autocast as it is where a node stands, given that it is now as it is around the graph."""
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache in _open_regions(node):
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield


def _open_regions(node: fx.Node) -> list[Any]:
    """What the regions that a node lies in were entered with, the outermost first."""
    entered: dict[Any, Any] = {}
    switches = [n for kind in autocast_switches() for n in node.graph.find_nodes(op="call_function", target=kind)]
    for switch in sorted(n for n in switches if n < node):
        if autocast_switch(switch.target):
            entered[switch] = switch.args
        else:
            entered.pop(switch.args[0], None)
    return list(entered.values())


def keep_from_autocast(node: fx.Node) -> None:
    """Put a region without autocast around a node that would run under it."""
    device = node.meta["val"].device.type
    with autocast_at(node):
        if not _is_active(device):
            return
        dtype = torch.get_autocast_dtype(device)
    enter, leave = autocast_switches()
    graph = node.graph
    with graph.inserting_before(node):
        entered = graph.call_function(enter, (device, dtype, False, torch.is_autocast_cache_enabled()))
    with graph.inserting_after(node):
        left = graph.call_function(leave, (entered,))
    for switch in (entered, left):
        switch.meta = {key: value for key, value in node.meta.items() if key != "val"}
