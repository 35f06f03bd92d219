"""Numbers that a graph holds: literals, and tensors that are one known number."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

from .mutations import base_of, writes

aten = torch.ops.aten

_SAME = {
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.detach.default,
    aten.detach_.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.clone.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
}
_ARITHMETIC: dict[object, Callable[..., float]] = {
    aten.sqrt.default: math.sqrt,
    aten.rsqrt.default: lambda x: x**-0.5,
    aten.reciprocal.default: lambda x: 1.0 / x,
    aten.neg.default: operator.neg,
    aten.log.default: math.log,
    aten.exp.default: math.exp,
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.pow.Tensor_Scalar: operator.pow,
    aten.pow.Scalar: operator.pow,
}


def read_scalar(value: object) -> float | None:
    """The number that an argument is for every call of this graph, or None when it is none or not constant.

    A float that `dynamic=True` turned into an input is a node with a symbolic value: its value is not guarded, so it is
    no known number.
    """
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    example = value.meta.get("val")
    if isinstance(example, int | float):
        return float(example)
    if value.op == "get_attr":
        return _constant(value)
    if not isinstance(example, torch.Tensor) or any(not isinstance(s, int) or s != 1 for s in example.shape):
        return None
    if _is_written(value):
        return None
    if value.target is aten.full.default or value.target is aten.new_full.default:
        return read_scalar(value.args[1 if value.target is aten.full.default else 2])
    if value.target is aten.scalar_tensor.default or value.target in _SAME:
        return read_scalar(value.args[0])
    if value.target in _ARITHMETIC and not value.kwargs:
        return _computed(_ARITHMETIC[value.target], value.args)
    return None


def _is_written(node: fx.Node) -> bool:
    """Whether a tensor is written to, through itself or a view: its value is then not the one it was made with."""
    stack = [base := base_of(node)]
    while stack:
        tensor = stack.pop()
        for user in tensor.users:
            if tensor in writes(user) and user.target is not aten.detach_.default:
                return True
            if base_of(user) is base:
                stack.append(user)
    return False


def _constant(node: fx.Node) -> float | None:
    """A tensor literal of the traced program. Parameters and buffers are inputs, never literals."""
    owner = node.graph.owning_module
    value = getattr(owner, str(node.target), None) if owner is not None else None
    if type(value) is torch.Tensor and value.numel() == 1 and not value.is_complex():
        return float(value)
    return None


def _computed(function: Callable[..., float], arguments: Sequence[object]) -> float | None:
    numbers = [read_scalar(argument) for argument in arguments]
    if any(number is None for number in numbers):
        return None
    try:
        return function(*numbers)
    except (ArithmeticError, ValueError):
        return None
