"""Which nodes may be erased when nobody reads them, hoisted, or computed twice."""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import fx

from .compat import HigherOrderOperator, OpOverload, new_unbacked_symbols, random_ops_kept, symbolic_functions

__all__ = ["is_needless_detach", "is_pure", "is_random", "is_symbolic_arithmetic"]

aten = torch.ops.aten
_DROPOUT = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_ATTENTION = aten.scaled_dot_product_attention.default


def is_symbolic_arithmetic(target: object) -> bool:
    """Functions of Python and torch by which a graph computes with sizes and floats, and `getitem`."""
    return target in _arithmetic()


@functools.cache
def _arithmetic() -> frozenset[object]:
    names = "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ lshift rshift getitem"
    of_operator = [getattr(operator, name) for name in names.split()]
    of_math = [function for name, function in vars(math).items() if callable(function) and name[0] != "_"]
    return frozenset([*of_operator, *of_math, abs, min, max, round, int, float, bool, sum]) | symbolic_functions()


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers. Dropout does so in training only."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    if node.target in _DROPOUT:
        probability, training = node.args[1], node.args[2]
        return training is not False and probability not in (0, 0.0)
    if node.target is _ATTENTION:
        probability = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return probability not in (0, 0.0)
    return True


def is_pure(node: fx.Node) -> bool:
    """Whether erasing a node without readers changes nothing.

    Not pure: inputs and the result; writes; random numbers when eager's sequence is to be kept; higher-order
    operators; what makes a size that only running the graph tells; and everything unknown.
    """
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        return False
    if new_unbacked_symbols(node):
        return False
    if not isinstance(node.target, OpOverload):
        return is_symbolic_arithmetic(node.target)
    if node.target._schema.is_mutable or node.is_impure(impure_random=False):
        return is_needless_detach(node)
    return not (is_random(node) and random_ops_kept())


def is_needless_detach(node: fx.Node) -> bool:
    """`detach_` writes no element; on a tensor without history it does nothing."""
    if node.target is not aten.detach_.default or not isinstance(source := node.args[0], fx.Node):
        return False
    value = source.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.requires_grad
