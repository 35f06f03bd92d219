"""A causal language model over windows of tokens, its logits a few rows at a time: a vocabulary is wide.

B windows, L tokens of a window, R rows of a piece, C hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CacheOf", "Counted", "Scoring", "batches", "call", "layers_and_head", "reader", "uncounted"]

CacheOf = Callable[[Any], Any]
"""model -> an empty cache for it."""

Counted = Callable[[str, int], AbstractContextManager[Callable[[], object]]]
"""(what, how many) -> a block in which each step is told; the command line draws a bar."""

Layers = Callable[[Tensor], Tensor]
Head = Callable[[Tensor], Tensor]
Reader = Callable[[Tensor], Iterator[Tensor]]

BATCH_TOKENS = 1024
"""Tokens of a batch: on a CPU larger ones are no faster."""


@dataclass(frozen=True)
class Scoring:
    """Which tokens of a window are scored: all after the first `prefix`.

    With a cache the prefix is one call, and each `call` scored tokens are another; without one a window is one call,
    and the logits of `call` tokens are in memory at a time.
    """

    prefix: int = 1
    call: int = 128

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Rows of logits that predict the scored tokens; the first comes from the call that reads the prefix."""
        if not 1 <= self.prefix < length or self.call < 1:
            raise ValueError(
                f"{length} tokens cannot be scored after a prefix of {self.prefix} in calls of {self.call}: "
                "a prefix has at least one token, and leaves at least one to score"
            )
        starts = [self.prefix - 1, *range(self.prefix, length - 1, self.call)]
        return list(zip(starts, [*starts[1:], length - 1], strict=True))

    def targets(self, ids_BL: Tensor) -> list[Tensor]:
        """The scored tokens, as the spans divide them."""
        return [ids_BL[:, start + 1 : stop + 1] for start, stop in self.spans(ids_BL.shape[1])]


@contextmanager
def uncounted(what: str, total: int) -> Iterator[Callable[[], object]]:
    """Counts nothing."""
    yield lambda: None


def batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """[N, L] in parts of a few windows."""
    parts: tuple[Tensor, ...] = tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))
    return parts


def call(model: Any, ids: Tensor, rows: Tensor | None = None, cache: Any = None) -> Any:
    """One call of the model; `rows` are the only positions whose logits are needed, without it all are.

    With `cache=None` none is kept.
    """
    options: dict[str, Any] = {"use_cache": cache is not None}
    if cache is not None:
        options["past_key_values"] = cache
    if rows is None:
        return model(input_ids=ids, **options)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids, logits_to_keep=rows, **options)
    output = model(input_ids=ids, **options)
    output.logits = output.logits[:, rows]
    return output


def layers_and_head(model: Any) -> tuple[Layers, Head] | None:
    """The layers, and the one linear map that makes logits of their result; None if the model is more than these.

    Some models cap or scale their logits, or are compiled as a whole: whether the two parts are the model is tried on
    a few tokens.
    """
    body, head = getattr(model, "base_model", model), model.get_output_embeddings()
    if body is model or head is None:
        return None

    def layers(ids_BL: Tensor) -> Tensor:
        states_BLC: Tensor = body(input_ids=ids_BL, use_cache=False).last_hidden_state
        return states_BLC

    ids = torch.arange(4, device=model.device)[None] % head.weight.shape[0]
    return (layers, head) if torch.equal(head(layers(ids)), call(model, ids).logits) else None


def reader(model: Any, scoring: Scoring, cache_of: CacheOf | None = None) -> Reader:
    """ids_BL -> logits_BRV of the scored tokens, in order; through a cache if `cache_of` makes one."""
    if cache_of is not None:
        return lambda ids_BL: _through_cache(model, ids_BL, scoring, cache_of)
    layers, head = layers_and_head(model) or (lambda ids_BL: call(model, ids_BL).logits, lambda logits: logits)

    def read(ids_BL: Tensor) -> Iterator[Tensor]:
        states_BLC = layers(ids_BL)
        for start, stop in scoring.spans(ids_BL.shape[1]):
            yield head(states_BLC[:, start:stop])

    return read


def _through_cache(model: Any, ids_BL: Tensor, scoring: Scoring, cache_of: CacheOf) -> Iterator[Tensor]:
    (last, _), *rest = scoring.spans(ids_BL.shape[1])
    cache = cache_of(model)
    yield call(model, ids_BL[:, : last + 1], torch.tensor([last], device=ids_BL.device), cache).logits
    for start, stop in rest:
        yield call(model, ids_BL[:, start:stop], cache=cache).logits
