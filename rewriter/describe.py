"""Sites in words: the equation, the shape, the mask, and where the tensors come from."""

from __future__ import annotations

from dataclasses import dataclass

from .axes import Axis, Layout, size_of
from .layouts import is_tensor
from .score_form import Unusual, score_form
from .sites import AttentionSite, Bias, Fill, Operand, ScoreTerm


def equation(site: AttentionSite) -> str:
    """softmax_j( scale · q[b h i d] k[b h j d] + mask[i j] ) v[b h j e]."""
    names = {**{axis: "d" for term in site.terms for axis in _width(site, term)}, **site.axes.roles()}

    def indices(layout: Layout, lacking: bool = False) -> str:
        return " ".join(names.get(axis, axis.name) for dim in site.space.resolve_layout(layout) for axis in dim)

    def source(operand: Operand) -> str:
        repeated = [
            names.get(axis, axis.name)
            for axis in site.axes.groups
            if axis in site.space.axes(operand.layout) and axis not in site.space.axes(operand.chain[-1][1])
        ]
        kept = [
            names.get(axis, axis.name) + (f"({' '.join(repeated)})" if axis in site.axes.heads and repeated else "")
            for dim in site.space.resolve_layout(operand.layout)
            for axis in dim
            if names.get(axis, axis.name) not in repeated
        ]
        return " ".join(kept)

    several = len(site.terms) > 1
    products = " + ".join(
        f"q{n + 1 if several else ''}[{indices(term.query.layout)}] k{n + 1 if several else ''}[{source(term.key)}]"
        for n, term in enumerate(site.terms)
    )
    form = score_form(site)
    if isinstance(form, Unusual):
        inside = f"… {products} …"
    else:
        scale = (
            ""
            if form.scale == 1.0 and not form.scale_by
            else f"{form.scale:.4g} · "
            if not form.scale_by
            else "scale · "
        )
        inside = f"{scale}{f'({products})' if several and scale else products}"
        if form.cap is not None:
            inside = f"{form.cap:g} tanh( {inside} / {form.cap:g} )"
        for step in form.masks:
            if isinstance(step, Fill | Bias):
                inside += f" + {'mask' if isinstance(step, Fill) else 'bias'}[{indices(step.layout)}]"
        if form.sinks:
            inside += f" ⊕ sink[{indices(form.sinks[0].layout)}]"
    if site.call is not None and site.call.causal:
        inside += " + causal[i j]"
    return f"softmax_j( {inside} ) v[{source(site.value)}]"


def _width(site: AttentionSite, term: ScoreTerm) -> frozenset[Axis]:
    query, key = term.query.layout, term.key.layout
    outer = set(site.axes.roles())
    return (site.space.axes(query) & site.space.axes(key)) - outer


@dataclass(frozen=True)
class Shape:
    """Sizes of a site, for a table."""

    heads: str
    groups: str
    queries: str
    keys: str
    width: str
    value_width: str
    dtype: str
    batch: str = "1"


def shape(site: AttentionSite) -> Shape:
    from .canonical import width_of

    axes = site.axes
    widths = sum((size_of(width_of(site, n)) for n in range(len(site.terms))), 0)
    dtype = site.query.node.meta["val"].dtype if is_tensor(site.query.node) else "?"
    return Shape(
        str(size_of(axes.heads + axes.groups)),
        str(size_of(axes.groups)),
        str(size_of(axes.queries)),
        str(size_of(axes.keys)),
        str(widths),
        str(size_of(axes.value_width)),
        str(dtype).replace("torch.", ""),
        str(size_of(axes.batch)),
    )
