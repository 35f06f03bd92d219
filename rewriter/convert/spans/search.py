"""From a model and text to plans of spans: read, profile, allocate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..attention import ConvertedAttention
from ..calibrate import Calibration
from ..layers import Decoder
from .allocation import Allocation, candidates, pareto
from .profile import profile_spans

__all__ = ["Measure", "search"]

Measure = Literal["influence", "mass"]


def search(
    decoder: Decoder,
    calibration: Calibration,
    densities: Sequence[float],
    *,
    measure: Measure = "influence",
    sinks: int = 4,
    classes: int = 2,
    lengths: Sequence[int] = (),
    attentions: Sequence[ConvertedAttention] = (),
) -> list[Allocation]:
    """The plan of least cost for each density, those left out that others beat. Raises ConversionRefused.

    `lengths` are those at which the budget holds; without them, that of the text's rows.
    """
    rows = calibration.required("head spans").shape[1]
    lengths = tuple(lengths) or (rows,)
    attentions = attentions or [ConvertedAttention.of(layer) for layer in decoder.layers]
    choices = candidates(lengths, sinks, rows)
    found = profile_spans(attentions, decoder, calibration, choices)
    costs = found.influence if measure == "influence" else found.mass
    return pareto(costs, choices, densities, lengths, classes)
