"""Sizes of tensors as numbers or sympy expressions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx

from .axes import Size
from .compat import FakeTensor, FakeTensorMode, size_hints


def size_expr(size: object) -> Size:
    """An int where the size is known, else the sympy expression behind a SymInt, with exact floor divisions opened."""
    if isinstance(size, int):
        return size
    if not isinstance(size, torch.SymInt):
        raise TypeError(f"{size!r} is not a size")
    expr = size.node.expr
    if expr.is_Integer:
        return int(expr)
    return expr.replace(lambda e: type(e).__name__ == "FloorDiv", lambda e: e.args[0] / e.args[1])


def hints_near(node: fx.Node) -> Callable[[sympy.Expr], int]:
    """A function from symbolic sizes to their example values, for the symbols known at a node. 0: not known."""
    known = size_hints([node, *node.all_input_nodes, *node.users])

    def hint(expr: sympy.Expr) -> int:
        value = sympy.sympify(expr).subs(known)
        return int(value) if value.is_Integer else 0

    return hint


def fake_mode_of_value(values: object) -> AbstractContextManager[object]:
    """The fake mode of any fake tensor inside `values`; no context when there is none."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return nullcontext()


def concrete(value: object) -> Any:
    """The number itself, or the example value of a symbolic one."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    return value


def as_fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor for a real one; fakes stay as they are."""
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)
