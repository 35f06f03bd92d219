"""`latent.convert`: read a decoder, put attentions of our own in the place of its own, and let recipes change them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .attention import ConvertedAttention
from .calibrate import Calibration, Progress, silent, tokens_of
from .layers import ConversionRefused, Decoder
from .read_decoder import read_decoder
from .recipe import Recipe
from .store import describe

__all__ = ["convert"]


def convert(
    model: nn.Module,
    recipe: Recipe | Sequence[Recipe],
    calibrate: Sequence[str] | Tensor | None = None,
    *,
    tokenizer: Any = None,
    probe: Tensor | None = None,
    inplace: bool = False,
    progress: Progress = silent,
) -> nn.Module:
    """A model with other attentions, by one or more recipes, applied in order.

    `calibrate` are texts (with their `tokenizer`) or token ids [N, L], for recipes that learn from text. `probe` are
    the token ids [2 or more, S] of the call from which the attentions are read. The model is copied unless `inplace`.
    The result is an ordinary module; `config.latent` says what was done, so that `save_pretrained` keeps it.

    Raises ConversionRefused where a layer cannot be read or a recipe does not hold for it; then nothing was changed.
    """
    asked = list(recipe) if isinstance(recipe, Sequence) else [recipe]
    for one in asked:
        if not isinstance(one, Recipe):
            raise TypeError(f"{one!r} is no recipe; see latent.recipes for those there are")
    decoder = read_decoder(model, probe)
    calibration = Calibration(model, tokens_of(calibrate, tokenizer), progress=progress)
    attentions = [ConvertedAttention.of(layer) for layer in decoder.layers]
    for one in asked:
        one.convert(attentions, decoder, calibration)
    made = model if inplace else _copy_around(model, decoder)
    for layer, attention in zip(decoder.layers, attentions, strict=True):
        _put(made, layer.path, attention.to(device=layer.key.weight.device).eval())
    describe(made, decoder, attentions, asked)
    return made


def _copy_around(model: nn.Module, decoder: Decoder) -> nn.Module:
    """A copy in which the attentions that will be replaced are not copied."""
    kept = {id(module): module for layer in decoder.layers for module in [model.get_submodule(layer.path)]}
    return copy.deepcopy(model, dict(kept))


def _put(model: nn.Module, path: str, attention: ConvertedAttention) -> None:
    owner, _, name = path.rpartition(".")
    if not name:
        raise ConversionRefused(path or "the model", "the attention is the whole model")
    weights = model.get_submodule(path).state_dict()
    if weight := next((key for key in weights if not hasattr(attention, key.partition(".")[0])), None):
        attention.stand_for(weight)
    setattr(model.get_submodule(owner), name, attention)
