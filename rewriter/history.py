"""The reports of this process, oldest first, as `latent.reports()` returns them."""

from __future__ import annotations

from collections import deque

import torch

from .registry import on_change
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


def _compile_anew() -> None:
    """What was compiled with other patterns or rewrites is compiled again at its next call.

    Dynamo keeps compiled code by backend and options, which do not tell what is registered. The caches on disk have the
    rewritten graph for their key, and need nothing.
    """
    if _graphs:
        torch.compiler.reset()


on_change(_compile_anew)
