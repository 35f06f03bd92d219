"""What stands where a step of attention should: the reasons of near misses, found by looking past what no walk crosses.

Nothing here decides what is attention. Recognition asks when it has refused, so that the reason names the operator in
the way, and looks at products of activations that no softmax follows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import fx

from .axes import AxisSpace, Layout
from .contractions import Contraction, contraction
from .layouts import is_tensor, layout_step, shape_of
from .nodes import args_of
from .provenance import is_learned, operator_name
from .sites import Bias, Cast, Dropout, Fill, Gate, Miss, Scale
from .sizes import hints_near
from .walks import Refused, carriers, open_product, score_step, value_contraction, weight_step

__all__ = ["blocked_scores", "lost_weights", "without_softmax"]

NEAR = 24
"""Nodes looked at on either side."""

_LINEAR = (Scale, Bias, Fill, Cast, Gate, Dropout)
"""Steps that do not make weights of scores, as long as what they bring along is not made of the scores itself."""


def blocked_scores(scores: fx.Node) -> tuple[str, fx.Node] | None:
    """The operator between a product of queries and keys and the softmax that is no step of attention."""
    for node in _walk([scores], lambda node: [] if contraction(node) else carriers(node)):
        behind = _walk(node.all_input_nodes, lambda above: [] if contraction(above) else above.all_input_nodes)
        if not carriers(node) and not contraction(node) and any(map(_meets_activations, behind)):
            return f"the product of queries and keys goes through {_name(node)}, which is no step of attention", node
    return None


def lost_weights(weights: fx.Node, readers: Iterable[fx.Node]) -> Refused:
    """Why no product with values was found: `readers` are what the walk from the weights did not cross."""
    readers = list(readers)
    for reader in readers:
        below = _walk(reader.users, lambda node: [] if contraction(node) else node.users)
        if any(map(contraction, below)):
            return Refused(f"the weights go through {_name(reader)}, which is no step of attention", reader, 2)
    if readers and all(reader.op == "output" for reader in readers):
        reason = "the weights leave the graph (a graph break, or they are returned) before a product with values"
        return Refused(reason, weights, 1)
    return Refused("the weights are never multiplied with values", weights, 1)


def without_softmax(graph: fx.Graph, known: Collection[fx.Node]) -> Iterator[Miss]:
    """Products of queries and keys that reach a product with values through something else than a softmax.

    `known` are nodes that sites and misses account for. Only a step that is not linear in the scores counts: without
    one, two products in a row are just that.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node not in known and _meets_activations(node):
            product = contraction(node)
            assert product is not None
            steps = _steps_to_values(product, known)
            if steps:
                names = ", ".join(dict.fromkeys(map(_name, steps)))
                yield Miss(steps[-1], f"no softmax: the weights are made of the scores by {names}", steps[-1], 2)


def _steps_to_values(product: Contraction, known: Collection[fx.Node]) -> list[fx.Node]:
    """The steps, not linear in the scores, on the way to a product that sums over one side's axes; else none."""
    space = AxisSpace(hints_near(product.node))
    try:
        opened = open_product(product, space)
    except Refused:
        return []
    own = space.axes(opened.lhs) ^ space.axes(opened.rhs)
    walk = {product.node: opened.layout}
    """Everything made of the scores, with their axes where it still has them."""
    pending = [product.node]
    while pending and len(walk) < NEAR:
        carrier = pending.pop(0)
        for node in carrier.users:
            if node in known:
                return []
            found = value_contraction(node, carrier)
            if found is not None:
                summed = _summed(found, carrier, walk[carrier], space)
                values = found.rhs if found.lhs is carrier else found.lhs
                if summed and summed < own and values not in walk and not _is_weight(values):
                    return _nonlinear(carrier, walk)
            elif node not in walk and is_tensor(node) and not contraction(node):
                walk[node] = _moved(node, carrier, walk[carrier], space)
                pending.append(node)
    return []


def _moved(node: fx.Node, carrier: fx.Node, layout: Layout, space: AxisSpace) -> Layout:
    """The layout after a node; empty where the axes are lost."""
    step = layout_step(node)
    if step is not None and layout:
        return step.apply(space.resolve_layout(layout), space) or ()
    return layout if shape_of(node) == shape_of(carrier) else ()


def _summed(found: Contraction, carrier: fx.Node, layout: Layout, space: AxisSpace) -> frozenset[object]:
    labels = found.lhs_labels if found.lhs is carrier else found.rhs_labels
    if len(labels) != len(layout):
        return frozenset()
    return frozenset(space.axes(tuple(d for label, d in zip(labels, layout, strict=True) if label in found.summed)))


def _nonlinear(weights: fx.Node, walk: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes between scores and weights that are not linear in the scores, in order."""
    above = _walk([weights], lambda node: [given for given in node.all_input_nodes if given in walk])
    return [node for node in sorted(above) if not contraction(node) and not _is_linear(node, walk)]


def _is_linear(node: fx.Node, walk: Collection[fx.Node]) -> bool:
    if layout_step(node) is not None:
        return True
    made_of_scores = [given for given in node.all_input_nodes if given in walk]
    if len(made_of_scores) != 1:
        return False
    (scores,) = made_of_scores
    return all(isinstance(step, _LINEAR) for step in score_step(node, scores) or (weight_step(node, scores),))


def _meets_activations(node: fx.Node) -> bool:
    """Whether a node is a product of two tensors that are not weights."""
    found = contraction(node) if node.target is not torch.ops.aten.linear.default else None
    return found is not None and bool(found.summed) and not (_is_weight(found.lhs) or _is_weight(found.rhs))


def _is_weight(node: fx.Node) -> bool:
    while (step := layout_step(node)) is not None:
        node = step.source
    return is_learned(node)


def _walk(start: Iterable[fx.Node], onwards: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Breadth first from the start, `NEAR` nodes at most."""
    pending = list(dict.fromkeys(start))
    seen = set(pending)
    for _ in range(NEAR):
        if not pending:
            return
        node = pending.pop(0)
        yield node
        new = [other for other in onwards(node) if other not in seen]
        seen.update(new)
        pending += new


def _name(node: fx.Node) -> str:
    name, inputs = operator_name(node), args_of(node)[:2]
    return f"{name} by itself" if len(inputs) == 2 and inputs[0] is inputs[1] else name
