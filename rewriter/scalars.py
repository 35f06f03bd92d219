"""Numbers that a graph holds: literals, and tensors that are one known number."""

from __future__ import annotations


import torch
from torch import fx

aten = torch.ops.aten


def read_scalar(value: object) -> float | None:
    """The number that an argument is for every call of this graph, or None when it is none or not constant."""
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    meta = value.meta.get("val")
    if isinstance(meta, int | float):
        return float(meta)
    if value.target in (aten.full.default,):
        return read_scalar(value.args[1]) if meta.numel() == 1 else None
    if value.target in (aten.scalar_tensor.default,):
        return read_scalar(value.args[0])
    if value.op == "get_attr":
        owner = value.graph.owning_module
        constant = getattr(owner, str(value.target), None) if owner is not None else None
        if isinstance(constant, torch.Tensor) and constant.numel() == 1 and type(constant) is torch.Tensor:
            return float(constant)
        return None
    if value.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach.default, aten._to_copy.default, aten.to.dtype, aten.clone.default):
        return read_scalar(value.args[0]) if meta.numel() == 1 else None
    return None


