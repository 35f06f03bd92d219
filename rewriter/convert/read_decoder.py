"""Every attention of a decoder as weights: found by recognition, read off from unit vectors, and checked.

One probe is run through the model. Sites of its graph say where queries, keys and values come from; a layer counts as
read only if the attention that is put together from what was read gives the output that the model's own module gave.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..capture import capture
from ..explain import call_through
from ..normal_form import normalise
from ..opening import decompositions
from ..provenance import module_path
from ..recognise import recognise
from .attention import CACHES, ConvertedAttention
from .layers import AngleFacts, AttentionLayer, CallForm, ConversionRefused, Decoder
from .own_angles import OwnAngles
from .read_layer import LayerReader
from .rotation import turns_of

__all__ = ["probe_tokens", "read_decoder"]


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


def _positions_of(model: nn.Module) -> int:
    """How many positions a model knows."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None) or 4096


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
    found = _Look(_positions_of(model))
    try:
        with torch.no_grad():
            call_through(model, found, False, (), {"input_ids": probe, "use_cache": False})
    except Exception as error:  # whatever the model's own code raises
        what = f"it cannot be traced on token ids {list(probe.shape)}, alone and without a cache ({_line_of(error)})"
        raise ConversionRefused(name, what, "Pass token ids that it takes as `probe`.") from error
    if not found.layers:
        first = found.refusals[0] if found.refusals else ConversionRefused(name, "no attention was recognised in it")
        raise first
    if found.refusals:
        raise found.refusals[0]
    paths = Counter(layer.path for layer in found.layers)
    if again := next((path for path, count in paths.items() if count > 1), None):
        raise ConversionRefused(again, f"it attends {paths[again]} times in one call, each with a cache of its own")
    calls = _calls_of(model, list(paths), probe)
    angles: list[object] = []
    layers = []
    for layer, reader in zip(found.layers, found.readers, strict=True):
        layers.append(_checked(_called(layer, reader, model, calls.get(layer.path), angles), calls[layer.path]))
    _refuse_sharing(model, layers)
    return Decoder(model, tuple(sorted(layers, key=lambda layer: layer.call.index)))


class _Look:
    """A backend that reads the attentions of each graph and runs the graph as it is."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.layers: list[AttentionLayer] = []
        self.readers: list[LayerReader] = []
        self.refusals: list[ConversionRefused] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        normal = normalise(capture(gm, example_inputs, decompositions()))
        inputs = dict(zip((n for n in normal.graph.nodes if n.op == "placeholder"), example_inputs, strict=True))
        for site in recognise(normal.graph):
            try:
                reader = LayerReader(normal, site, inputs, self.positions)
                self.layers.append(reader.layer())
                self.readers.append(reader)
            except ConversionRefused as refusal:
                self.refusals.append(refusal)
            except RuntimeError as error:  # shapes that a part alone does not take
                where = module_path(site.anchor) or "the model"
                self.refusals.append(ConversionRefused(where, f"its weights cannot be read ({_line_of(error)})"))
        return gm.forward


def _line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"


# ** how the model calls it **


def _calls_of(model: nn.Module, paths: Sequence[str], probe: Tensor) -> dict[str, _Call]:
    """One call of each module, run eagerly."""
    calls: dict[str, _Call] = {}
    handles = []
    for path in paths:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            what = "no module of the model has this name; where its code breaks into several graphs, names are lost"
            raise ConversionRefused(path, what) from None
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


def _called(
    layer: AttentionLayer, reader: LayerReader, model: nn.Module, call: _Call | None, angles: list[object]
) -> AttentionLayer:
    """The layer with how it is called. `angles` are those seen so far; layers that have the same share them."""
    module = model.get_submodule(layer.path)
    index = getattr(module, "layer_idx", None)
    if call is None or not call.parameters or not isinstance(call.given.get(call.parameters[0]), Tensor):
        raise ConversionRefused(layer.path, "its module is not called with hidden states first")
    if index is None or not any(name in call.parameters or name in call.given for name in CACHES):
        raise ConversionRefused(
            layer.path, "its module takes no cache of transformers, or does not know its place in it"
        )
    returns = len(call.output) if isinstance(call.output, tuple) else 0
    turns = 0
    if layer.rotary is not None:
        given = call.given.get("position_embeddings")
        if given is None:
            given = reader.own_angles()
            layer = replace(layer, own_angles=given)
        same = (n for n, seen in enumerate(angles) if seen is given or (isinstance(seen, AngleFacts) and seen == given))
        turns = next(same, len(angles))
        if turns == len(angles):
            angles.append(given)
    form = CallForm(call.parameters, returns, int(index), isinstance(call.given.get("position_ids"), Tensor))
    return replace(layer, call=form, turns=turns)


def _checked(layer: AttentionLayer, call: _Call) -> AttentionLayer:
    """The layer, once what was read gives what the model's own module gave."""
    wanted = call.output[0] if isinstance(call.output, tuple) else call.output
    tolerance = max(8 * torch.finfo(wanted.dtype).eps, 1e-4)  # parts of a wide model may run in float32
    errors = []
    for candidate in _spellings(layer, _angles_in(layer, call)):
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


def _angles_in(layer: AttentionLayer, call: _Call) -> object:
    own = OwnAngles.of(layer.own_angles)
    return call.given.get("position_embeddings") if own is None else own(torch.zeros(1, 1))


def _spellings(layer: AttentionLayer, angles: object) -> list[AttentionLayer]:
    """The ways in which the model may have handed on its angles; the probe tells which one it was."""
    if layer.rotary is None:
        return [layer]
    ways: tuple[Literal["halves", "pairs", "once"], ...] = ("halves", "pairs", "once")
    rotaries = [replace(layer.rotary, given=way) for way in ways]
    fitting = [rotary for rotary in rotaries if 2 * turns_of(angles, rotary)[0].shape[-1] == rotary.width]
    both = [replace(rotary, backwards=backwards) for backwards in (False, True) for rotary in fitting]
    return [replace(layer, rotary=rotary) for rotary in both]


def _refuse_sharing(model: nn.Module, layers: Sequence[AttentionLayer]) -> None:
    """Weights of one layer must not be another's: changing one would change both."""
    owners: dict[int, str] = {}
    for layer in layers:
        for parameter in model.get_submodule(layer.path).parameters():
            other = owners.setdefault(parameter.data_ptr(), layer.path)
            if other != layer.path:
                raise ConversionRefused(layer.path, f"it shares weights with {other}")
