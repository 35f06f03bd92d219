"""The walks of recognition: climb to the score product, descend with the layout, follow the weights. Read-only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from torch import fx

from .axes import AxisSpace, Dim, Layout, same_size
from .contractions import Contraction, contraction
from .layouts import Part, is_tensor, layout_step, shape_of
from .registry import patterns
from .scalars import read_scalar
from .sites import Bias, Cast, Fill, Gate, Scale, ScoreStep, Sink, WeightStep

MAX_PATHS = 8
"""Score products tried for one softmax: sums of several products (relative positions) offer more than one."""

Path = tuple[fx.Node, ...]


class Refused(Exception):
    """This candidate is not attention: the reason in words, the node, and how far it got."""

    def __init__(self, reason: str, node: fx.Node, reached: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.node, self.reached = reason, node, reached


# ------------------------------------------------------------------ climb


def climb(node: fx.Node) -> list[Path]:
    """Paths (product, ..., node) along which `node` carries the scores of a product, the most direct first."""
    memo: dict[fx.Node, list[Path]] = {}
    pending = [node]
    while pending:  # depth first without recursion: long chains of masks are common
        top = pending[-1]
        if top in memo:
            pending.pop()
            continue
        sources = [] if contraction(top) else carriers(top)
        waiting = [carrier for carrier in sources if carrier not in memo]
        if waiting:
            pending.extend(waiting)
            continue
        pending.pop()
        if contraction(top):
            memo[top] = [(top,)]
        else:
            paths = itertools.chain.from_iterable(memo[carrier] for carrier in sources)
            memo[top] = sorted(((*path, top) for path in paths), key=len)[:MAX_PATHS]
    return memo[node]


def carriers(node: fx.Node) -> list[fx.Node]:
    """The inputs of `node` that it may pass on as scores."""
    if node.op != "call_function" or not is_tensor(node):
        return []
    step = layout_step(node)
    if step is not None:
        return [step.source]
    return [operand for operand in node.all_input_nodes if is_tensor(operand) and score_step(node, operand)]


def score_step(node: fx.Node, scores: fx.Node) -> tuple[ScoreStep, ...]:
    """What a node does to the scores it reads; empty when no pattern knows it."""
    for read in patterns("score_step"):
        if (step := read(node, scores)) is not None:
            return step if isinstance(step, tuple) else (step,)
    return ()


def weight_step(node: fx.Node, weights: fx.Node) -> WeightStep | None:
    for read in patterns("weight_step"):
        if (step := read(node, weights)) is not None:
            return step  # type: ignore[no-any-return]
    return None


# ------------------------------------------------------------------ descend


@dataclass(frozen=True)
class Product:
    """A score product with the layouts of its operands and the scores' layout where the walk has got to."""

    contraction: Contraction
    lhs: Layout
    rhs: Layout
    summed: Dim
    layout: Layout
    steps: tuple[ScoreStep, ...] = ()
    path: Path = ()


def open_product(found: Contraction, space: AxisSpace) -> Product:
    """Fresh axes for every label of a score product."""
    sizes = {}
    for labels, shape in (
        (found.lhs_labels, shape_of(found.lhs)),
        (found.rhs_labels, shape_of(found.rhs)),
    ):
        sizes.update({label: size for label, size in zip(labels, shape, strict=True) if label})
    dims = {label: space.fresh(label, size) for label, size in sizes.items()}

    def layout(labels: tuple[str | None, ...]) -> Layout:
        return tuple(dims[label] if label else () for label in labels)

    summed = tuple(axis for label in sorted(found.summed) for axis in dims[label])
    steps: tuple[ScoreStep, ...] = ()
    if found.addend is not None or found.alpha != 1.0:
        steps = _fused_addend(found, layout(found.out_labels))
    return Product(
        found,
        layout(found.lhs_labels),
        layout(found.rhs_labels),
        summed,
        layout(found.out_labels),
        steps,
        (found.node,),
    )


def _fused_addend(found: Contraction, layout: Layout) -> tuple[ScoreStep, ...]:
    """baddbmm(addend, q, k, beta, alpha) = alpha q·k + beta addend."""
    alpha, beta = read_scalar(found.alpha), read_scalar(found.beta)
    if beta is None:
        raise Refused("the factor of what is added to the score product is not a known number", found.node)
    steps: list[ScoreStep] = []
    if alpha is None:
        steps.append(Scale(found.node, by=found.alpha))  # type: ignore[arg-type]
    elif alpha != 1.0:
        steps.append(Scale(found.node, alpha))
    if beta != 0.0 and found.addend is not None:
        steps.append(Bias(found.node, found.addend, beta, operand_layout(found.addend, layout)))
    return tuple(steps)


def operand_layout(operand: fx.Node, layout: Layout) -> Layout:
    """The layout of the other operand of an elementwise operator, aligned from the right; size 1 is broadcast."""
    shape = shape_of(operand) if is_tensor(operand) else ()  # a symbolic number has no dimensions
    aligned = layout[len(layout) - len(shape) :] if shape else ()
    return tuple(() if same_size(size, 1) else dim for size, dim in zip(shape, aligned, strict=True))


def descend(product: Product, path: Path, space: AxisSpace) -> Product:
    """Walk from the product along `path`, taking the layout and the steps along."""
    for carrier, node in itertools.pairwise(path):
        layout = product.layout
        step = layout_step(node)
        if step is not None and step.source is carrier:
            moved = step.apply(space.resolve_layout(layout), space)
            if moved is None:
                part = " a part of" if isinstance(step, Part) else ""
                raise Refused(f"the scores are reshaped or cut ({node.target} takes{part} an axis)", node, 1)
            product = replace(product, layout=moved)
            continue
        changes = score_step(node, carrier)
        if not changes:
            raise Refused(f"the scores pass through {node.target}, which is not a step of attention", node, 1)
        for change in changes:
            if isinstance(change, Sink):
                change, layout = _open_sink(change, layout, space)
            else:
                layout = _broadcast_layout(node, layout, space)
                change = _with_layout(change, layout)
            product = replace(product, layout=layout, steps=(*product.steps, change))
    return replace(product, path=path)


def _broadcast_layout(node: fx.Node, layout: Layout, space: AxisSpace) -> Layout:
    """The scores' layout after an elementwise operator whose other operand may be larger."""
    shape = shape_of(node)
    aligned = ((),) * (len(shape) - len(layout)) + layout
    return tuple(
        dim if dim or same_size(size, 1) else space.fresh("x", size) for dim, size in zip(aligned, shape, strict=True)
    )


def _with_layout(step: ScoreStep, layout: Layout) -> ScoreStep:
    match step:
        case Bias(bias=fx.Node() as operand):
            return replace(step, layout=operand_layout(operand, layout))
        case Scale(by=fx.Node() as operand):
            return replace(step, layout=operand_layout(operand, layout))
        case Fill(condition=operand):
            return replace(step, layout=operand_layout(operand, layout))
        case _:
            return step


def _open_sink(step: Sink, layout: Layout, space: AxisSpace) -> tuple[Sink, Layout]:
    """The key axis becomes a sum: keys plus sinks."""
    at = step.dim
    assert at is not None
    extra = space.fresh("sink", step.count)
    parts = (extra, layout[at]) if step.first else (layout[at], extra)
    joined = space.join("keys+sink", parts)
    if isinstance(step.sink, fx.Node):
        others = operand_layout(step.sink, layout)
        step = replace(step, layout=(*others[:at], extra, *others[at + 1 :]))
    return step, (*layout[:at], joined, *layout[at + 1 :])


# ------------------------------------------------------------------ follow


@dataclass(frozen=True)
class ValueProduct:
    """The product of weights and values, the way to it, and the site's output."""

    contraction: Contraction
    weights: Layout
    weights_are_lhs: bool
    steps: tuple[WeightStep, ...]
    path: Path


def value_contraction(node: fx.Node, carrier: fx.Node) -> Contraction | None:
    """`node`, or the sum that reads it, as a product of the weights with something."""
    for reader in (node, *node.users):
        found = contraction(reader)
        if found is not None and carrier in (found.lhs, found.rhs) and found.addend is None:
            return found
    return None


def follow(weights: fx.Node, layout: Layout, space: AxisSpace) -> tuple[list[ValueProduct], list[fx.Node]]:
    """Products that the weights reach, and other readers of the weights."""
    products: list[ValueProduct] = []
    readers: list[fx.Node] = []
    pending: list[tuple[fx.Node, Layout, tuple[WeightStep, ...], Path]] = [(weights, layout, (), ())]
    while pending:
        carrier, current, steps, path = pending.pop(0)
        for node in carrier.users:
            found = value_contraction(node, carrier)
            if found is not None:
                products.append(ValueProduct(found, current, found.lhs is carrier, steps, path))
                continue
            step = layout_step(node)
            if step is not None and step.source is carrier:
                moved = step.apply(space.resolve_layout(current), space)
                if moved is None:
                    readers.append(node)
                else:
                    pending.append((node, moved, steps, (*path, node)))
                continue
            change = weight_step(node, carrier) if is_tensor(node) else None
            if change is None:
                readers.append(node)
                continue
            wider = _broadcast_layout(node, current, space)
            if isinstance(change, Gate):
                change = replace(change, layout=operand_layout(change.by, wider))
            pending.append((node, wider, (*steps, change), (*path, node)))
    return products, readers


def second_terms(product: Product, space: AxisSpace) -> dict[fx.Node, tuple[Product, float]]:
    """Biases that are products of queries and keys themselves: q·k = q1·k1 + q2·k2 (absorbed latent attention).

    Each comes with its factor relative to the first product, whose scale so far it does not share.
    """
    terms: dict[fx.Node, tuple[Product, float]] = {}
    scale = 1.0
    for step in product.steps:
        if isinstance(step, Scale):
            if step.by is not None:
                break
            scale *= step.factor
        elif isinstance(step, Bias) and isinstance(step.bias, fx.Node):
            term = _second_term(step, step.bias, space)
            if term is not None and scale:
                terms[step.node] = term, step.factor / scale
        elif not isinstance(step, Cast):
            break
    return terms


def _second_term(step: Bias, bias: fx.Node, space: AxisSpace) -> Product | None:
    for path in climb(bias)[:1]:
        found = contraction(path[0])
        if found is None or not found.summed:
            return None
        try:
            term = descend(open_product(found, space), path, space)
        except Refused:
            return None
        plain = all(isinstance(change, Scale | Cast) and getattr(change, "by", None) is None for change in term.steps)
        full = len(term.layout) == len(step.layout) and all(
            bool(a) == bool(space.resolve(b))
            for a, b in zip(space.resolve_layout(step.layout), term.layout, strict=True)
        )
        if plain and full and all(space.unify(a, b) for a, b in zip(step.layout, term.layout, strict=True)):
            return term
    return None
