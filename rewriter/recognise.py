"""Recognition: from every softmax outwards, by what the data flow computes. Read-only.

    climb      from the softmax's input up to the product q·k, remembering the path
    descend    from the product down that path with the layout in hand: which axis is which, which step is what
    follow     from the weights down to the product with the values
    assemble   give every axis its role, or say which axis is wrong

A softmax over the wrong axis, or weights contracted over another axis than the softmax normalised, is refused by
construction, with the axis named.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from .assemble import softmax_site
from .axes import AxisSpace
from .call_sites import call_site
from .contractions import contraction
from .layouts import is_tensor, shape_of
from .masks.prove import MaskReader
from .masks_of_site import prove_masks
from .near_misses import blocked_scores, without_softmax
from .registry import patterns
from .sites import AttentionSite, Miss, Recognition, Scale, Sink, SoftmaxSpelling
from .sizes import hints_near
from .walks import Path, Refused, climb, descend, follow, open_product, second_terms


def recognise(graph: fx.Graph) -> Recognition:
    """Every softmax and attention call of a graph, as a site or as a miss with its reason, and products without one."""
    reader = MaskReader(graph)
    sites: list[AttentionSite] = []
    misses: list[Miss] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in taken:
            continue
        found = recognise_at(node, reader)
        if isinstance(found, AttentionSite):
            sites.append(found)
            taken.update(found.region)
        elif isinstance(found, Miss):
            misses.append(found)
    known = {*taken, *(miss.anchor for miss in misses)}
    misses += without_softmax(graph, known)
    return Recognition(tuple(sites), tuple(misses))


def recognise_at(node: fx.Node, reader: MaskReader) -> AttentionSite | Miss | None:
    """The site or miss anchored at one node; None when the node is no anchor."""
    found = _recognise_anchor(node)
    return replace(found, masks=prove_masks(found, reader)) if isinstance(found, AttentionSite) else found


def _recognise_anchor(node: fx.Node) -> AttentionSite | Miss | None:
    for read_call in patterns("call"):
        if (call := read_call(node)) is not None:
            return call_site(call, AxisSpace(hints_near(node)))
    for read_softmax in patterns("softmax"):
        spelling = read_softmax(node)
        if spelling is not None and is_tensor(spelling.scores):
            return _recognise_softmax(spelling)
    return None


def _recognise_softmax(spelling: SoftmaxSpelling) -> AttentionSite | Miss:
    if not shape_of(spelling.scores):
        return Miss(spelling.anchor, "the softmax runs over a single number", spelling.anchor)
    paths = climb(spelling.scores)
    if not paths:
        valued = _reaches_product(spelling)
        nothing = "the scores do not come from a product of queries and keys", spelling.scores
        reason, node = blocked_scores(spelling.scores) or nothing
        return Miss(spelling.anchor, reason, node, 1 if valued else 0)
    found: list[AttentionSite] = []
    refusals: list[Refused] = []
    for path in paths:
        try:
            found.append(_follow_candidate(spelling, path))
        except Refused as refusal:
            refusals.append(refusal)
    if found:
        return min(found, key=_unevenness)
    best = max(refusals, key=lambda refusal: refusal.reached)
    reached = 2 if best.reached >= 2 else 1 if best.reached else 0
    return Miss(spelling.anchor, best.reason, best.node, reached)  # type: ignore[arg-type]


def _unevenness(site: AttentionSite) -> int:
    """Axes that only one of keys and values has: the true keys are those indexed like the values."""
    keys = site.space.axes(*(term.key.layout for term in site.terms))
    values = site.space.axes(site.value.layout)
    return len(keys ^ values) - len(site.terms)


def _reaches_product(spelling: SoftmaxSpelling) -> bool:
    """Whether the weights of a softmax are contracted with something over the normalised dimension."""
    space = AxisSpace(hints_near(spelling.scores))
    shape = shape_of(spelling.weights)
    layout = space.fresh_layout([f"x{i}" for i in range(len(shape))], shape)
    products, _ = follow(spelling.weights, layout, space)
    for product in products:
        labels = product.contraction.lhs_labels if product.weights_are_lhs else product.contraction.rhs_labels
        summed = product.contraction.summed
        dims = [dim for label, dim in zip(labels, product.weights, strict=True) if label in summed]
        if any(space.same(dim, layout[spelling.dim]) for dim in dims):
            return True
    return False


def _follow_candidate(spelling: SoftmaxSpelling, path: Path) -> AttentionSite:
    """The site of one softmax and one score product. Raises Refused."""
    space = AxisSpace(hints_near(spelling.scores))
    found = contraction(path[0])
    assert found is not None
    if not found.summed:
        raise Refused("the score product sums over nothing", path[0])
    product = descend(open_product(found, space), path, space)
    if spelling.base != 1.0:
        product = replace(product, steps=(*product.steps, Scale(spelling.anchor, spelling.base)))
    if spelling.sink is not None:
        product = replace(product, steps=(*product.steps, Sink(spelling.anchor, spelling.sink)))
    extra = second_terms(product, space)
    products, readers = follow(spelling.weights, product.layout, space)
    return softmax_site(spelling, product, extra, products, readers, space)
