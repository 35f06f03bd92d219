"""What a cache holds, counted in the bytes of its live tensors, and how fast a model decodes with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from .forward import CacheOf, Counted, call, uncounted

__all__ = ["Decoding", "cache_bytes", "decoding"]


@dataclass(frozen=True)
class Decoding:
    """A cache that holds so many tokens."""

    tokens: int
    bytes: int
    seconds: float
    """Of one more token; the median."""

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds


def cache_bytes(cache: Any) -> int:
    """Bytes of every tensor that a cache holds, wherever it holds it; a storage that several share counts once.

    Whole storages count: a narrow view of a large tensor keeps all of it alive. Parameters and what lies inside
    modules belong to the model.
    """
    storages = {}
    for tensor in _tensors(cache, set()):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, torch.nn.Parameter | torch.nn.Module | str | bytes):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, type | ModuleType | FunctionType | MethodType):
        return
    held: list[Any] = list(value.values()) if isinstance(value, Mapping) else []
    if isinstance(value, list | tuple | set | frozenset):
        held += value
    held += vars(value).values() if hasattr(value, "__dict__") else ()
    slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
    held += (getattr(value, name) for name in slots if hasattr(value, name))
    for item in held:
        yield from _tensors(item, seen)


@torch.no_grad()
def decoding(
    model: Any,
    ids_L: Tensor,
    lengths: Sequence[int],
    cache_of: CacheOf | None = None,
    steps: int = 16,
    counted: Counted = uncounted,
) -> tuple[Decoding, ...]:
    """For each length: a prefill in one call, the bytes of its cache, then `steps` tokens one by one.

    Without `cache_of` the cache is the one that the model makes for itself.
    """
    found = []
    with counted("decoding", len(lengths) * (steps + 1)) as tick:
        for length in sorted(lengths):
            if len(ids_L) < length:
                raise ValueError(f"to fill a cache with {length} tokens takes as many of text, not {len(ids_L)}")
            found.append(_decode(model, ids_L[:length].to(model.device)[None], cache_of, steps, tick))
    return tuple(found)


def _decode(model: Any, ids_BL: Tensor, cache_of: CacheOf | None, steps: int, tick: Callable[[], object]) -> Decoding:
    last = torch.tensor([ids_BL.shape[1] - 1], device=ids_BL.device)
    if cache_of is None:
        output = model(input_ids=ids_BL, use_cache=True)
        cache = output.past_key_values
    else:
        cache = cache_of(model)
        output = call(model, ids_BL, last, cache)
    held = cache_bytes(cache)
    tick()
    seconds = []
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        output = call(model, token, cache=cache)
        _wait(token.device)
        seconds.append(time.perf_counter() - start)
        tick()
    return Decoding(ids_BL.shape[1], held, statistics.median(seconds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
