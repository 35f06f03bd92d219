"""Python that makes a value like one that was seen: small ones literally, others at random in the same range.

The expressions use `normal`, `whole`, `strided` and `inf`, which `python.py` writes into each file.
"""

from __future__ import annotations

from typing import Any

import torch

from ..compat import FakeTensor
from ..sizes import concrete

__all__ = ["fill_for", "fill_of_type"]

LITERAL = 64
"""Up to so many elements a tensor is written as it is."""

LOOK = 4096
"""Elements that are looked at for a range."""


def fill_for(value: Any, stored: str = "") -> str:
    """An expression for an input or a constant. With `stored`, larger tensors are read from there."""
    if not isinstance(value, torch.Tensor):
        number = concrete(value)
        return repr(number) if isinstance(number, bool | int | float | None) else "None"
    if isinstance(value, FakeTensor) or value.is_meta or value.layout is not torch.strided:
        return fill_of_type(str(value.dtype).removeprefix("torch."), tuple(concrete(s) for s in value.shape))
    value = value.detach()
    dtype = f", dtype={value.dtype}"
    if value.numel() <= LITERAL:
        if 0 in value.shape:
            return f"torch.empty({tuple(value.shape)}{dtype})"
        if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            return f"torch.full({tuple(value.shape)}, {value.flatten()[0].item()}{dtype})"
        return f"torch.tensor({value.tolist()}{dtype})"  # `inf` and `nan` are names in the file
    if stored:
        return stored
    made = _random(value, f"{tuple(value.shape)}", dtype)
    return made if value.is_contiguous() else f"strided({made}, {value.stride()})"


def _random(value: torch.Tensor, shape: str, dtype: str) -> str:
    seen = value.reshape(-1)[:LOOK]
    if value.dtype is torch.bool:
        return f"whole({shape}, 0, 1{dtype})"
    if value.dtype.is_floating_point or value.dtype.is_complex:
        seen = (seen.real if seen.is_complex() else seen).double()
        seen = seen[seen.isfinite() & (seen.abs() < 1e30)]  # masks hide with the least number there is
        mean, std = (float(seen.mean()), float(seen.std(correction=0))) if seen.numel() else (0.0, 1.0)
        return f"normal({shape}, {mean:.3g}, {std:.3g}{dtype})"
    return f"whole({shape}, {int(seen.min())}, {int(seen.max())}{dtype})"


def fill_of_type(dtype: str, sizes: tuple[int, ...] | None) -> str:
    """The same without a value to look at: integers are 0, so that they index whatever they index."""
    if sizes is None:
        return "0"
    if dtype == "bool" or "int" in dtype:
        return f"torch.full({sizes}, {dtype == 'bool'}, dtype=torch.{dtype})"
    return f"normal({sizes}, 0, 1, dtype=torch.{dtype})"
