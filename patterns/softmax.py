"""Spellings of softmax.

    softmax(x)                        the library calls
    e / sum(e),  e = exp(x)           by hand, with or without a subtracted maximum
    (e @ v) / sum(e)                  normalised after the value product
    exp(x - logsumexp(x))             through the log-sum-exp
    exp(log_softmax(x))
    e / (1 + sum(e))                  "off by one": a sink of score 0

A subtracted maximum is left among the score steps: it is a bias without the key axis, which softmax ignores.
"""

from __future__ import annotations

import torch
from torch import fx

from ..rewriter.layouts import is_tensor, layout_step, shape_of
from ..rewriter.registry import pattern
from ..rewriter.scalars import read_scalar
from ..rewriter.sites import SoftmaxSpelling

aten = torch.ops.aten

_LIBRARY = {
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
}
_SUMS = {aten.sum.dim_IntList}
_DIVISIONS = {aten.div.Tensor, aten.true_divide.Tensor, aten.div_.Tensor}


def _dim(node: fx.Node, position: int = 1) -> int | None:
    """The one dimension an operator reduces, counted from the front."""
    dims = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if isinstance(dims, list | tuple):
        if len(dims) != 1:
            return None
        dims = dims[0]
    if not isinstance(dims, int) or not isinstance(node.args[0], fx.Node):
        return None
    return dims % max(len(shape_of(node.args[0])), 1)


def _dtype(node: fx.Node) -> torch.dtype | None:
    found = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)]
    return found[0] if found else None


@pattern("softmax")
def library_softmax(node: fx.Node) -> SoftmaxSpelling | None:
    """softmax(x, dim)."""
    if node.target not in _LIBRARY or (dim := _dim(node)) is None:
        return None
    return SoftmaxSpelling(node, node.args[0], dim, node, _dtype(node))  # type: ignore[arg-type]


@pattern("softmax")
def exponential_of_log_softmax(node: fx.Node) -> SoftmaxSpelling | None:
    """exp(log_softmax(x))."""
    if node.target is not aten.exp.default:
        return None
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or inner.target not in (aten.log_softmax.int, aten._log_softmax.default):
        return None
    dim = _dim(inner)
    return None if dim is None else SoftmaxSpelling(node, inner.args[0], dim, node, _dtype(inner))  # type: ignore[arg-type]


@pattern("softmax")
def exponential_of_shifted(node: fx.Node) -> SoftmaxSpelling | None:
    """exp(x - logsumexp(x, keepdim))."""
    if node.target is not aten.exp.default:
        return None
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or inner.target not in (aten.sub.Tensor, aten.sub_.Tensor):
        return None
    scores, total = inner.args[:2]
    total = _without_unsqueeze(total)
    if not isinstance(total, fx.Node) or total.target is not aten.logsumexp.default or total.args[0] is not scores:
        return None
    dim = _dim(total)
    return None if dim is None else SoftmaxSpelling(node, scores, dim, node)  # type: ignore[arg-type]


@pattern("softmax")
def exponentials_over_their_sum(node: fx.Node) -> SoftmaxSpelling | None:
    """e / sum(e), at once or after the value product; `node` is e."""
    if node.target not in (aten.exp.default, aten.exp_.default) or not is_tensor(node):
        return None
    for total in node.users:
        if total.target not in _SUMS or total.args[0] is not node or (dim := _dim(total)) is None:
            continue
        for divisor, sink in _divisors(total, node):
            quotients = [user for user in divisor.users if _divides(user, divisor)]
            scores = node.args[0]
            if sink is not None and _is_shifted(scores, dim):
                continue  # 1 + sum(exp(x - max)) is not a sink of score 0
            for quotient in quotients:
                if quotient.args[0] is node:
                    return SoftmaxSpelling(node, scores, dim, quotient, sink=sink)  # type: ignore[arg-type]
            if quotients and sink is None:
                return SoftmaxSpelling(node, scores, dim, node, divided_later=divisor)  # type: ignore[arg-type]
    return None


def _divisors(total: fx.Node, exponentials: fx.Node) -> list[tuple[fx.Node, float | None]]:
    """`total` and what layout operations or `1 +` make of it, with the sink's score where there is one."""
    found: list[tuple[fx.Node, float | None]] = [(total, None)]
    for divisor, sink in found:
        for user in divisor.users:
            step = layout_step(user)
            if step is not None and step.source is divisor:
                found.append((user, sink))
            elif user.target in (aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor) and sink is None:
                other = user.args[1] if user.args[0] is divisor else user.args[0]
                if read_scalar(other) == 1.0:
                    found.append((user, 0.0))
    return found


def _divides(user: fx.Node, divisor: fx.Node) -> bool:
    return user.target in _DIVISIONS and user.args[1] is divisor


def _is_shifted(scores: object, dim: int) -> bool:
    return isinstance(scores, fx.Node) and scores.target in (aten.sub.Tensor, aten.sub_.Tensor)


def _without_unsqueeze(node: object) -> object:
    while isinstance(node, fx.Node) and (step := layout_step(node)) is not None:
        node = step.source
    return node
