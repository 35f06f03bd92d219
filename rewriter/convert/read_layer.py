"""One attention as weights: its projections, norms and rotation, read off from unit vectors.

A site of a graph says where queries, keys and values come from; each projection is run on unit vectors, whatever it is
made of, so that merged, scaled and reordered weights are read alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..axes import Dim, flat, size_of
from ..canonical import width_of
from ..layouts import layout_step
from ..origins.low_rank import low_rank
from ..origins.pieces import Norm, Origin, PositionScale, Projection, Reading, Rope, origins
from ..origins.walk import find_producer
from ..provenance import module_path
from ..score_form import ScoreForm, readable_sinks, score_form, sink_of_heads, unusual_weights
from ..sites import AttentionSite, Operand
from .layers import (
    Affine,
    AngleFacts,
    AttentionLayer,
    CallForm,
    ConversionRefused,
    HeadNormFacts,
    QueryScaleFacts,
    Rotary,
)
from .linear_maps import Function, affine_map, arranged, part_of, without_biases
from .norms import read_norm
from .own_angles import fitted_angles
from .positions import by_position, of_own_tokens
from .query_scale import steps_of
from .read_output import read_output

__all__ = ["LayerReader"]

ENOUGH = 1 << 15
"""Positions that tell the frequencies of angles."""


class LayerReader:
    """One site, read off as weights."""

    def __init__(
        self, gm: fx.GraphModule, site: AttentionSite, inputs: dict[fx.Node, Any], positions: int = 4096
    ) -> None:
        self.gm, self.site, self.inputs, self.positions = gm, site, inputs, positions
        self.path = module_path(site.anchor)
        self.origins = origins(site)

    def refuse(self, reason: str, todo: str = "") -> ConversionRefused:
        return ConversionRefused(self.path or "the model", reason, todo)

    def layer(self) -> AttentionLayer:
        site, found = self.site, self.origins
        if (latent := low_rank(site, found=found)) is not None:
            raise self.refuse(
                f"its keys and values are made of a latent of {latent.width} numbers already",
                "If its cache holds the keys of every head all the same, latent.LatentCache(model) keeps the latent.",
            )
        scores, weights = score_form(site), unusual_weights(site)
        if not isinstance(scores, ScoreForm):
            raise self.refuse(scores.reason)
        if weights is not None:
            raise self.refuse(weights.reason)
        if len(site.terms) != 1:
            raise self.refuse("its scores are a sum of several products")
        if scores.scale_by:
            raise self.refuse("its scores are scaled by a tensor")
        if (unreadable := readable_sinks(scores, site)) is not None:
            raise self.refuse(unreadable.reason)
        if not scores.masks and not (site.call is not None and (site.call.causal or site.call.mask is not None)):
            raise self.refuse("its queries see the keys that follow them, as in an encoder")
        scale = scores.scale
        if site.call is not None:
            scale = site.call.scale if isinstance(site.call.scale, float) else size_of(width_of(site)) ** -0.5
            scores = replace(scores, cap=site.call.cap or scores.cap)
        sources = [self._source(origin, which) for which, origin in self._named()]
        if len(set(sources)) != 1:
            raise self.refuse("queries, keys and values are not made of the same hidden states")
        source = sources[0]
        axes = site.axes
        query = self._projection(source, site.query, found.query, "query", axes.heads + axes.groups, width_of(site))
        key = self._projection(source, site.key, found.key, "key", axes.heads, width_of(site))
        value = self._projection(source, site.value, found.value, "value", axes.heads, axes.value_width)
        key, value = _without_copies(key, value)
        output, gate = read_output(self.gm, site, self.inputs, source, self.path or "the model")
        return AttentionLayer(
            self.path,
            query,
            key,
            value,
            output,
            self._rotary(),
            scale,
            scores.cap,
            CallForm((), 0, -1),
            query_norm=self._norm(found.query, query.weight),
            key_norm=self._norm(found.key, key.weight),
            value_norm=self._norm(found.value, value.weight),
            sinks=self._sinks(scores),
            gate=gate,
            query_scale=self._query_scale(),
        )

    def _named(self) -> list[tuple[str, Origin]]:
        return [("query", self.origins.query), ("key", self.origins.key), ("value", self.origins.value)]

    def _source(self, origin: Origin, which: str) -> fx.Node:
        """The hidden states that a projection reads."""
        projection = next((piece for piece in origin if isinstance(piece, Projection)), None)
        if projection is None or not projection.learned:
            raise self.refuse(f"the {which} comes from no projection with a weight")
        node = projection.source
        while (step := layout_step(node)) is not None:
            node = step.source
        return node

    def _norms(self, origin: Origin) -> dict[fx.Node, tuple[Norm, fx.Node]]:
        """The norms between the attention and the projection, with what they read."""
        found: dict[fx.Node, tuple[Norm, fx.Node]] = {}
        for piece in origin:
            if isinstance(piece, Projection):
                break
            if isinstance(piece, Norm):
                made = find_producer(piece.node, Reading(piece.node))
                if made is None or made.source is None:
                    raise self.refuse("a norm of its queries or keys cannot be read")
                found[piece.node] = (piece, made.source)
        return found

    def _norm(self, origin: Origin, weight: Tensor) -> HeadNormFacts | None:
        norms = list(self._norms(origin).values())
        if not norms:
            return None
        if len(norms) > 1:
            raise self.refuse("more than one norm stands between a projection and the scores")
        norm, source = norms[0]
        like = source.meta["val"]
        empty = torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device)
        run = part_of(self.gm, source, norm.node, self.inputs)
        found = read_norm(run, empty, norm.kind, weight.shape[0], weight.shape[1])
        if found is None:
            raise self.refuse("a norm of its queries, keys or values is neither over one head nor over all of them")
        pieces = list(origin)
        rope = next((piece for piece in pieces if isinstance(piece, Rope)), None)
        return replace(found, after_rope=rope is not None and pieces.index(norm) < pieces.index(rope))

    def _sinks(self, scores: ScoreForm) -> Tensor | None:
        """[H], of every query head."""
        if not scores.sinks:
            return None
        site, (step,) = self.site, scores.sinks
        heads = site.axes.heads + site.axes.groups
        count = int(size_of(heads))
        if not isinstance(step.sink, fx.Node):
            return torch.full((count,), step.sink)
        found = sink_of_heads(step, site)
        assert found is not None
        node, layout = found
        made = part_of(self.gm, site.query.node, node, self.inputs)(torch.zeros((), dtype=node.meta["val"].dtype))
        axes = flat(layout)
        by_axis = made.reshape([int(axis.size) if axis in axes else 1 for axis in flat((heads,))])
        return by_axis.expand([int(axis.size) for axis in flat((heads,))]).reshape(count)

    def _query_scale(self) -> QueryScaleFacts | None:
        found = self._position_scales(self.origins.query)
        if not found:
            return None
        if len(found) > 1:
            raise self.refuse("its queries are multiplied by several numbers for their positions")
        ((node, piece),) = found.items()
        pieces, norms = list(self.origins.query), self._norms(self.origins.query)
        if any(pieces.index(norm) < pieces.index(piece) for norm, _ in norms.values()):
            raise self.refuse("a norm of its queries follows a number for their positions")
        numbers = by_position(self.gm, piece.by, self.inputs, self.positions, dim=None)
        if numbers is None or (facts := steps_of(numbers)) is None:
            raise self.refuse(f"how {node} makes a number of a query's position cannot be read")
        return None if facts.factors == (1.0,) else facts

    def _position_scales(self, origin: Origin) -> dict[fx.Node, PositionScale]:
        pieces = (piece for piece in origin if isinstance(piece, PositionScale))
        return {piece.node: piece for piece in pieces}

    def _ropes(self) -> tuple[Rope | None, Rope | None]:
        pair = [next((p for p in origin if isinstance(p, Rope)), None) for _, origin in self._named()[:2]]
        return pair[0], pair[1]

    def _rotary(self) -> Rotary | None:
        query, key = self._ropes()
        if query is None and key is None:
            return None
        if (
            query is None
            or key is None
            or (query.form, query.width, query.position)
            != (
                key.form,
                key.width,
                key.position,
            )
        ):
            raise self.refuse("queries and keys are not turned alike by their positions")
        if query.form == "other":
            raise self.refuse("how its rotation pairs the columns cannot be read")
        form = "half" if query.form == "half" else "interleaved"
        return Rotary(form, int(query.width), int(query.position))  # type: ignore[arg-type]

    def own_angles(self) -> AngleFacts:
        """Of what the attention makes of positions itself. Raises ConversionRefused."""
        query, _ = self._ropes()
        assert query is not None
        positions, tokens = min(self.positions, ENOUGH), int(size_of(self.site.axes.queries))
        made = [by_position(self.gm, node, self.inputs, positions, dim=-1) for node in query.angles]
        if any(x is None for x in made):
            made = [of_own_tokens(self.gm, node, self.inputs, tokens, dim=-1) for node in query.angles]
        found = [x for x in made if x is not None]
        if len(found) == 1 and found[0].is_complex():
            found = [found[0].real, found[0].imag]
        facts = fitted_angles(*found) if len(found) == 2 else None
        if facts is None:
            raise self.refuse(
                "its module is not given the angles of positions, and those that it makes itself do not grow evenly "
                "with the position"
            )
        return facts

    def _unturned(self) -> dict[fx.Node, Tensor]:
        """Values for the angles with which every rotation is the identity."""
        given: dict[fx.Node, Tensor] = {}
        for rope in self._ropes():
            for n, node in enumerate(rope.angles if rope is not None else ()):
                like = node.meta["val"]
                fill = torch.ones if n == 0 else torch.zeros
                given[node] = fill(tuple(like.shape), dtype=like.dtype, device=like.device)
        return given

    def _projection(
        self, source: fx.Node, operand: Operand, origin: Origin, which: str, heads: Dim, width: Dim
    ) -> Affine:
        """[heads, width, C] from hidden states to where the attention reads them, rotations left out."""
        axes = self.site.axes
        tokens = axes.queries if which == "query" else axes.keys
        skipped = {node: read for node, (_, read) in self._norms(origin).items()}
        for node, scale in self._position_scales(origin).items():
            if which != "query":
                raise self.refuse(f"the {which} is multiplied by a number for its position")
            skipped[node] = scale.source
        layout = self.site.space.resolve_layout(operand.layout)

        def function(inputs: dict[fx.Node, Any]) -> Function:
            run = part_of(self.gm, source, operand.node, inputs | self._unturned(), skipped)
            return lambda x: arranged(run(x), layout, (axes.batch, tokens, heads, width))

        like = source.meta["val"]
        if like.ndim != 3:
            raise self.refuse("its hidden states are not [batch, tokens, width]")
        empty = torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device)
        found = affine_map(function(self.inputs), function(without_biases(self.inputs)), empty)
        if found is None:
            raise self.refuse(f"the {which} is no linear map of the hidden states")
        return found


def _without_copies(key: Affine, value: Affine) -> tuple[Affine, Affine]:
    """One of several heads side by side that are the same: repetitions that were not seen as such, behind a cast."""
    groups = key.weight.shape[0]
    for count in range(groups, 1, -1):
        if groups % count == 0 and all(_repeats(x, count) for one in (key, value) for x in (one.weight, one.bias)):
            key, value = (
                Affine(one.weight[::count], None if one.bias is None else one.bias[::count]) for one in (key, value)
            )
            break
    return key, value


def _repeats(x: Tensor | None, count: int) -> bool:
    return x is None or bool((x.unflatten(0, (-1, count)) == x[::count].unsqueeze(1)).all())
