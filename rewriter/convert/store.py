"""Converted models on disk: what `save_pretrained` writes, and `latent.load`, which reads it.

`config.latent` holds, for each attention, the arguments that build its modules; the weights are where those of every
other module are. It is all that is needed: neither the recipes nor the texts are asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .attention import AttentionForm, ConvertedAttention
from .layers import CallForm, Decoder, Rotary
from .recipe import Recipe, part_named

__all__ = ["describe", "load"]

VERSION = 1


def describe(
    model: nn.Module, decoder: Decoder, attentions: Sequence[ConvertedAttention], asked: Sequence[Recipe]
) -> None:
    """Write into the model's config what its attentions are."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    config.latent = {
        "version": VERSION,
        "recipes": [{"name": one.name} | (asdict(one) if is_dataclass(one) else {}) for one in asked],
        "cached_before": decoder.cached,
        "attentions": {
            layer.path: settings_of(attention) for layer, attention in zip(decoder.layers, attentions, strict=True)
        },
    }


def settings_of(attention: ConvertedAttention) -> dict[str, Any]:
    """The arguments of an attention and its parts, as plain JSON."""
    parts: dict[str, Any] = {name: m for name, m in attention.named_children() if hasattr(m, "settings")}
    return {
        "form": asdict(attention.form),
        "stands_for": attention.stands_for,
        "parts": {
            name: {"class": type(module).__name__, **_rotary_settings(module), **module.settings()}
            for name, module in parts.items()
        },
    }


def attention_of(settings: dict[str, Any]) -> ConvertedAttention:
    """The attention of `settings_of`, without weights."""
    form = dict(settings["form"])
    form |= {"rotary": _rotary(form["rotary"]), "bias": tuple(form["bias"])}
    form["call"] = CallForm(**{**form["call"], "parameters": tuple(form["call"]["parameters"])})
    parts = {name: _part(dict(part)) for name, part in settings["parts"].items()}
    made = ConvertedAttention(AttentionForm(**form), parts.pop("memory"))
    for name, module in parts.items():
        setattr(made, name, module)
    if weight := settings.get("stands_for"):
        made.stand_for(weight)
    return made


def _part(settings: dict[str, Any]) -> Any:
    kind = part_named(settings.pop("class"))
    if "rotary" in settings:
        settings["rotary"] = _rotary(settings["rotary"])
    return kind(**settings)


def _rotary_settings(module: Any) -> dict[str, Any]:
    if not hasattr(module, "rotary"):
        return {}
    return {"rotary": asdict(module.rotary) if module.rotary is not None else None}


def _rotary(settings: dict[str, Any] | None) -> Rotary | None:
    return None if settings is None else Rotary(**{**settings, "frequencies": tuple(settings["frequencies"])})


def load(folder: str | Path, **options: Any) -> Any:
    """The converted model that `save_pretrained` wrote to `folder`; `options` are those of `from_pretrained`.

    Raises ValueError where the folder holds none, or its weights do not fit.
    """
    import transformers

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: there is no config.json, so it is no folder that save_pretrained wrote")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    settings = getattr(config, "latent", None)
    if not settings:
        raise ValueError(f"{folder}: its config.json has no entry `latent`; load it with transformers")
    if settings["version"] > VERSION:
        raise ValueError(
            f"{folder}: it was written by a newer version (format {settings['version']}, known: {VERSION})"
        )
    kind = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    options = {"dtype": config.dtype, "local_files_only": True} | options
    model, info = _converted_kind(kind, settings).from_pretrained(folder, output_loading_info=True, **options)
    model.__class__ = kind
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"{folder}: the weights do not fit its config.json: {', '.join(map(str, wrong[:3]))}")
    for module in model.modules():
        if isinstance(module, ConvertedAttention) and module.gate is not None:
            module.gate.placed(module)
    return model.eval()


def _converted_kind(kind: type[Any], settings: dict[str, Any]) -> type[Any]:
    """The class of the model with its attentions replaced when it is made, so that `from_pretrained` fills them."""

    def make(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        for path, one in settings["attentions"].items():
            owner, _, name = path.rpartition(".")
            setattr(self.get_submodule(owner), name, attention_of(one))

    return type(kind.__name__, (kind,), {"__init__": make, "__module__": kind.__module__})
