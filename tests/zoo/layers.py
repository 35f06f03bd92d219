"""The fewest layers of a configuration that keep every kind of layer the model has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Attributes = Mapping[str, Any]

COUNTS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|num_blocks|(encoder|decoder)_layers|num_(encoder|decoder)_layers|depth"
    r"|conf_num_hidden_layers|num_layers_per_stack"
)
MEMBERS = re.compile(r".*(_layers|_idxs|_ids|_indices|_indexes)")
# "The first k layers are dense" is a kind of layer without a list.
LEADING = ("first_k_dense_replace", "num_dense_layers")
FEWEST = 2


@dataclass(frozen=True)
class Choice:
    """Which layers of the large model the tiny one keeps, in order, and the attributes that say so."""

    kept: tuple[int, ...]
    changes: dict[str, Any]


def layer_count(attributes: Attributes) -> int | None:
    """How many layers the model has, by whichever attribute says so."""
    counts = [value for name, value in attributes.items() if COUNTS.fullmatch(name) and type(value) is int]
    return max(counts, default=None)


def _is_members(name: str, value: Any, count: int) -> bool:
    numbers = isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
    return numbers and bool(MEMBERS.fullmatch(name)) and value == sorted(set(value)) and max(value) < count


def _kinds(attributes: Attributes, count: int) -> list[set[tuple[str, str]]]:
    """What each layer is, as a set of (attribute, value)."""
    kinds: list[set[tuple[str, str]]] = [set() for _ in range(count)]
    for name, value in attributes.items():
        if _is_members(name, value, count):
            for layer in range(count):
                kinds[layer].add((name, str(layer in value)))
        elif isinstance(value, list) and len(value) == count:
            for layer, item in enumerate(value):
                kinds[layer].add((name, str(item)))
        elif name in LEADING and type(value) is int:
            for layer in range(count):
                kinds[layer].add((name, str(layer < value)))
        elif name == "per_layer_config" and isinstance(value, Mapping):
            for layer, own in value.items():
                kinds[int(layer)].add((name, str(own)))
    return kinds


def choose_layers(attributes: Attributes, *, fewest: int = FEWEST) -> Choice:
    """Keep a layer when it shows a kind not kept yet, then fill up to `fewest` with the first ones left."""
    count = layer_count(attributes)
    if not count:
        return Choice((), {})
    kept: list[int] = []
    seen: set[tuple[str, str]] = set()
    for layer, kinds in enumerate(_kinds(attributes, count)):
        if not kinds <= seen:
            kept.append(layer)
            seen |= kinds
    kept += [layer for layer in range(count) if layer not in kept][: max(0, fewest - len(kept))]
    kept.sort()
    return Choice(tuple(kept), _changes(attributes, count, kept))


def _changes(attributes: Attributes, count: int, kept: list[int]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name, value in attributes.items():
        if COUNTS.fullmatch(name) and type(value) is int:
            changes[name] = min(value, len(kept))
        elif _is_members(name, value, count):
            changes[name] = [new for new, old in enumerate(kept) if old in value]
        elif isinstance(value, list) and len(value) == count:
            changes[name] = [value[layer] for layer in kept]
        elif name in LEADING and type(value) is int:
            changes[name] = sum(layer < value for layer in kept)
        elif name == "per_layer_config" and isinstance(value, Mapping):
            own = {int(layer): config for layer, config in value.items()}
            changes[name] = {new: dict(own[old]) for new, old in enumerate(kept) if old in own}
    return changes
