"""The reports of this process, oldest first, as `latent.reports()` returns them."""

from __future__ import annotations

from collections import deque

from .report import GraphReport, Report

_LIMIT = 256
_graphs: deque[GraphReport] = deque(maxlen=_LIMIT)


def remember(graph: GraphReport) -> None:
    _graphs.append(graph)


def reports() -> Report:
    """What was compiled with backend="latent" in this process, up to the last 256 graphs."""
    return Report(tuple(_graphs))


def forget() -> None:
    """Drop all reports; `torch._dynamo.reset()` does it too."""
    _graphs.clear()
