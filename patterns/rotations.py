"""Rotary positions: pairs of the width, turned by an angle, spelling by spelling.

How the elements are paired is read in `pairs`.
"""

from __future__ import annotations

import torch
from torch import fx

from ..rewriter.axes import same_size
from ..rewriter.contractions import contraction
from ..rewriter.layouts import Part, View, is_cast, is_tensor, layout_step, shape_of
from ..rewriter.origins.pieces import Found, Reading, Rope
from ..rewriter.origins.walk import DEPTH, find_producer
from ..rewriter.registry import pattern
from .pairs import function_of, rotation_form
from .weights import uncast

aten = torch.ops.aten

_MUL = {aten.mul.Tensor, aten.mul_.Tensor, aten.multiply.Tensor}
_ADD = {aten.add.Tensor, aten.add_.Tensor}
_SUB = {aten.sub.Tensor, aten.sub_.Tensor}
_JOINS = {aten.cat.default, aten.concat.default, aten.stack.default}
_GATHERS = {aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.flip.default, aten.roll.default}
CHAIN = 8
"""Operations between a tensor and its use in a rotation."""


# ** forms **


# Later registrations are asked first: the reading that needs evidence of an angle is the last resort.


@pattern("producer")
def rope_opaque(node: fx.Node, reading: Reading) -> Found | None:
    """x cos(a) + f(x) sin(a), where f is not followed (a gather, a product with a matrix)."""
    if node.target not in _ADD | _SUB:
        return None
    terms = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and arg.target in _MUL]
    if len(terms) != 2:
        return None
    for with_cos, with_sin in (terms, terms[::-1]):
        for x, cos in _sides(with_cos):
            for turned, sin in _sides(with_sin):
                if function_of(cos) != "cos" or function_of(sin) != "sin" or uncast(turned) is uncast(x):
                    continue
                if shape_of(x) == shape_of(node) == shape_of(turned) and _rearranged(turned, uncast(x)):
                    return Found(Rope(node, "other", shape_of(x)[-1], angles=(cos, sin)), x)
    return None


@pattern("producer")
def rope_real(node: fx.Node, reading: Reading) -> Found | None:
    """x cos + rotate(x) sin; join(x₁ cos - x₂ sin, x₂ cos + x₁ sin)."""
    if node.target not in _ADD | _SUB | _JOINS | {aten.addcmul.default} and not isinstance(layout_step(node), View):
        return None
    products = _products(node)
    rope: Rope | None = None
    source: fx.Node | None = None
    for base in _bases(products) if products else ():
        # A tensor further up of the same shape counts where its elements were rearranged since.
        if source is not None and shape_of(base) != shape_of(source):
            continue
        form = rotation_form(node, base)
        if form is not None and (rope is None or form[0] != rope.form):
            rope, source = Rope(node, form[0], shape_of(base)[-1], angles=form[1]), base
    return None if rope is None else Found(rope, source)


@pattern("producer")
def rope_complex(node: fx.Node, reading: Reading) -> Found | None:
    """view_as_real(view_as_complex(x) · turns)."""
    if node.target is not aten.view_as_real.default:
        return None
    times = node.args[0]
    if not isinstance(times, fx.Node) or times.target not in _MUL:
        return None
    for one, turns in _sides(times):
        one = uncast(one)
        if one.target is aten.view_as_complex.default and isinstance(one.args[0], fx.Node):
            width = shape_of(one)[-1] * 2
            return Found(Rope(node, "complex", width, angles=(turns,)), one.args[0])
    return None


@pattern("producer")
def rope_partial(node: fx.Node, reading: Reading) -> Found | None:
    """cat([x[.., :r] rotated, x[.., r:]]), in any order: a part of the width is rotated."""
    if node.target not in _JOINS or node.target is aten.stack.default or reading.depth > DEPTH:
        return None
    last = len(shape_of(node)) - 1
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if int(dim) % (last + 1) != last:  # type: ignore[arg-type]
        return None
    tensors = [t for t in node.args[0] if not same_size(shape_of(t)[last], 0)]  # type: ignore[union-attr, arg-type]
    if len(tensors) == 1:
        return Found(None, tensors[0])  # type: ignore[arg-type]
    below = Reading(node, depth=reading.depth + 1)
    whole: fx.Node | None = None
    rope: Rope | None = None
    position = 0
    offset = 0
    for tensor in tensors:
        turned, source = _rotated(tensor, below)  # type: ignore[arg-type]
        step = layout_step(source)
        width = shape_of(tensor)[last]  # type: ignore[arg-type]
        if not isinstance(step, Part) or step.drop or step.dim != last or (whole or step.source) is not step.source:
            return None
        if not same_size(step.start, offset) or not same_size(step.length, width):
            return None
        if turned is not None:
            if rope is not None:
                return None
            rope, position = turned, offset
        whole = step.source
        offset = offset + width
    if rope is None or whole is None or not same_size(offset, shape_of(whole)[last]):
        return None
    return Found(Rope(node, rope.form, rope.width, True, position, rope.angles), whole)


def _rotated(node: fx.Node, reading: Reading) -> tuple[Rope | None, fx.Node]:
    """The rotation that makes a part, if one does, and the slice below it."""
    rope: Rope | None = None
    for _ in range(2 * CHAIN):
        found = find_producer(node, reading) if rope is None else None
        if found is not None and isinstance(found.piece, Rope) and found.source is not None and not found.piece.partial:
            rope, node = found.piece, found.source
            continue
        step = layout_step(node)
        if isinstance(step, View) or (step is None and is_cast(node)):
            node = step.source if step is not None else node.args[0]  # type: ignore[assignment]
            continue
        break
    return rope, node


# ** the way from a rotation to what it rotates **


def _products(node: fx.Node) -> list[fx.Node]:
    """The products that a sum or join is made of, the first found first."""
    found: list[fx.Node] = []
    pending, seen = [node], {node}
    while pending and len(seen) < 32:
        top = pending.pop()
        if top.target in _MUL:
            found.append(top)
            continue
        if top.target in _ADD | _SUB | _JOINS | {aten.addcmul.default} or is_cast(top):
            given = [n for n in top.all_input_nodes if is_tensor(n)]
        else:
            step = layout_step(top)
            given = [step.source] if isinstance(step, View) else []
        fresh = [n for n in given if n not in seen]
        seen.update(fresh)
        pending.extend(reversed(fresh))
    return found if len(found) >= 2 else []


def _bases(products: list[fx.Node]) -> list[fx.Node]:
    """Tensors that the rotated one may be: what all products read, the nearest first."""
    common = _reached(products[0])
    for product in products[1:]:
        others = set(_reached(product))
        common = [node for node in common if node in others]
    return common


def _reached(product: fx.Node) -> list[fx.Node]:
    """What the factors of a product are made of by moving elements."""
    found: list[fx.Node] = []
    for start in product.all_input_nodes[:2]:
        node: object = start
        for _ in range(CHAIN):
            if not isinstance(node, fx.Node) or not is_tensor(node) or not shape_of(node):
                break
            if node not in found:
                found.append(node)
            step = layout_step(node)
            if step is not None:
                node = step.source
            elif node.target in _JOINS and isinstance(node.args[0], list | tuple):
                node = node.args[0][0]
            elif is_cast(node) or node.target in (aten.slice.Tensor, aten.neg.default):
                node = node.args[0]
            else:
                break
    return found


def _sides(product: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    a, b = product.args[:2]
    return [(a, b), (b, a)] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []


def _rearranged(turned: fx.Node, source: fx.Node) -> bool:
    """Whether a tensor is made of `source` by gathers or products with matrices, besides what can be followed."""
    pending, seen, gathered = [turned], {turned}, False
    while pending and len(seen) < 2 * CHAIN:
        top = pending.pop()
        if top is source:
            return gathered
        step = layout_step(top)
        if top.target in _GATHERS or contraction(top) is not None:
            gathered = True
        elif step is None and not is_cast(top) and top.target not in _JOINS | {aten.neg.default, aten.slice.Tensor}:
            continue
        fresh = [n for n in top.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False
