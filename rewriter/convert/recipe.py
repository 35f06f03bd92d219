"""What is asked for: a recipe, and where recipes and the modules that they put in are registered.

    @recipe
    @dataclass(frozen=True)
    class Halve:
        rank: int = 192
        name: ClassVar[str] = "halve"
        ...
        def convert(self, attentions, decoder, calibration): ...

A distribution adds its own through entry points of group `latent.recipes`, whose values are modules that register when
imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from torch import nn

from .attention import ConvertedAttention
from .calibrate import Calibration
from .layers import Decoder
from .memory import FullMemory
from .norms import HeadNorm
from .output_gate import OutputGate
from .own_angles import OwnAngles
from .query_scale import QueryScale
from .scoring import Sinks

__all__ = ["Needs", "Recipe", "part", "part_named", "recipe", "recipes"]

log = logging.getLogger(__name__)

Needs = Literal["nothing", "text", "gradients", "training"]

Class = TypeVar("Class", bound=type)


@runtime_checkable
class Recipe(Protocol):
    """A frozen dataclass whose fields are the choices that a user has (and the flags of `latent convert`).

    The first line of its docstring says what it does; `exact` says when nothing is lost.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    exact: ClassVar[str]

    def convert(self, attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration) -> None:
        """Change the modules, which compute what the layers of `decoder` do. Raises ConversionRefused."""
        ...


_recipes: dict[str, type[Any]] = {}
_parts: dict[str, type[nn.Module]] = {}


def recipe(made: Class) -> Class:
    """Register a recipe by its `name`."""
    _recipes[made.name] = made  # type: ignore[attr-defined]
    return made


def part(made: Class) -> Class:
    """Register a module that recipes put into an attention; saved models name it by its class."""
    _parts[made.__name__] = made
    return made


def recipes() -> dict[str, type[Any]]:
    """All recipes by name."""
    _load()
    return dict(sorted(_recipes.items()))


def part_named(name: str) -> type[Any]:
    """The class of a part of a saved model. Raises KeyError that says what is missing."""
    _load()
    if name not in _parts:
        raise KeyError(f"no recipe that is installed has a part {name!r}; there are {', '.join(sorted(_parts))}")
    return _parts[name]


@functools.cache
def _load() -> None:
    for entry in sorted(importlib.metadata.entry_points(group="latent.recipes"), key=lambda e: e.value):
        try:
            importlib.import_module(entry.module)
        except Exception as error:  # a broken plug-in must not take the others down
            log.warning("latent: %s of group latent.recipes could not be imported: %s", entry.value, error)


for own in (FullMemory, HeadNorm, OutputGate, OwnAngles, QueryScale, Sinks):
    part(own)
