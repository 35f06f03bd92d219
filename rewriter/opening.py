"""Closed operators that capture opens into plain ATen, as registered under the kind "closed_op"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .registry import patterns


def decompositions() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = {}
    for table in patterns("closed_op"):
        found.update(table())
    return found
