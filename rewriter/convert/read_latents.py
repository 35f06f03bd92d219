"""Latents that a model makes its keys and values of, and does not cache: found by recognition, and checked.

One probe is run through the model. A site of its graph says which narrow tensor keys and values descend from; the
linear map from there is read off with unit vectors. It counts if it explains the keys and values that the model hands
to a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers.cache_utils import DynamicCache

from ..axes import Dim, size_of
from ..canonical import width_of
from ..capture import capture
from ..explain import call_through
from ..layouts import shape_of
from ..normal_form import normalise
from ..opening import decompositions
from ..origins.low_rank import LowRank, MLAForm, low_rank
from ..provenance import module_path
from ..recognise import recognise
from ..sites import AttentionSite, Operand
from .layers import Affine, ConversionRefused
from .linear_maps import Function, affine_map, arranged, part_of, without_biases
from .own_latents import OwnLatent
from .read_decoder import probe_tokens

__all__ = ["read_latents"]


def read_latents(model: nn.Module, probe: Tensor | None = None) -> list[OwnLatent]:
    """The latent of every layer, in the order of a cache. Raises ConversionRefused. The model is left as it was."""
    name = type(model).__name__
    probe = probe_tokens(model) if probe is None else probe
    look = _Look()
    with torch.no_grad():
        call_through(model, look, False, (), {"input_ids": probe, "use_cache": False})
    if look.refusals:
        raise look.refusals[0]
    handed = _handed(model, probe)
    if not look.found or len(look.found) != len(handed):
        raise ConversionRefused(
            name, f"{len(look.found)} attentions were recognised in it, and {len(handed)} hand something to a cache"
        )
    return [_explained(*found, *pair) for found, pair in zip(look.found, handed, strict=True)]


class _Look:
    """A backend that reads the latents of each graph and runs the graph as it is."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Affine, Affine]] = []
        self.refusals: list[ConversionRefused] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        normal = normalise(capture(gm, example_inputs, decompositions()))
        inputs = dict(zip((n for n in normal.graph.nodes if n.op == "placeholder"), example_inputs, strict=True))
        for site in recognise(normal.graph):
            path = module_path(site.anchor) or "the model"
            try:
                self.found.append((path, *_maps(normal, site, inputs, path)))
            except ConversionRefused as refusal:
                self.refusals.append(refusal)
        return gm.forward


def _maps(gm: fx.GraphModule, site: AttentionSite, inputs: dict[fx.Node, Any], path: str) -> tuple[Affine, Affine]:
    """[G, d, r] and [G, e, r] from the latent to keys and values."""
    latent = low_rank(site)
    if latent is None:
        raise ConversionRefused(path, "its keys and values are made of no latent")
    if latent.form is not MLAForm.EXPANDED or len(site.terms) != 1:
        raise ConversionRefused(path, "it does not attend to keys and values that are made of its latent at once")
    if not latent.linear:
        raise ConversionRefused(path, "something that is not linear stands between its latent and its keys or values")
    maps = []
    for operand, width in ((site.key, width_of(site)), (site.value, site.axes.value_width)):
        found = _map(gm, site, inputs, latent, operand, width)
        if found is None:
            raise ConversionRefused(path, "its keys or values are no linear map of the latent")
        maps.append(found)
    return maps[0], maps[1]


def _map(
    gm: fx.GraphModule,
    site: AttentionSite,
    inputs: dict[fx.Node, Any],
    latent: LowRank,
    operand: Operand,
    width: Dim,
) -> Affine | None:
    axes, node = site.axes, latent.latent
    shape, like = shape_of(node), node.meta["val"]
    layout = site.space.resolve_layout(operand.layout)
    beside = _beside(node, operand.node)

    def function(given: dict[fx.Node, Any]) -> Function:
        run = part_of(gm, node, operand.node, given | beside)
        return lambda x: arranged(run(x.reshape(shape)), layout, (axes.batch, axes.keys, axes.heads, width))

    batch, tokens = int(size_of(axes.batch)), int(size_of(axes.keys))
    empty = torch.empty((batch, tokens, int(shape[-1])), dtype=like.dtype, device=like.device)
    return affine_map(function(inputs), function(without_biases(inputs)), empty)


def _beside(source: fx.Node, target: fx.Node) -> dict[fx.Node, Tensor]:
    """Zeros for what joins on the way from `source` to `target`: the parts of a key that come from elsewhere."""
    between: set[fx.Node] = {source}
    for node in source.graph.nodes:
        if any(n in between for n in node.all_input_nodes):
            between.add(node)
        if node is target:
            break
    zeros: dict[fx.Node, Tensor] = {}
    for node in between - {source}:
        for n in node.all_input_nodes:
            value = n.meta.get("val")
            if n not in between and n.op == "call_function" and isinstance(value, Tensor):
                zeros[n] = torch.zeros(tuple(value.shape), dtype=value.dtype, device=value.device)
    return zeros


class _Recorder(DynamicCache):
    """What the layers hand to their cache, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: list[tuple[int, Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.handed.append((layer_idx, key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _handed(model: nn.Module, probe: Tensor) -> list[tuple[Tensor, Tensor]]:
    past = _Recorder()
    with torch.no_grad():
        model(input_ids=probe, past_key_values=past, use_cache=True)
    if [index for index, _, _ in past.handed] != list(range(len(past.handed))):
        raise ConversionRefused(type(model).__name__, "its layers do not each have one place in a cache, in order")
    return [(key, value) for _, key, value in past.handed]


def _explained(path: str, key: Affine, value: Affine, keys: Tensor, values: Tensor) -> OwnLatent:
    """The latent of a layer, if it explains what the layer hands to its cache."""
    groups, key_width, value_width = key.weight.shape[0], key.weight.shape[1], value.weight.shape[1]
    if keys.shape[1:] != (groups, keys.shape[2], key_width) or values.shape[-1] != value_width:
        raise ConversionRefused(
            path,
            f"it hands {list(keys.shape)} and {list(values.shape)} to its cache, which are not the keys and values of "
            f"{groups} heads. If that is its latent, any cache of transformers is small",
        )
    tolerance = max(8 * torch.finfo(keys.dtype).eps, 1e-5)
    for shared in (True, False):
        found = OwnLatent.of(key, value, shared)
        if found is None:
            raise ConversionRefused(path, "columns of its keys that are not of the latent stand in several places")
        if found.error(keys, values) <= tolerance:
            return found
    raise ConversionRefused(path, "the keys and values that it hands to its cache are not those that it attends to")
