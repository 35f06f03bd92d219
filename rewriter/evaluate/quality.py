"""Perplexity, and how far a changed model is from its original: KL, and whether both would choose the same token.

KL(p || q) = Σ_v p(v) (log p(v) − log q(v)), with p the original's prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .forward import CacheOf, Counted, Scoring, batches, layers_and_head, reader, uncounted

__all__ = ["Comparison", "Perplexity", "Reference", "compare", "interval", "perplexity", "remember"]

Range = tuple[float, float]
Read = Callable[[int], Iterator[Tensor]]
"""The number of a batch -> its logits_BRV, piece by piece."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens."""

    nlls: tuple[float, ...]
    """The mean of each window, in nats per token; every window has as many scored tokens."""
    tokens: int
    """Scored tokens of all windows together."""

    @property
    def mean(self) -> float:
        return math.exp(sum(self.nlls) / len(self.nlls))

    def interval(self, level: float = 0.95) -> Range:
        low, high = interval(self.nlls, level)
        return math.exp(low), math.exp(high)


@dataclass(frozen=True)
class Comparison:
    """A changed model beside its original, on the same tokens."""

    reference: Perplexity
    model: Perplexity
    kls: tuple[float, ...]
    """The mean of each window, in nats per token."""
    agreements: tuple[float, ...]
    """The share of each window's tokens for which both models' likeliest one is the same."""

    @property
    def kl(self) -> float:
        return sum(self.kls) / len(self.kls)

    @property
    def agreement(self) -> float:
        return sum(self.agreements) / len(self.agreements)

    @property
    def increase(self) -> float:
        """0.1 for a perplexity that is 10 % higher."""
        return self.model.mean / self.reference.mean - 1

    def increase_interval(self, level: float = 0.95) -> Range:
        """Much narrower than those of both perplexities: a window that is hard for one is hard for the other."""
        pairs = zip(self.model.nlls, self.reference.nlls, strict=True)
        low, high = interval([ours - theirs for ours, theirs in pairs], level)
        return math.expm1(low), math.expm1(high)


@dataclass(frozen=True)
class Reference:
    """An original on some windows: its layers have run, its logits are made again from their result when needed."""

    tokens: Tensor
    scoring: Scoring
    read: Read

    @torch.no_grad()
    def perplexity(self) -> Perplexity:
        return _perplexity(self.read, self.tokens, self.scoring, lambda: None)


def interval(values: Sequence[float], level: float = 0.95, draws: int = 2000, seed: int = 0) -> Range:
    """Where the mean lies if other windows are drawn: a bootstrap whose blocks are whole windows.

    Tokens of a window depend on each other, so that single tokens must not be drawn.
    """
    means = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(means), (draws, len(means)), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = means[picks].mean(1).quantile(ends).tolist()
    return low, high


@torch.no_grad()
def perplexity(
    model: Any,
    tokens_NL: Tensor,
    cache_of: CacheOf | None = None,
    scoring: Scoring | None = None,
    counted: Counted = uncounted,
) -> Perplexity:
    """Teacher forced, without a cache or through the one that `cache_of(model)` makes."""
    scoring = scoring or Scoring()
    read, some = reader(model, scoring, cache_of), batches(tokens_NL.to(model.device))
    with counted("perplexity", len(some)) as tick:
        return _perplexity(lambda number: read(some[number]), tokens_NL, scoring, tick)


@torch.no_grad()
def remember(model: Any, tokens_NL: Tensor, scoring: Scoring | None = None, counted: Counted = uncounted) -> Reference:
    """Run an original once, to compare several changed models with it; it need not be kept."""
    scoring = scoring or Scoring()
    parts = layers_and_head(model)
    some = batches(tokens_NL.to(model.device))
    if parts is None:
        whole = reader(model, scoring)
        return Reference(tokens_NL, scoring, lambda number: whole(some[number]))
    layers, head = parts
    first = scoring.prefix - 1
    states: list[Tensor] = []
    with counted("original", len(some)) as tick:
        for ids_BL in some:
            states.append(layers(ids_BL)[:, first:].clone())
            tick()

    def read(number: int) -> Iterator[Tensor]:
        for start, stop in scoring.spans(tokens_NL.shape[1]):
            yield head(states[number][:, start - first : stop - first])

    return Reference(tokens_NL, scoring, read)


@torch.no_grad()
def compare(
    reference: Any,
    model: Any,
    tokens_NL: Tensor,
    cache_of: CacheOf | None = None,
    scoring: Scoring | None = None,
    counted: Counted = uncounted,
) -> Comparison:
    """A changed model against its original, or against what `remember` kept of it; the original uses no cache."""
    if not isinstance(reference, Reference):
        reference = remember(reference, tokens_NL, scoring, counted)
    if not torch.equal(reference.tokens, tokens_NL) or reference.scoring != (scoring or reference.scoring):
        raise ValueError(
            "the original was run on other tokens than the model is to be compared on: call remember again"
        )
    scoring = reference.scoring
    read, some = reader(model, scoring, cache_of), batches(tokens_NL.to(model.device))
    sums: list[Tensor] = []
    with counted("comparison", len(some)) as tick:
        for number, ids_BL in enumerate(some):
            pieces = zip(reference.read(number), read(ids_BL), scoring.targets(ids_BL), strict=True)
            sums.append(_total(_compared(*piece) for piece in pieces))
            tick()
    scored = tokens_NL.shape[1] - scoring.prefix
    theirs, ours, kls, same = ((column / scored).tolist() for column in torch.cat(sums).unbind(1))
    count = len(tokens_NL) * scored
    return Comparison(Perplexity(tuple(theirs), count), Perplexity(tuple(ours), count), tuple(kls), tuple(same))


def _compared(original_BRV: Tensor, changed_BRV: Tensor, targets_BR: Tensor) -> Tensor:
    """[B, 4]: both models' negative log-likelihoods, the KL and the agreements, summed over the rows."""
    p, q = _log_softmax(original_BRV), _log_softmax(changed_BRV)
    kl_B = (p.exp() * (p - q)).sum((1, 2))
    same_B = (p.argmax(-1) == q.argmax(-1)).sum(1)
    return torch.stack([_nll(p, targets_BR), _nll(q, targets_BR), kl_B.double(), same_B.double()], dim=1)


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _log_softmax(logits_BRV: Tensor) -> Tensor:
    """In 32 bits at least: a sum over a vocabulary is long."""
    return F.log_softmax(logits_BRV.to(torch.promote_types(logits_BRV.dtype, torch.float32)), dim=-1)


def _nll(log_BRV: Tensor, targets_BR: Tensor) -> Tensor:
    return -log_BRV.gather(2, targets_BR[..., None].to(log_BRV.device)).sum((1, 2)).double()


def _perplexity(read: Read, tokens_NL: Tensor, scoring: Scoring, tick: Callable[[], object]) -> Perplexity:
    sums: list[Tensor] = []
    for number, ids_BL in enumerate(batches(tokens_NL)):
        pieces = zip(read(number), scoring.targets(ids_BL), strict=True)
        sums.append(_total(_nll(_log_softmax(logits_BRV), targets_BR) for logits_BRV, targets_BR in pieces))
        tick()
    scored = tokens_NL.shape[1] - scoring.prefix
    return Perplexity(tuple((torch.cat(sums) / scored).tolist()), len(tokens_NL) * scored)
