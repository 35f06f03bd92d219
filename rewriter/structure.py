"""Structural identity: identical layers have one signature, so they are certified once and printed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


def signature(nodes: Iterable[fx.Node]) -> str:
    """A digest of a region, in graph order: operators, constants, data flow, shapes and dtypes, without names."""
    numbers: dict[fx.Node, str] = {}
    lines: list[str] = []

    def name(node: fx.Node) -> str:
        if node not in numbers:
            numbers[node] = f"%{len(numbers)}"
            lines.append(f"{numbers[node]} : {_type(node)}")
        return numbers[node]

    for node in nodes:
        args = _text((node.args, node.kwargs), name)
        numbers.setdefault(node, f"%{len(numbers)}")
        lines.append(f"{numbers[node]} = {node.target}{args} : {_type(node)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(str(s) for s in value.shape)}{value.device.type}"
    return type(value).__name__ if not isinstance(value, int | float) else repr(value)


def _text(value: Any, name: Any) -> str:
    if isinstance(value, fx.Node):
        return str(name(value))
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_text(v, name) for v in value) + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}={_text(v, name)}" for k, v in value.items()) + "}"
    return repr(value)
