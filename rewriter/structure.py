"""Structural identity: identical layers have one signature, so they are certified once and printed once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx


def signature(results: Iterable[fx.Node], inputs: Collection[fx.Node]) -> str:
    """A digest of what `results` compute from `inputs`: operators, constants, data flow, shapes and dtypes.

    Names and the order of independent nodes do not matter: operands come before what reads them, in argument order.
    """
    numbers: dict[fx.Node, str] = {}
    lines: list[str] = []
    pending = list(results)[::-1]
    while pending:
        node = pending[-1]
        given = node in inputs or node.op == "placeholder"
        waiting = [] if given else [n for n in node.all_input_nodes if n not in numbers]
        if node in numbers or not waiting:
            pending.pop()
            if node not in numbers:
                numbers[node] = f"%{len(numbers)}"
                made = "given" if given else f"{node.target}{_text((node.args, node.kwargs), numbers)}"
                lines.append(f"{numbers[node]} = {made} : {_type(node)}")
        else:
            pending.extend(reversed(waiting))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(str(s) for s in value.shape)}{value.device.type}"
    return type(value).__name__ if not isinstance(value, int | float) else repr(value)


def _text(value: Any, numbers: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_text(v, numbers) for v in value) + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}={_text(v, numbers)}" for k, v in value.items()) + "}"
    return repr(value)
