"""Fit what a recipe put in to what each attention gave, layer by layer, by gradient descent on calibration text.

    minimise |attention(x) - model's own attention(x)|²  over the parameters of the memory

Components that explain keys and values best are not those that keep the output best: a few steps find these.
Nothing runs through the rest of the model, so that a step costs as much as one attention forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import ConvertedAttention
from .calibrate import Calibration, calls
from .layers import Decoder

__all__ = ["tune"]

ROWS = 32
"""Of calibration text: the hidden states of all layers are held at once. An eighth of them judges the result."""

RATE = 1e-3


def tune(
    attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration, steps: int, recipe: str
) -> None:
    """Change the memories of `attentions` where that brings their outputs closer, on rows that were not learnt from."""
    held = _calls(decoder, calibration, recipe)
    for n, (attention, layer) in enumerate(zip(attentions, decoder.layers, strict=True)):
        calibration.progress("tuning layers", n, len(attentions))
        _fit(attention, ConvertedAttention.of(layer), held.pop(layer.path), steps)
    calibration.progress("tuning layers", len(attentions), len(attentions))


def _calls(decoder: Decoder, calibration: Calibration, recipe: str) -> dict[str, list[dict[str, Any]]]:
    """What every attention is given for some rows, a batch at a time."""
    tokens = calibration.required(recipe)[:ROWS]
    names = {layer.path: layer.call.parameters for layer in decoder.layers}
    held: dict[str, list[dict[str, Any]]] = {path: [] for path in names}

    def see(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names[path], args, strict=False)) | kwargs
        held[path].append(given | {"past_key_values": None})

    device = next(decoder.model.parameters()).device
    with torch.no_grad(), calls(decoder.model, list(names), see):
        for rows in tokens.split(calibration.batch):
            calibration.run(rows.to(device))
    return held


def _fit(attention: ConvertedAttention, own: ConvertedAttention, given: list[dict[str, Any]], steps: int) -> None:
    memory, dtype = attention.memory, next(attention.memory.parameters()).dtype
    accurate = torch.promote_types(dtype, torch.float32)
    attention.to(accurate)
    own.to(accurate)
    batches = [{name: _cast(value, accurate) for name, value in one.items()} for one in given]
    with torch.no_grad():
        wanted = [own(**one)[0] for one in batches]
    judged = max(1, len(batches) // 8)
    learnt = range(len(batches) - judged) if len(batches) > judged else range(len(batches))

    def error(at: int) -> Tensor:
        found: Tensor = attention(**batches[at])[0]
        return (found - wanted[at]).square().mean() / wanted[at].square().mean()

    def judge() -> float:
        with torch.no_grad():
            return sum(float(error(at)) for at in range(len(batches) - judged, len(batches)))

    before, start = {name: t.clone() for name, t in memory.state_dict().items()}, judge()
    optimiser = torch.optim.Adam(memory.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        optimiser.zero_grad()
        error(learnt[step % len(learnt)]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    if not judge() < start:
        memory.load_state_dict(before)
    memory.zero_grad()
    attention.to(dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(_cast(one, dtype) for one in value) if isinstance(value, tuple | list) else value
