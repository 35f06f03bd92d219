"""Which nodes may be erased when nobody reads them, hoisted, or computed twice."""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import fx

from .compat import (
    HigherOrderOperator,
    OpOverload,
    autocast_switch,
    new_unbacked_symbols,
    random_ops_kept,
    storage_of,
    switches_mode,
    symbolic_functions,
)
from .mutations import writes

__all__ = ["enables_grad", "is_needless_detach", "is_pure", "is_random", "is_symbolic_arithmetic"]

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
    """A detach of what has no gradient does nothing; `detach_` writes no element in any case.

    One that is written to takes the history of what is written, which its source must not have.
    """
    if node.target not in (aten.detach_.default, aten.detach.default) or not isinstance(node.args[0], fx.Node):
        return False
    if not torch.is_grad_enabled() and not enables_grad(node.graph):
        return True
    return not _may_carry_gradient(node.args[0]) and not _is_written(node)


def _is_written(node: fx.Node) -> bool:
    """Whether something writes to a tensor itself, or to a view of it."""
    storage = storage_of(node.meta.get("val"))
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        if (view := stack.pop()) in seen:
            continue
        seen.add(view)
        if any(view in writes(user) for user in view.users):
            return True
        stack += [user for user in view.users if storage_of(user.meta.get("val")) == storage]
    return False


def _may_carry_gradient(node: fx.Node) -> bool:
    """Whether a gradient may reach an input through `node`. The values of a trace are detached and do not tell."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        if (source := stack.pop()) in seen:
            continue
        seen.add(source)
        stack += source.all_input_nodes
        if source.op == "placeholder" and _requires_grad(source.meta.get("example_value")):
            return True
        if source.op == "get_attr" and isinstance(_attribute(source), torch.nn.Parameter):
            return True
    return False


def _requires_grad(value: object) -> bool:
    return value is None or (isinstance(value, torch.Tensor) and value.requires_grad)


def _attribute(node: fx.Node) -> object:
    owner = node.graph.owning_module
    return functools.reduce(getattr, str(node.target).split("."), owner) if owner is not None else None


def enables_grad(graph: fx.Graph) -> bool:
    """Whether a graph switches gradients on, whatever they are outside of it."""
    switches = (n for n in graph.nodes if switches_mode(n.target) and autocast_switch(n.target) is None)
    return any(node.args[0] is True for node in switches)
