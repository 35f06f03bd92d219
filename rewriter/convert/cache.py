"""`LatentCache`: what a converted model keeps from call to call, and nothing besides.

    cache = latent.LatentCache(model)                     # grows
    cache = latent.LatentCache(model, max_length=4096)    # fixed buffers, for compiled decoding
    model.generate(**inputs, past_key_values=cache)

Every layer holds the two tensors of its memory. Angles of the cached tokens, which memories that turn their keys late
need, are held once for all layers that share them.

A model that was not converted has such a cache if it makes its keys and values of a latent and hands them to its cache
in full: kept are the latents. They are read when the cache is made, which takes seconds: `reset` it for another text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from ..compat import mark_static_address
from .attention import ConvertedAttention
from .layers import ConversionRefused
from .own_latents import OwnLatent
from .read_latents import read_latents
from .rotation import Turns

__all__ = ["FixedLayer", "GrowingLayer", "LatentCache"]


class GrowingLayer(DynamicLayer):
    """Rows of any widths, joined to those of earlier calls."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (t.new_empty(*t.shape[:2], 0, t.shape[-1]) for t in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        _refuse_other_rows(self, key_states, value_states)
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        return int(self.keys.shape[-2]) if self.keys is not None else 0

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.keys, self.values) if t is not None]


class FixedLayer(StaticLayer):
    """Rows of any widths in buffers that are written in place."""

    is_croppable = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        assert self.keys is not None
        if value_states.shape[1] != key_states.shape[1]:  # of which the layer above makes as many
            self.values = self.keys.new_zeros(*value_states.shape[:2], self.max_cache_len, value_states.shape[-1])
            if not torch.compiler.is_compiling():
                mark_static_address(self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        _refuse_other_rows(self, key_states, value_states)
        return super().update(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number as for other layers; their rows are written over."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, not {tokens_to_remove}")
        if self.is_initialized:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._choose(torch.arange(self.batch_size, device=self.device)[indices.to(self.device)])

    def _choose(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self.batch_size = len(rows)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.keys, self.values, self.cumulative_length) if t is not None]


class GrowingLatents(GrowingLayer):
    """The latents of keys and values that a model hands over in full; those of all tokens are made of them."""

    def __init__(self, latent: OwnLatent) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.latent = latent

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        _refuse_unexplained(self, key_states, value_states)
        return self.latent.made(*super().update(*self.latent.kept(key_states, value_states)))


class FixedLatents(FixedLayer):
    """The same in buffers that are written in place."""

    def __init__(self, latent: OwnLatent, max_length: int) -> None:
        super().__init__(max_length)
        self.latent = latent

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        _refuse_unexplained(self, key_states, value_states)
        return self.latent.made(*super().update(*self.latent.kept(key_states, value_states)))


def _refuse_unexplained(layer: GrowingLatents | FixedLatents, key: Tensor, value: Tensor) -> None:
    """Before the first tokens: keys and values that the latent does not explain would be lost."""
    if torch.compiler.is_compiling() or layer.is_initialized:
        return
    if (error := layer.latent.error(key, value)) > max(16 * torch.finfo(key.dtype).eps, 1e-4):
        raise ValueError(
            f"LatentCache: keys and values are not made of the latent that was read (relative error {error:.1e}). It "
            "was made for another model, or the weights have changed since: make another cache."
        )


def _refuse_other_rows(layer: Any, first: Tensor, second: Tensor) -> None:
    for held, new in ((layer.keys, first), (layer.values, second)):
        if held is None:
            return
        if held.shape[0] != new.shape[0]:
            raise ValueError(
                f"LatentCache: it holds {held.shape[0]} rows of a batch, and this call has {new.shape[0]}. "
                "Make another cache, call reset(), or batch_repeat_interleave() for copies of a row."
            )
        if held.shape[1] != new.shape[1] or held.shape[3] != new.shape[3]:
            raise ValueError(
                f"LatentCache: it holds {held.shape[1]} heads of width {held.shape[3]} for a token, and this call "
                f"gives {new.shape[1]} of width {new.shape[3]}. It was made for another model; make one for this."
            )


class LatentCache(Cache):
    """A cache of transformers for a converted model, or for one that makes keys and values of latents of its own.

    Raises ValueError for any other model.
    """

    def __init__(self, model: nn.Module, max_length: int | None = None) -> None:
        attentions = sorted(
            (module for module in model.modules() if isinstance(module, ConvertedAttention)),
            key=lambda module: module.form.call.index,
        )
        _refuse_in_part(model, [attention.form.call.index for attention in attentions])
        if max_length is not None and max_length < 1:
            raise ValueError(f"LatentCache: max_length is {max_length}; give the number of tokens that it should hold.")
        self.max_length = max_length
        layers = [self._layer_of(attention) for attention in attentions]
        super().__init__(layers=layers or [self._own(latent) for latent in _latents_of(model)])
        for layer in self.layers:
            if hasattr(layer, "join"):
                layer.join(self.layers)
        self._turns: dict[int, Any] = {}
        self._turns_of: dict[int, int] = {}
        self._first: set[int] = set()
        for attention in attentions:
            if attention.memory.turns_late and attention.memory.rotary is not None:
                group, index = attention.form.turns, attention.form.call.index
                if group not in self._turns:
                    self._turns[group] = self._layer()
                    self._first.add(index)
                self._turns_of[index] = group

    def _layer_of(self, attention: ConvertedAttention) -> Any:
        if attention.reach is not None:
            return attention.reach.cache_layer(self.max_length)
        return attention.memory.cache_layer(self._layer)

    def _layer(self) -> Any:
        return GrowingLayer() if self.max_length is None else FixedLayer(self.max_length)  # type: ignore[no-untyped-call]

    def _own(self, latent: OwnLatent) -> Any:
        return GrowingLatents(latent) if self.max_length is None else FixedLatents(latent, self.max_length)

    def keep(
        self, first: Tensor, second: Tensor, turns: Turns | None, mask: Tensor | None, layer_idx: int
    ) -> tuple[Any, Any, Turns | None]:
        """What a converted attention made of new tokens; gives back what is kept of all, as its memory reads it."""
        if layer_idx == 0 and not torch.compiler.is_compiling():
            self._refuse_overflow(first.shape[-2])
        if turns is not None and layer_idx in self._turns_of:
            turns = self._update_turns(turns, layer_idx, first.shape[0])
        return *super().update(first, second, layer_idx, mask), turns

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """For attentions that were not converted. Raises ValueError where they have no latent of their own."""
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], GrowingLatents | FixedLatents):
            if layer_idx == 0 and not torch.compiler.is_compiling():
                self._refuse_overflow(key_states.shape[-2])
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        raise ValueError(
            f"LatentCache: layer {layer_idx} gave it keys and values, so it is not converted and they would be kept in "
            "full. Pass the model that latent.convert returned, or use a cache of transformers."
        )

    def _refuse_overflow(self, new: int) -> None:
        if self.max_length is not None and (held := int(self.get_seq_length())) + new > self.max_length:
            raise ValueError(
                f"LatentCache: it holds {held} tokens and this call has {new}, which is more than its max_length of "
                f"{self.max_length}. Make it longer, or call reset() before another text."
            )

    def _update_turns(self, turns: Turns, layer_idx: int, batch: int) -> Turns:
        """The angles of all cached tokens; the first layer that asks adds those of this call."""
        held = self._turns[self._turns_of[layer_idx]]
        if layer_idx in self._first:
            cos, sin = held.update(*(t.expand(batch, -1, -1).unsqueeze(1) for t in turns))
        else:
            cos, sin = held.keys, held.values
        return cos.squeeze(1), sin.squeeze(1)

    @property
    def nbytes(self) -> int:
        """Bytes of every live tensor, each storage once."""
        tensors = [t for layer in (*self.layers, *self._turns.values()) for t in _tensors_of(layer)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def compress(self) -> None:
        """Compress all tokens so far, where a first call alone was: a prompt in several calls, a conversation's turns.

        Nothing happens in layers that compress every token as it comes. Not for compiled code, which is compiled again
        for the lengths that result.
        """
        for layer in self.layers:
            if hasattr(layer, "compress"):
                layer.compress()

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        for held in self._turns.values():
            held.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        for held in self._turns.values():
            held.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        for held in self._turns.values():
            held.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for held in self._turns.values():
            held.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for held in self._turns.values():
            held.batch_select_indices(indices)


def _tensors_of(layer: Any) -> list[Tensor]:
    """The layer's own account of what it holds, or else its attributes."""
    return list(layer.tensors()) if hasattr(layer, "tensors") else list(_tensors(vars(layer).values()))


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among some values, those in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _latents_of(model: nn.Module) -> list[OwnLatent]:
    """Of a model without converted attentions."""
    try:
        return read_latents(model)
    except ConversionRefused as reason:
        raise ValueError(
            f"LatentCache: {type(model).__name__} has no converted attention, and no latent of its own that its cache "
            f"could keep ({reason}). Convert it first: model = latent.convert(model, recipe, ...); or use a cache of "
            "transformers."
        ) from reason


def _refuse_in_part(model: nn.Module, indices: Sequence[int]) -> None:
    """Where some layers are converted all must be, or the others would find no place."""
    if not indices:
        return
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None) or max(indices) + 1
    if missing := sorted(set(range(count)) - set(indices)):
        raise ValueError(
            f"LatentCache: of {count} layers of {name}, {', '.join(map(str, missing))} are not converted. "
            "Convert the whole model, or use a cache of transformers."
        )
