"""The steps from q·k to the softmax, in the one order that a fused attention computes them: scale, soft cap, masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from .axes import AxisSpace, Layout
from .compat import guarded_number
from .layouts import is_tensor
from .roles import peel
from .sites import (
    AttentionSite,
    Bias,
    Blend,
    Cast,
    Dropout,
    Fill,
    Gate,
    Inexact,
    Scale,
    ScoreStep,
    Sink,
    Tanh,
)

HIDES = -1e8
"""Fills below this vanish beside any score, in a row that is hidden altogether too: x + fill rounds to fill."""


@dataclass(frozen=True)
class ScoreForm:
    """softmax( masks( cap · tanh(scale · q·k / cap) ) ), with tensors that scale the query or the key."""

    scale: float = 1.0
    scale_by: tuple[Scale, ...] = ()
    cap: float | None = None
    masks: tuple[Bias | Fill | Scale, ...] = ()
    """Biases and fills in order; a scale among them multiplies the biases before it."""

    sinks: tuple[Sink, ...] = ()


@dataclass(frozen=True)
class Unusual:
    """Steps that are no such form: the reason and the node."""

    reason: str
    node: fx.Node


def score_form(site: AttentionSite) -> ScoreForm | Unusual:
    """The steps of a site in normal order, or what is unusual about them."""
    scale, cap = 1.0, 1.0
    scale_by: list[Scale] = []
    masks: list[Bias | Fill | Scale] = []
    sinks: list[Sink] = []
    capped = False
    with_cap = any(isinstance(step, Tanh) for step in site.steps)
    for position, step in enumerate(site.steps):
        if with_cap and isinstance(step, Scale):
            step = _with_number(step)
        match step:
            case Cast():
                continue
            case Scale() if sinks:
                return Unusual("the scores are scaled after a sink was appended", step.node)
            case Scale(by=None):
                if capped:
                    cap *= step.factor
                else:
                    scale *= step.factor
                if masks:
                    masks.append(step)
            case Scale():
                if capped:
                    return Unusual("a soft cap is scaled by what only running the graph tells", step.node)
                if reason := _not_separable(step, site):
                    return Unusual(reason, step.node)
                scale_by.append(step)
                if masks:
                    masks.append(step)
            case Tanh():
                if capped or masks or sinks:
                    return Unusual("tanh is applied to masked scores", step.node)
                capped = True
            case Bias() if _ignored(step, site, site.steps[position + 1 :]):
                continue
            case Bias() | Fill():
                if sinks:
                    return Unusual("the scores are masked after a sink was appended", step.node)
                masks.append(step)
            case Sink():
                if step.dim is None and _shifted(site, position):
                    return Unusual("a sink stands in the denominator, and the scores are shifted", step.node)
                sinks.append(step)
            case Blend():
                return Unusual("the mask is multiplied in and its numbers need not be zeros and ones", step.node)
            case _:
                return Unusual(f"{step.node.target} is no step of a fused attention", step.node)
    if capped and cap == 0.0:
        return Unusual("the soft cap is 0", next(step.node for step in site.steps if isinstance(step, Tanh)))
    # tanh(a x) b = cap tanh(scale x / cap), scale = a b, cap = |b|: the right side is the same for cap and -cap
    scale *= cap
    return ScoreForm(scale, tuple(scale_by), abs(cap) if capped else None, tuple(masks), tuple(sinks))


def _with_number(step: Scale) -> Scale:
    """The step with the number behind a symbol: a fused operator takes its cap as a number. Adds a guard."""
    if step.by is None or is_tensor(step.by):
        return step
    number = guarded_number(step.by.meta["val"])
    if number is None or (step.divide and not number):
        return step
    return replace(step, by=None, factor=1.0 / number if step.divide else number)


def readable_sinks(scores: ScoreForm, site: AttentionSite) -> Unusual | None:
    """What keeps sinks from being one score for each head, or None."""
    for step in scores.sinks:
        if len(scores.sinks) > 1 or step.count != 1:
            return Unusual("more than one sink takes part in the softmax", step.node)
        if isinstance(step.sink, fx.Node) and sink_of_heads(step, site) is None:
            return Unusual("the sinks differ from token to token", step.node)
    return None


def sink_of_heads(step: Sink, site: AttentionSite) -> tuple[fx.Node, Layout] | None:
    """The tensor that sinks were expanded from, where nothing but the head tells its elements apart."""
    heads = {*site.axes.heads, *site.axes.groups}
    assert isinstance(step.sink, fx.Node)
    chain = peel(step.sink, step.layout, site.space).chain
    return next(((node, layout) for node, layout in chain if site.space.axes(layout) <= heads), None)


def unusual_weights(site: AttentionSite) -> Unusual | None:
    """What keeps the weights from being left inside a fused operator, or None."""
    if site.weight_readers:
        return Unusual("the attention weights are read by something else too", site.weight_readers[0])
    if site.call is not None and site.call.dropout:
        return Unusual("dropout of the weights is active", site.call.anchor)
    for step in site.weight_steps:
        match step:
            case Inexact():
                return Unusual(step.reason, step.node)
            case Gate():
                return Unusual("the attention weights are multiplied by a tensor after the softmax", step.node)
            case Dropout(p=p) if p:
                return Unusual("dropout of the weights is active; a fused operator would draw other numbers", step.node)
            case Dropout() | Cast():
                continue
            case _:
                return Unusual("rows without a visible key are set to zero after the softmax", step.node)
    return None


def _shifted(site: AttentionSite, end: int) -> bool:
    """Whether one of the first steps adds to all keys alike, such as a subtracted maximum."""
    keys, space = set(site.axes.keys), site.space
    return any(isinstance(step, Bias) and not space.axes(step.layout) & keys for step in site.steps[:end])


def _ignored(step: Bias, site: AttentionSite, later: tuple[ScoreStep, ...]) -> bool:
    """Softmax ignores what is added to every key alike, such as a subtracted maximum."""
    keys = set(site.axes.keys)

    def keeps(s: ScoreStep) -> bool:
        if isinstance(s, Scale):
            return not site.space.axes(s.layout) & keys
        return isinstance(s, Bias | Cast) or (isinstance(s, Fill) and s.value <= HIDES)

    return all(keeps(s) for s in later) and not site.space.axes(step.layout) & keys


def _not_separable(step: Scale, site: AttentionSite) -> str | None:
    assert step.by is not None
    if not is_tensor(step.by):
        return None
    space = site.space
    axes = space.axes(step.layout)
    if not axes & set(site.axes.keys):
        return None
    if axes & set(site.axes.queries) or not axes <= space.axes(site.key.layout):
        return "the scores are multiplied by a tensor that varies over queries and keys"
    return None


def key_scaling(step: Scale, site: AttentionSite, space: AxisSpace) -> bool:
    """Whether a tensor scale belongs to the key."""
    return bool(space.axes(step.layout) & set(site.axes.keys))
