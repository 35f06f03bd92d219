"""Every attention of a decoder as weights: found by recognition, read off from unit vectors, and checked.

One probe is run through the model. Sites of its graph say where queries, keys and values come from; a layer counts as
read only if the attention that is put together from what was read gives the output that the model's own module gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..axes import Dim, flat, size_of
from ..canonical import width_of
from ..capture import capture
from ..contractions import contraction
from ..explain import call_through
from ..layouts import is_cast, is_tensor, layout_step
from ..normal_form import normalise
from ..opening import decompositions
from ..origins.low_rank import low_rank
from ..origins.pieces import Norm, Origin, Projection, Reading, Rope, origins
from ..origins.walk import find_producer
from ..provenance import module_path
from ..recognise import recognise
from ..score_form import ScoreForm, score_form, unusual_weights
from ..sites import AttentionSite, Operand
from .attention import CACHES, ConvertedAttention
from .layers import Affine, AttentionLayer, CallForm, ConversionRefused, Decoder, HeadNormFacts, Rotary
from .linear_maps import Function, affine_map, part_of, without_biases
from .norms import read_norm
from .rotation import turns_of

__all__ = ["probe_tokens", "read_decoder"]

aten = torch.ops.aten

_PASSES = {aten.dropout.default, aten.clone.default, aten.detach.default, aten.contiguous.default}


@dataclass(frozen=True)
class _Call:
    """One call of a module: what it was given by name, and what it gave."""

    given: dict[str, Any]
    parameters: tuple[str, ...]
    output: Any


def probe_tokens(model: nn.Module) -> Tensor:
    """Two rows of token ids that any vocabulary has."""
    config: Any = getattr(model, "config", None)
    size = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", 64)
    device = next(model.parameters()).device
    return torch.randint(0, size, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)


def read_decoder(model: nn.Module, probe: Tensor | None = None) -> Decoder:
    """The attention layers of a model that maps token ids [B, S] to logits. Raises ConversionRefused.

    `probe` are token ids to run it on, two rows at least. The model is left as it was.
    """
    name = type(model).__name__
    if model.training:
        raise ConversionRefused(name, "it is in training mode, where attention may drop weights", "Call model.eval().")
    if any(isinstance(module, ConvertedAttention) for module in model.modules()):
        raise ConversionRefused(name, "it is converted already", "Give all recipes to one call of latent.convert.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConversionRefused(name, "it is an encoder with a decoder, which attends to another sequence than its own")
    probe = probe_tokens(model) if probe is None else probe
    found = _Look()
    with torch.no_grad():
        call_through(model, found, False, (), {"input_ids": probe, "use_cache": False})
    if not found.layers:
        first = found.refusals[0] if found.refusals else ConversionRefused(name, "no attention was recognised in it")
        raise first
    if found.refusals:
        raise found.refusals[0]
    calls = _calls_of(model, [layer.path for layer in found.layers], probe)
    angles: list[object] = []
    layers = []
    for layer in found.layers:
        layers.append(_checked(_called(layer, model, calls.get(layer.path), angles), calls[layer.path]))
    _refuse_sharing(model, layers)
    return Decoder(model, tuple(sorted(layers, key=lambda layer: layer.call.index)))


# ** what the graph says **


class _Look:
    """A backend that reads the attentions of each graph and runs the graph as it is."""

    def __init__(self) -> None:
        self.layers: list[AttentionLayer] = []
        self.refusals: list[ConversionRefused] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        normal = normalise(capture(gm, example_inputs, decompositions()))
        inputs = dict(zip((n for n in normal.graph.nodes if n.op == "placeholder"), example_inputs, strict=True))
        for site in recognise(normal.graph):
            try:
                self.layers.append(_Reader(normal, site, inputs).layer())
            except ConversionRefused as refusal:
                self.refusals.append(refusal)
        return gm.forward


class _Reader:
    """One site, read off as weights."""

    def __init__(self, gm: fx.GraphModule, site: AttentionSite, inputs: dict[fx.Node, Any]) -> None:
        self.gm, self.site, self.inputs = gm, site, inputs
        self.path = module_path(site.anchor)
        self.origins = origins(site)

    def refuse(self, reason: str) -> ConversionRefused:
        return ConversionRefused(self.path or "the model", reason)

    def layer(self) -> AttentionLayer:
        site, found = self.site, self.origins
        if (latent := low_rank(site, found=found)) is not None:
            raise self.refuse(f"its keys and values are made of a latent of {latent.width} numbers already")
        scores, weights = score_form(site), unusual_weights(site)
        if not isinstance(scores, ScoreForm):
            raise self.refuse(scores.reason)
        if weights is not None:
            raise self.refuse(weights.reason)
        if len(site.terms) != 1:
            raise self.refuse("its scores are a sum of several products")
        if scores.sinks or scores.scale_by:
            raise self.refuse("it has learned sinks" if scores.sinks else "its scores are scaled by a tensor")
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
        call = CallForm((), 0, -1)
        output = self._output()
        norms = self._norm(found.query, query.weight), self._norm(found.key, key.weight)
        return AttentionLayer(
            self.path, query, key, value, output, self._rotary(), scale, scores.cap, call, 0, norms[0], norms[1]
        )

    def _named(self) -> list[tuple[str, Origin]]:
        return [("query", self.origins.query), ("key", self.origins.key), ("value", self.origins.value)]

    def _source(self, origin: Origin, which: str) -> fx.Node:
        """The hidden states that a projection reads."""
        projection = next((piece for piece in origin if isinstance(piece, Projection)), None)
        if projection is None or not projection.learned:
            raise self.refuse(f"the {which} comes from no projection with a weight")
        if which == "value" and self._norms(origin):
            raise self.refuse("a norm stands between the projection of the values and the attention")
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
            raise self.refuse("a norm of its queries or keys is neither over one head nor over all of them")
        return found

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
        layout = self.site.space.resolve_layout(operand.layout)

        def function(inputs: dict[fx.Node, Any]) -> Function:
            run = part_of(self.gm, source, operand.node, inputs | self._unturned(), skipped)
            return lambda x: _arranged(run(x), layout, (axes.batch, tokens, heads, width))

        like = source.meta["val"]
        if like.ndim != 3:
            raise self.refuse("its hidden states are not [batch, tokens, width]")
        empty = torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device)
        found = affine_map(function(self.inputs), function(without_biases(self.inputs)), empty)
        if found is None:
            raise self.refuse(f"the {which} is no linear map of the hidden states")
        return found

    def _output(self) -> Affine:
        """[C, H, e] from the heads to what follows them."""
        site, axes = self.site, self.site.axes
        end = _linear_after(site.output)
        if end is None:
            raise self.refuse("what follows the attention is not a linear layer by itself")
        like = site.output.meta["val"]
        heads, width = axes.heads + axes.groups, axes.value_width
        layout = site.space.resolve_layout(site.output_layout)
        count, columns = int(size_of(heads)), int(size_of(width))
        batch, tokens = int(size_of(axes.batch)), int(size_of(axes.queries))

        def function(inputs: dict[fx.Node, Any]) -> Function:
            run = part_of(self.gm, site.output, end, inputs)

            def outputs(x: Tensor) -> Tensor:
                placed = _placed(x, (axes.batch, axes.queries, heads, width), layout)
                return run(placed.reshape(like.shape)).reshape(batch, tokens, -1)

            return outputs

        empty = torch.empty((batch, tokens, count * columns), dtype=like.dtype, device=like.device)
        found = affine_map(function(self.inputs), function(without_biases(self.inputs)), empty)
        if found is None:
            raise self.refuse("what follows the attention is no linear map of its heads")
        return Affine(found.weight.view(-1, count, columns), found.bias)


def _arranged(x: Tensor, layout: Sequence[Dim], order: Sequence[Dim]) -> Tensor:
    """A tensor with a dimension for each entry of `order`; other axes are repetitions, of which one is taken."""
    axes = flat(layout)
    x = x.reshape([int(axis.size) for axis in axes])
    wanted = flat(order)
    kept = [axis for axis in axes if axis in wanted]
    x = x[tuple(slice(None) if axis in wanted else 0 for axis in axes)]
    x = x.permute([kept.index(axis) for axis in wanted])
    return x.reshape([int(size_of(dim)) for dim in order])


def _placed(x: Tensor, order: Sequence[Dim], layout: Sequence[Dim]) -> Tensor:
    """The reverse of `_arranged`."""
    axes, wanted = flat(order), flat(layout)
    x = x.reshape([int(axis.size) for axis in axes])
    return x.permute([axes.index(axis) for axis in wanted])


def _linear_after(node: fx.Node) -> fx.Node | None:
    """The projection that reads the heads, with its bias; None where anything else does."""
    while True:
        users = [user for user in node.users if is_tensor(user)]
        if len(users) != 1:
            return None
        node = users[0]
        if contraction(node) is not None:
            break
        if layout_step(node) is None and not is_cast(node) and node.target not in _PASSES:
            return None
    while len(users := [user for user in node.users if is_tensor(user)]) == 1:
        step = layout_step(users[0])
        added = users[0].target in {aten.add.Tensor} and any(
            n.op in ("placeholder", "get_attr") for n in users[0].all_input_nodes
        )
        if step is None and not added:
            break
        node = users[0]
    return node


# ** how the model calls it **


def _calls_of(model: nn.Module, paths: Sequence[str], probe: Tensor) -> dict[str, _Call]:
    """One call of each module, run eagerly."""
    calls: dict[str, _Call] = {}
    handles = []
    for path in dict.fromkeys(paths):
        module = model.get_submodule(path)
        parameters = tuple(
            p.name for p in inspect.signature(module.forward).parameters.values() if p.kind != p.VAR_KEYWORD
        )

        def keep(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path, names: Any = parameters) -> None:
            calls[path] = _Call(dict(zip(names, args, strict=False)) | kwargs, names, output)

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            model(input_ids=probe, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _called(layer: AttentionLayer, model: nn.Module, call: _Call | None, angles: list[object]) -> AttentionLayer:
    """The layer with how it is called. `angles` are those seen so far; layers that are given the same share them."""
    module = model.get_submodule(layer.path)
    index = getattr(module, "layer_idx", None)
    if call is None or not call.parameters or not isinstance(call.given.get(call.parameters[0]), Tensor):
        raise ConversionRefused(layer.path, "its module is not called with hidden states first")
    if index is None or not any(name in call.parameters for name in CACHES):
        raise ConversionRefused(
            layer.path, "its module takes no cache of transformers, or does not know its place in it"
        )
    returns = len(call.output) if isinstance(call.output, tuple) else 0
    given = call.given.get("position_embeddings")
    turns = 0
    if layer.rotary is not None:
        if given is None:
            raise ConversionRefused(layer.path, "its module is not given the angles of positions, it makes them itself")
        turns = next((n for n, seen in enumerate(angles) if seen is given), len(angles))
        if turns == len(angles):
            angles.append(given)
    return replace(layer, call=CallForm(call.parameters, returns, int(index)), turns=turns)


def _checked(layer: AttentionLayer, call: _Call) -> AttentionLayer:
    """The layer, once what was read gives what the model's own module gave."""
    wanted = call.output[0] if isinstance(call.output, tuple) else call.output
    tolerance = max(8 * torch.finfo(wanted.dtype).eps, 1e-4)  # parts of a wide model may run in float32
    errors = []
    for candidate in _spellings(layer, call.given.get("position_embeddings")):
        made = ConvertedAttention.of(candidate).to(wanted.device)
        try:
            with torch.no_grad():
                found = made(**call.given)
        except RuntimeError:  # angles of another width
            continue
        found = found[0] if isinstance(found, tuple) else found
        if found.shape != wanted.shape:
            break
        errors.append(float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)))
        if errors[-1] <= tolerance:
            return candidate
    nearest = f" (relative error {min(errors):.1e})" if errors else ""
    raise ConversionRefused(layer.path, f"it computes something besides what was read from its graph{nearest}")


def _spellings(layer: AttentionLayer, angles: object) -> list[AttentionLayer]:
    """The ways in which the model may have handed on its angles; the probe tells which one it was."""
    if layer.rotary is None:
        return [layer]
    ways: tuple[Literal["halves", "pairs", "once"], ...] = ("halves", "pairs", "once")
    rotaries = [replace(layer.rotary, given=way) for way in ways]
    fitting = [rotary for rotary in rotaries if 2 * turns_of(angles, rotary)[0].shape[-1] == rotary.width]
    return [replace(layer, rotary=rotary) for rotary in fitting]


def _refuse_sharing(model: nn.Module, layers: Sequence[AttentionLayer]) -> None:
    """Weights of one layer must not be another's: changing one would change both."""
    owners: dict[int, str] = {}
    for layer in layers:
        for parameter in model.get_submodule(layer.path).parameters():
            other = owners.setdefault(parameter.data_ptr(), layer.path)
            if other != layer.path:
                raise ConversionRefused(layer.path, f"it shares weights with {other}")
