"""Repeated strings: how much better a model predicts random tokens when they come a second time.

gain(gap) = NLL(first) − NLL(second) per token, where `gap` tokens lie from the first occurrence to the second. What a
cache forgets at that distance is lost here, however good the perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .forward import CacheOf, Counted, call, uncounted

__all__ = ["Recall", "fitting", "needed", "recall", "repeated"]

STRING = 32
"""Tokens of a string. The first is not scored: that a string begins again cannot be known."""
LEAD = 16
"""Tokens of text before the first string."""


@dataclass(frozen=True)
class Recall:
    """One gap; a value for each draw, in nats per token."""

    gap: int
    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def gain(self) -> float:
        return sum(a - b for a, b in zip(self.first, self.second, strict=True)) / len(self.first)


@dataclass(frozen=True)
class Repeated:
    """A sequence in which several strings come twice, each at its own gap: all second occurrences are at the end."""

    ids: Tensor
    first: tuple[int, ...]
    second: tuple[int, ...]
    """Where the strings begin."""


def needed(gaps: Sequence[int]) -> int:
    """Tokens of a sequence: the lead, and the string whose first occurrence lies farthest before the end."""
    return max((LEAD + gap + STRING * (len(gaps) - n) for n, gap in enumerate(sorted(gaps))), default=0)


def fitting(gaps: Sequence[int], positions: int | None) -> tuple[int, ...]:
    """The gaps that a model of so many positions can see."""
    ordered = tuple(sorted(set(gaps)))
    while ordered and positions is not None and needed(ordered) > positions:
        ordered = ordered[:-1]
    return ordered


def repeated(filler_L: Tensor, gaps: Sequence[int], vocabulary: int, seed: int) -> Repeated:
    """Random strings between tokens of a text."""
    gaps = sorted(gaps)
    if not gaps or gaps[0] < STRING or any(b - a < 2 * STRING for a, b in pairwise(gaps)):
        raise ValueError(f"gaps {gaps}: the least is {STRING}, and the others are at least {2 * STRING} apart")
    length = needed(gaps)
    if len(filler_L) < length:
        raise ValueError(f"a gap of {gaps[-1]} needs {length} tokens of text, not {len(filler_L)}")
    ids = filler_L[:length].clone()
    second = tuple(length - STRING * (len(gaps) - n) for n in range(len(gaps)))
    first = tuple(start - gap for start, gap in zip(second, gaps, strict=True))
    generator = torch.Generator().manual_seed(seed)
    for a, b in zip(first, second, strict=True):
        ids[a : a + STRING] = ids[b : b + STRING] = torch.randint(vocabulary, (STRING,), generator=generator)
    return Repeated(ids, first, second)


@torch.no_grad()
def recall(
    model: Any,
    fillers_DL: Tensor,
    gaps: Sequence[int],
    cache_of: CacheOf | None = None,
    seed: int = 0,
    counted: Counted = uncounted,
) -> tuple[Recall, ...]:
    """One draw for each row of text; through a cache, what lies before the second occurrences is one call."""
    gaps = sorted(gaps)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    first: list[list[float]] = []
    second: list[list[float]] = []
    with counted("recall", len(fillers_DL)) as tick:
        for number, filler_L in enumerate(fillers_DL):
            string = repeated(filler_L.cpu(), gaps, vocabulary, seed + number)
            nll_L = _nll(model, string, cache_of)
            for starts, means in ((string.first, first), (string.second, second)):
                means.append([float(nll_L[start + 1 : start + STRING].mean()) for start in starts])
            tick()
    columns = zip(gaps, zip(*first, strict=True), zip(*second, strict=True), strict=True)
    return tuple(Recall(gap, tuple(a), tuple(b)) for gap, a, b in columns)


def _nll(model: Any, string: Repeated, cache_of: CacheOf | None) -> Tensor:
    """Of each token of the sequence; nan where it belongs to no string."""
    ids_BL = string.ids[None].to(model.device)
    length, border = ids_BL.shape[1], string.second[0]
    starts = torch.tensor([*string.first, *string.second])
    targets = (starts[:, None] + torch.arange(1, STRING)).flatten().sort().values.to(model.device)
    rows = targets - 1
    if cache_of is None:
        logits_RV = call(model, ids_BL, rows).logits[0]
    else:
        cache = cache_of(model)
        before = call(model, ids_BL[:, :border], rows[rows < border], cache).logits[0]
        after = call(model, ids_BL[:, border:], rows[rows >= border] - border, cache).logits[0]
        logits_RV = torch.cat([before, after])
    nll_L = torch.full((length,), float("nan"))
    nll_L[targets.cpu()] = F.cross_entropy(logits_RV.float(), ids_BL[0, targets], reduction="none").cpu()
    return nll_L
