"""Sums of products, in every spelling, as labelled index expressions.

    matmul(a, b)                    a[0 1 2 3] b[0 1 3 4] -> [0 1 2 4]
    einsum("bqhd,bkhd->bhqk")       a[b q h d] b[b k h d] -> [b h q k]
    (a * b).sum(-1)                 a[0 1 2] b[0 1 2]     -> [0 1]

A label stands for one dimension; `None` marks a dimension of size 1 that is broadcast against the other operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .axes import same_size
from .layouts import is_tensor, shape_of
from .nodes import args_of

aten = torch.ops.aten
Labels = tuple[str | None, ...]


@dataclass(frozen=True)
class Contraction:
    """out = beta * addend + alpha * sum(lhs * rhs) over the labels that the output lacks."""

    node: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    lhs_labels: Labels
    rhs_labels: Labels
    out_labels: Labels
    addend: fx.Node | None = None
    alpha: object = 1.0
    beta: object = 1.0

    @property
    def summed(self) -> frozenset[str]:
        both = {label for label in self.lhs_labels if label} & {label for label in self.rhs_labels if label}
        return frozenset(both - set(self.out_labels))

    def describe(self) -> str:
        text = " ".join
        lhs, rhs, out = (text(label or "1" for label in labels) for labels in self._labels())
        return f"[{lhs}] [{rhs}] -> [{out}]"

    def _labels(self) -> tuple[Labels, Labels, Labels]:
        return self.lhs_labels, self.rhs_labels, self.out_labels


def contraction(node: fx.Node) -> Contraction | None:
    """`node` as a contraction of two tensors, or None."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    match node.target:
        case aten.matmul.default | aten.mm.default | aten.bmm.default | aten.mv.default:
            return _matmul(node, args_of(node)[0], args_of(node)[1])
        case aten.baddbmm.default | aten.addmm.default:
            product = _matmul(node, args_of(node)[1], args_of(node)[2])
            return product and _with_addend(product, node)
        case aten.einsum.default:
            return _einsum(node)
        case aten.linear.default:
            return _linear(node)
        case aten.sum.dim_IntList:
            return _multiply_and_sum(node)
        case aten.conv1d.default:
            return _convolution_of_one(node)
        case aten.tensordot.default:
            return _tensordot(node)
        case aten.inner.default:
            return _inner(node)
        case _:
            return None


def _pair(lhs: object, rhs: object) -> tuple[fx.Node, fx.Node] | None:
    if isinstance(lhs, fx.Node) and isinstance(rhs, fx.Node) and is_tensor(lhs) and is_tensor(rhs):
        return lhs, rhs
    return None


def _matmul(node: fx.Node, lhs: object, rhs: object) -> Contraction | None:
    if (pair := _pair(lhs, rhs)) is None:
        return None
    a, b = pair
    rank_a, rank_b, rank = len(shape_of(a)), len(shape_of(b)), len(shape_of(node))
    vectors = (rank_a == 1) + (rank_b == 1)
    batch = [f"b{i}" for i in range(rank - 2 + vectors)] if vectors < 2 else []
    tail_a = ["k"] if rank_a == 1 else ["m", "k"]
    tail_b = ["k"] if rank_b == 1 else ["k", "n"]
    out = batch + (["m"] if rank_a > 1 else []) + (["n"] if rank_b > 1 else [])
    # A matrix times a vector batch keeps fewer batch dimensions than one operand may have.
    labels_a = batch[len(batch) - max(rank_a - 2, 0) :] + tail_a
    labels_b = batch[len(batch) - max(rank_b - 2, 0) :] + tail_b
    return _broadcast(Contraction(node, a, b, tuple(labels_a), tuple(labels_b), tuple(out)))


def _broadcast(product: Contraction) -> Contraction | None:
    """Labels of size-1 dimensions become None where the other operand has the full size."""
    sizes: dict[str, object] = {}
    shapes = ((product.lhs_labels, shape_of(product.lhs)), (product.rhs_labels, shape_of(product.rhs)))
    for labels, shape in shapes:
        if len(labels) != len(shape):
            return None
        for label, size in zip(labels, shape, strict=True):
            if label is not None and (label not in sizes or same_size(sizes[label], 1)):
                sizes[label] = size

    def masked(labels: Labels, shape: Sequence[object]) -> Labels:
        return tuple(
            None if label is None or (same_size(size, 1) and not same_size(sizes[label], 1)) else label
            for label, size in zip(labels, shape, strict=True)
        )

    return Contraction(
        product.node,
        product.lhs,
        product.rhs,
        masked(product.lhs_labels, shape_of(product.lhs)),
        masked(product.rhs_labels, shape_of(product.rhs)),
        product.out_labels,
    )


def _with_addend(product: Contraction, node: fx.Node) -> Contraction:
    addend = args_of(node)[0]
    return Contraction(
        node,
        product.lhs,
        product.rhs,
        product.lhs_labels,
        product.rhs_labels,
        product.out_labels,
        addend if isinstance(addend, fx.Node) else None,
        node.kwargs.get("alpha", 1.0),
        node.kwargs.get("beta", 1.0),
    )


def _einsum(node: fx.Node) -> Contraction | None:
    equation, operands = args_of(node)[0], args_of(node)[1]
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    if (pair := _pair(operands[0], operands[1])) is None:
        return None
    equation = equation.replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    ranks = [len(shape_of(operand)) for operand in pair]
    spread = max((rank - len(term) + 3 for term, rank in zip(terms, ranks, strict=True) if "..." in term), default=0)
    a, b = (_letters(term, rank, spread) for term, rank in zip(terms, ranks, strict=True))
    if arrow:
        out = _letters(output, len(shape_of(node)), spread)
    else:
        letters = sorted(c for c in set(terms[0] + terms[1]) - {"."} if (terms[0] + terms[1]).count(c) == 1)
        out = tuple(f"...{i}" for i in range(spread)) + tuple(letters)
    if len(set(a)) != len(a) or len(set(b)) != len(b):  # a diagonal
        return None
    if not set(out) <= set(a) | set(b):
        return None
    alone = (set(a) ^ set(b)) - set(out)
    of_one = {
        label
        for labels, operand in zip((a, b), pair, strict=True)
        for label, size in zip(labels, shape_of(operand), strict=True)
        if same_size(size, 1)
    }
    if alone - of_one:  # summed over one operand only: not a plain product
        return None
    first, second = (tuple(None if label in alone else label for label in labels) for labels in (a, b))
    return _broadcast(Contraction(node, pair[0], pair[1], first, second, out))


def _letters(term: str, rank: int, spread: int) -> tuple[str, ...]:
    if "..." not in term:
        return tuple(term)
    head, tail = term.split("...")
    count = rank - len(head) - len(tail)
    return tuple(head) + tuple(f"...{i}" for i in range(spread - count, spread)) + tuple(tail)


def _linear(node: fx.Node) -> Contraction | None:
    """x[.. k] weight[n k] (+ bias[n])."""
    if (pair := _pair(args_of(node)[0], args_of(node)[1])) is None:
        return None
    x, weight = pair
    lead = tuple(f"b{i}" for i in range(len(shape_of(x)) - 1))
    weight_labels = ("n", "k") if len(shape_of(weight)) == 2 else ("k",)
    bias = args_of(node)[2] if len(node.args) > 2 else None
    return Contraction(
        node,
        x,
        weight,
        (*lead, "k"),
        weight_labels,
        lead + weight_labels[:-1],
        bias if isinstance(bias, fx.Node) else None,
    )


def _multiply_and_sum(node: fx.Node) -> Contraction | None:
    times = args_of(node)[0]
    if not isinstance(times, fx.Node) or times.target is not aten.mul.Tensor:
        return None
    if (pair := _pair(args_of(times)[0], args_of(times)[1])) is None:
        return None
    shape = shape_of(times)
    dims = args_of(node)[1] if len(node.args) > 1 else None
    if not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    dim = int(dims[0]) % len(shape)
    labels = tuple("k" if i == dim else f"b{i}" for i in range(len(shape)))
    keepdim = bool(args_of(node)[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    out: tuple[str | None, ...] = tuple(
        (None if label == "k" else label) for label in labels if keepdim or label != "k"
    )

    def of(operand: fx.Node) -> Labels:
        own = shape_of(operand)
        tail = labels[len(labels) - len(own) :]
        full = shape[len(shape) - len(own) :]
        return tuple(
            label if same_size(size, total) else None for label, size, total in zip(tail, own, full, strict=True)
        )

    lhs, rhs = of(pair[0]), of(pair[1])
    if "k" not in lhs or "k" not in rhs:  # a plain weighted sum over one operand
        return None
    return Contraction(node, pair[0], pair[1], lhs, rhs, out)


def _convolution_of_one(node: fx.Node) -> Contraction | None:
    """x[b k t] weight[n k 1]: a kernel of length one is a matrix."""
    if (pair := _pair(args_of(node)[0], args_of(node)[1])) is None:
        return None
    plain = (None, [1], [0], [1], 1)  # bias, stride, padding, dilation, groups
    given = args_of(node)[2:]
    if len(shape_of(pair[0])) != 3 or not same_size(shape_of(pair[1])[2], 1) or given != plain[: len(given)]:
        return None
    return Contraction(node, pair[0], pair[1], ("b", "k", "t"), ("n", "k", None), ("b", "n", "t"))


def _inner(node: fx.Node) -> Contraction | None:
    """a[.. k] b[.. k] over the last dimensions."""
    if (pair := _pair(args_of(node)[0], args_of(node)[1])) is None:
        return None
    a = tuple(f"a{i}" for i in range(len(shape_of(pair[0])) - 1))
    b = tuple(f"b{i}" for i in range(len(shape_of(pair[1])) - 1))
    return Contraction(node, pair[0], pair[1], (*a, "k"), (*b, "k"), a + b)


def _tensordot(node: fx.Node) -> Contraction | None:
    if (pair := _pair(args_of(node)[0], args_of(node)[1])) is None:
        return None
    a = [f"a{i}" for i in range(len(shape_of(pair[0])))]
    b = [f"b{i}" for i in range(len(shape_of(pair[1])))]
    summed_a, summed_b = args_of(node)[2], args_of(node)[3]
    for n, (i, j) in enumerate(zip(summed_a, summed_b, strict=True)):
        a[int(i)] = b[int(j)] = f"k{n}"
    out = [label for label in a + b if not label.startswith("k")]
    return Contraction(node, pair[0], pair[1], tuple(a), tuple(b), tuple(out))
