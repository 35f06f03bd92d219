"""latent::gemv: a few rows times matrices that are large, at the speed at which the matrices can be read.

    out_i = rows W_iᵀ + b_i

A step of decoding multiplies one row by every weight of the model. Libraries are made for many rows: in bfloat16 they
first bring each matrix into another order, which takes longer than reading it. Products of the same rows are one call.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..rewriter.autocast import without_autocast
from ..rewriter.compat import FakeTensor
from ..rewriter.emit import LOWERED
from ..rewriter.kernel_sources import KernelSource
from ..rewriter.mutations import Mutations
from ..rewriter.nodes import args_of
from ..rewriter.registry import joint_lowering, source_printer
from ..rewriter.sizes import concrete, fake_mode_of_value
from .cpp_library import isa
from .gemv_library import MOST_ROWS, GemvSpec, Products, build, source
from .generated import DTYPES, unavailable
from .self_check import check_once

__all__ = ["Product", "gemv", "groups", "join_products", "product_of", "reference", "suits"]

log = logging.getLogger(__name__)
aten = torch.ops.aten

WORTH = 128 << 10
"""Bytes of matrices from which on a call takes as long as reading them."""

torch.library.define("latent::gemv", "(Tensor rows, Tensor[] weights, Tensor?[] biases) -> Tensor[]")


def gemv(rows: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """rows [..., K] times weights [N, K] each, or rows [H, M, K] times one weight [H, N, K]: [..., N] each.

    Weights that are contiguous in K or in N are read as they lie. The library makes the products of more than MOST_ROWS
    rows, which can come where their number is a symbol.
    """
    height = _height(rows, weights[0])
    if not 0 < height <= MOST_ROWS:
        return plain(rows, weights, biases)
    layouts = [by_columns(weight) for weight in weights]
    if layouts.count(layouts[0]) == len(weights):
        return _kernel(rows.dtype, height, layouts[0])(Products(rows, weights, biases))
    return [made for w, b in zip(weights, biases, strict=True) for made in gemv(rows, [w], [b])]


def gemv_of_used(rows: Tensor, weight: Tensor, bias: Tensor | None, used: Tensor) -> Tensor:
    """The product with one weight [N, K] by its heads that any row uses, [..., heads]: the others are not read.

    Those outputs are 0 of unused heads, or of a weight that is contiguous in N those inputs are taken for 0.
    """
    used = used.view(-1, used.shape[-1])
    spec = GemvSpec(rows.dtype, len(used), by_columns(weight), True)
    return kernel_for(spec)(Products(rows, [weight], [bias], used[0] if len(used) == 1 else used.any(0)))[0]


def plain(rows: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """The products in the library's operators, out of reach of autocast."""
    with without_autocast(rows.device.type):
        if weights[0].ndim == 3:
            return [rows @ weights[0].mT]
        return [F.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _shapes(rows: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [rows.new_empty((*rows.shape[:-1], weight.shape[-2])) for weight in weights]


torch.library.impl("latent::gemv", "CPU", gemv)
torch.library.register_fake("latent::gemv", _shapes)


def by_columns(weight: Tensor) -> bool:
    *_, line, inner = weight.stride()
    return inner != 1 and line == 1


def _height(rows: Tensor, weight: Tensor) -> int:
    """Rows that each matrix is multiplied by."""
    return math.prod(rows.shape[weight.ndim == 3 : -1])


@functools.cache
def _kernel(dtype: torch.dtype, height: int, by_columns: bool) -> Callable[[Products], list[Tensor]]:
    return kernel_for(GemvSpec(dtype, height, by_columns))


def _spec(rows: Tensor, weight: Tensor) -> GemvSpec:
    return GemvSpec(rows.dtype, concrete(_height(rows, weight)), by_columns(weight))


def reference(products: Products) -> list[Tensor]:
    """The definition in plain ATen, out of reach of autocast. Sums are float32."""
    rows, made, used = products.rows.float(), [], products.used
    with without_autocast("cpu"):
        for weight, bias in zip(products.weights, products.biases, strict=True):
            inputs = by_columns(weight)
            out = (of_used_heads(rows, used) if inputs else rows) @ weight.float().mT
            out = (out if bias is None else out + bias.float()).to(products.rows.dtype)
            made.append(out if inputs else of_used_heads(out, used))
    return made


def of_used_heads(x: Tensor, used: Tensor | None) -> Tensor:
    """x [..., heads · width] with zeros for unused heads."""
    return x if used is None else x.unflatten(-1, (len(used), -1)).masked_fill(~used[:, None], 0).flatten(-2)


@functools.cache
def kernel_for(spec: GemvSpec) -> Callable[[Products], list[Tensor]]:
    """What computes a specification: a kernel that was checked, or the definition, with one warning."""
    try:
        text, kernel = build(spec)
        check_once(small_products(spec), spec.dtype, text, "cpu", _in_one(kernel), _in_one(reference))
    except Exception as error:
        log.warning("latent: no generated kernel for %s, plain operators run: %s", spec.name, error)
        return reference
    return kernel


def _in_one(run: Callable[[Products], list[Tensor]]) -> Callable[[Products], Tensor]:
    """All results as one tensor."""
    return lambda products: torch.cat([out.flatten() for out in run(products)])


def small_products(spec: GemvSpec) -> Iterator[Products]:
    """Two matrices and a bias, a matrix for each head, and rows too long to be read again for each output.

    No size is a multiple of a vector or of a group.
    """
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(spec.dtype)

    def weight(*shape: int) -> Tensor:
        *heads, N, K = shape
        return tensor(*heads, K, N).mT if spec.by_columns else tensor(*shape)

    if spec.skips:
        used = torch.tensor([True, False, True, True, False, False, True])
        yield Products(tensor(spec.rows, 77), [weight(301, 77), weight(21, 77)], [tensor(301), None], used)
        yield Products(tensor(spec.rows, 630), [weight(63, 630)], [None], used)
        return
    yield Products(tensor(spec.rows, 77), [weight(301, 77), weight(19, 77)], [tensor(301), None])
    yield Products(tensor(3, spec.rows, 40), [weight(3, 130, 40)], [None])
    long = (16 << 10) // (spec.rows * spec.dtype.itemsize) + 5
    yield Products(tensor(spec.rows, long), [weight(11, long)], [None])


@source_printer("latent::gemv")
def _printed(node: fx.Node) -> list[KernelSource]:
    rows, weights, _ = fx.node.map_arg(args_of(node), lambda n: n.meta["val"])
    specs = dict.fromkeys(_spec(rows, weight) for weight in weights)
    return [KernelSource(spec.name, ".cpp", source(spec, isa())) for spec in specs]


# ** Where it goes **


def suits(rows: Tensor, weights: list[Tensor]) -> bool:
    """Whether the kernel takes these arguments, and reading the matrices is what their products take."""
    height = concrete(_height(rows, weights[0]))
    if rows.dtype not in DTYPES or not isinstance(height, int) or not 0 < height <= MOST_ROWS:
        return False
    if any(weight.dtype != rows.dtype or not all(isinstance(n, int) for n in weight.shape) for weight in weights):
        return False
    if sum(weight.numel() for weight in weights) * rows.dtype.itemsize < WORTH:
        return False
    return rows.device.type == "cpu" and not unavailable("cpu")


class Product(NamedTuple):
    """A node that multiplies rows by a weight [N, K]: rows weightᵀ + bias. `flipped`: the weight is [K, N]."""

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    flipped: bool
    bias: fx.Node | None

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        return (self.rows, self.weight) if self.bias is None else (self.rows, self.weight, self.bias)


def product_of(node: fx.Node) -> Product | None:
    """The product that a node is: linear, or mm, matmul and addmm by a matrix."""
    if node.kwargs:
        return None
    if node.target is aten.linear.default:
        rows, weight, bias = (*args_of(node), None)[:3]
        found = Product(node, rows, weight, False, bias)
    elif node.target in (aten.mm.default, aten.matmul.default):
        rows, weight = args_of(node)
        found = Product(node, rows, *_unflipped(weight), None)
    elif node.target is aten.addmm.default:
        bias, rows, weight = args_of(node)
        found = Product(node, rows, *_unflipped(weight), bias)
    else:
        return None
    result = node.meta["val"]
    values = [operand.meta["val"] for operand in found.operands]
    if any(value.dtype != result.dtype or value.device != result.device for value in values):
        return None
    if any(type(value) is not FakeTensor for value in values):
        return None  # subclasses, as quantised weights are, multiply in their own way
    if values[0].dim() < 2 or values[1].dim() != 2 or any(bias.shape != result.shape[-1:] for bias in values[2:]):
        return None
    return found


def _unflipped(weight: fx.Node) -> tuple[fx.Node, bool]:
    """A weight [K, N], or the weight [N, K] that it is the transpose of; whether it is the former."""
    if weight.target in (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default):
        value, turned = weight.meta["val"], args_of(weight)[0].meta["val"].mT
        if (value.shape, value.stride()) == (turned.shape, turned.stride()):  # not the identity of a square
            return args_of(weight)[0], False
    return weight, True


@joint_lowering
def join_products(graph: fx.Graph, gradients: bool) -> Iterator[tuple[str, str]]:
    """Products of the same few rows become one call, where no gradients are needed."""
    for nodes in [] if gradients else groups(graph):
        _join([found for node in nodes if (found := product_of(node)) is not None])
        together = f", {len(nodes)} products of the same rows in one call" if len(nodes) > 1 else ""
        yield "aten::linear", f"generated kernel: weights are read as they lie{together}"


def groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """Nodes that can be one call: products of the same rows whose operands are at the first what they are later."""
    by_rows: dict[fx.Node, list[Product]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (found := product_of(node)) is not None:
            by_rows.setdefault(found.rows, []).append(found)
    mutations, made = Mutations.of(graph), []
    for rows, products in by_rows.items():
        while products:
            first = products[0].node
            joined = [p for p in products if all(_same_before(n, first, p.node, mutations) for n in p.operands)]
            products = [p for p in products if p not in joined]
            weights = [p.weight.meta["val"] for p in joined]
            if suits(rows.meta["val"], [w.mT if p.flipped else w for p, w in zip(joined, weights, strict=True)]):
                made.append([p.node for p in joined])
    return made


def _same_before(operand: fx.Node, first: fx.Node, node: fx.Node, mutations: Mutations) -> bool:
    """Whether an operand of `node` exists at `first` already, and is not written to between them."""
    return operand < first and mutations.write_between(operand, first, node) is None


def _join(products: list[Product]) -> None:
    """Put one call before the first product, and its results in place of all."""
    first = products[0].node
    graph = first.graph

    def call(target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        made = graph.call_function(target, args)
        given = fx.node.map_arg(args, lambda n: n.meta["val"])
        with fake_mode_of_value(given):
            made.meta = {**like.meta, LOWERED: like.name, "val": target(*given)}
        return made

    with graph.inserting_before(first):
        weights = [call(aten.t.default, (p.weight,), p.node) if p.flipped else p.weight for p in products]
        given = (products[0].rows, weights, [p.bias for p in products])
        results = call(torch.ops.latent.gemv.default, given, first)
        made = [call(operator.getitem, (results, i), p.node) for i, p in enumerate(products)]
    for product, result in zip(products, made, strict=True):
        product.node.replace_all_uses_with(result)
        graph.erase_node(product.node)
