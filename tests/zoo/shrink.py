"""Any transformers configuration, made tiny: `tiny_config("llama")`.

The default configuration is read, every attribute is replaced by the rule of its meaning (`rules.py`), layers are
chosen so that no kind is lost (`layers.py`), and token ids move below the small vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .layers import choose_layers
from .overrides import OVERRIDES
from .rules import ABSENT, VOCABULARY, small

TOKEN = re.compile(r".*_token_(id|index)|.*_index|eoa_token_id")
NOT_TOKENS = {"altup_active_idx", "moe_layer_start_index", "moe_layer_end_index"}
FIRST_FREE_TOKEN = 10
# Recomputed by the configuration from the attributes it is derived from.
DERIVED = {"qk_head_dim", "architectures", "id2label", "label2id", "model_type", "transformers_version"}


class _Tokens:
    """Moves token ids below the vocabulary; equal ids stay equal across the parts of one configuration."""

    def __init__(self) -> None:
        self.moved: dict[int, int] = {}

    def small(self, token: int) -> int:
        if token < FIRST_FREE_TOKEN:
            return token
        return self.moved.setdefault(token, VOCABULARY - 1 - len(self.moved))


def _rope(parameters: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """Rope parameters keep their kind; lists of sections or factors per frequency shrink with the head."""
    out: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            out[name] = _rope(value, ratio)
        elif name.endswith("section") and isinstance(value, list):
            out[name] = [max(1, round(item * ratio)) for item in value]
        else:
            out[name] = value
    return out


def shrink(config: PretrainedConfig, override: Mapping[str, Any] | None = None, tokens: _Tokens | None = None) -> Any:
    """A tiny configuration of the same class as `config`; `override` has the last word, also inside parts."""
    tokens = tokens or _Tokens()
    changes = shrunk_attributes(config, dict(override or {}), tokens)
    return type(config)(**changes)


def shrunk_attributes(config: PretrainedConfig, override: Mapping[str, Any], tokens: _Tokens) -> dict[str, Any]:
    """The attributes of `config` that a tiny one must be given."""
    attributes = config.to_dict()
    changes: dict[str, Any] = dict(choose_layers(attributes).changes)
    for name, value in attributes.items():
        part = vars(config).get(name)
        if name in DERIVED:
            continue
        if isinstance(part, PretrainedConfig):
            changes[name] = shrink(part, override.get(name), tokens)
        elif name in override:
            changes[name] = override[name]
        elif value is None and name in ABSENT:
            changes[name] = ABSENT[name]
        elif TOKEN.fullmatch(name) and name not in NOT_TOKENS:
            if isinstance(value, list):
                changes[name] = [tokens.small(item) for item in value]
            elif type(value) is int:
                changes[name] = tokens.small(value)
        elif name == "rope_parameters" and isinstance(value, Mapping):
            width = attributes.get("head_dim") or 64
            changes[name] = _rope(value, small("head_dim", width, attributes) / width)
        elif name == "per_layer_config" and isinstance(value, Mapping):
            changes[name] = {layer: _own(own, attributes) for layer, own in changes.get(name, {}).items()}
        else:
            value = changes.get(name, value)
            items = value if isinstance(value, list) else None
            new = [small(name, item, attributes) for item in items] if items else small(name, value, attributes)
            if new != attributes[name]:
                changes[name] = new
    return changes | {name: value for name, value in override.items() if name not in attributes}


def _own(own: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes one layer has for itself: small, and as many times larger or smaller as they were."""
    out = {}
    for name, value in own.items():
        new, base = small(name, value, attributes), attributes.get(name)
        if type(value) is int and type(base) is int and base and value != base:
            new = max(1, round(small(name, base, attributes) * value / base))
        out[name] = new
    return out


def tiny_config(model_type: str, **more: Any) -> Any:
    """The tiny configuration of one model type; `more` is added to the overrides of that type."""
    row = OVERRIDES.get(model_type)
    return shrink(CONFIG_MAPPING[model_type](), {**(row.changes if row else {}), **more})
