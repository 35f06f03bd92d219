"""The two calls of a language model that are worth timing: a prefill, and one token against a filled cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .targets import Target, TargetError
from .timing import Call

__all__ = ["CacheKind", "Step", "cache_bytes_per_token", "decode_step", "forward_step", "has_cache", "prefill_step"]

CacheKind = Literal["static", "dynamic"]


@dataclass(frozen=True)
class Step:
    """One call of a model, to be made with the model itself or compiled ones. Nothing is shared between makers."""

    title: str
    queries: int
    make: Callable[[Any], tuple[Call, Any]]
    """(the model or a compiled one) -> the call, and the cache it reads or None."""


def has_cache(target: Target) -> bool:
    """Whether the target is a causal language model that transformers' caches fit."""
    model = target.model
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    return (
        callable(generates)
        and bool(generates())
        and not getattr(config, "is_encoder_decoder", False)
        and "past_key_values" in inspect.signature(model.forward).parameters
        and "input_ids" in target.kwargs
    )


def forward_step(target: Target) -> Step:
    """The plain call of a target."""

    def make(forward: Any) -> tuple[Call, Any]:
        return Call(lambda: forward(*target.args, **target.kwargs)), None

    return Step("forward   the call as the target makes it", 0, make)


def prefill_step(target: Target, tokens: int) -> Step:
    """`tokens` tokens without a cache, and the logits of the last one only, as `generate` asks for them."""
    ids = _repeated(target.kwargs["input_ids"], tokens)
    more = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(target.model.forward).parameters else {}

    def make(forward: Any) -> tuple[Call, Any]:
        return Call(lambda: forward(input_ids=ids, use_cache=False, **more).logits), None

    return Step(f"prefill   {tokens} tokens", tokens, make)


def decode_step(target: Target, cached: int, kind: CacheKind) -> Step:
    """One token whose keys are the last of `cached`; the others are random numbers, the same for every maker."""
    token = target.kwargs["input_ids"][:, -1:]

    def make(forward: Any) -> tuple[Call, Any]:
        cache = filled_cache(target.model, token, cached, kind)
        call = Call(lambda: forward(input_ids=token, past_key_values=cache).logits, _restorer(cache))
        return call, cache

    return Step(f"decode    1 token against {cached} cached, {kind} cache", 1, make)


def filled_cache(model: Any, token: Any, cached: int, kind: CacheKind) -> Any:
    """A cache of transformers that holds all but the last of `cached` tokens. Raises TargetError."""
    import torch
    import transformers

    if cached < 2:
        raise TargetError(f"--cached {cached}: a cache holds at least one token before the new one.", "Give 2 or more.")
    if kind == "static":
        cache: Any = transformers.StaticCache(config=model.config, max_cache_len=cached)
    else:
        cache = transformers.DynamicCache(config=model.config)
    generator = torch.Generator(token.device).manual_seed(0)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache)  # makes the tensors, in the shapes that the model caches
        for layer in cache.layers:
            if getattr(layer, "keys", None) is None:
                raise TargetError(
                    f"{type(model).__name__} caches {type(layer).__name__}, which holds no keys and values.",
                    "Only the prefill can be timed: --phase prefill.",
                )
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                if kind == "dynamic":
                    tensor = tensor.new_empty((*tensor.shape[:-2], cached - 1, tensor.shape[-1]))
                    setattr(layer, name, tensor)
                tensor.normal_(generator=generator)
            for name in ("cumulative_length", "cumulative_length_int"):
                held = getattr(layer, name, None)
                if isinstance(held, torch.Tensor):
                    held.fill_(cached - 1)
                elif isinstance(held, int):
                    setattr(layer, name, cached - 1)
    return cache


def cache_bytes_per_token(cache: Any) -> float:
    """Bytes of the live tensors of a cache over the tokens that each has room for."""
    seen: dict[int, float] = {}
    for tensor in _tensors(cache):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes() / tensor.shape[-2]
    return sum(seen.values())


def _tensors(cache: Any) -> Iterator[Any]:
    """The keys and values of the layers, whatever they hold."""
    for layer in cache.layers:
        yield layer.keys
        yield layer.values


def _restorer(cache: Any) -> Callable[[], object]:
    """What puts a cache back to how it is now: counters by value, tensors by reference (their rows are rewritten)."""
    import torch

    numbers = [(t, t.clone()) for layer in cache.layers for t in vars(layer).values() if _is_counter(t)]
    small = (bool, int, float)
    states = [
        (layer, {n: v for n, v in vars(layer).items() if isinstance(v, (*small, torch.Tensor))})
        for layer in cache.layers
    ]

    def restore() -> None:
        for layer, state in states:
            vars(layer).update(state)
        for tensor, value in numbers:
            tensor.copy_(value)

    return restore


def _is_counter(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point()


def _repeated(ids: Any, tokens: int) -> Any:
    return ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens].contiguous()
