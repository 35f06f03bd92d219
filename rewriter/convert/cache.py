"""`LatentCache`: what a converted model keeps from call to call, and nothing besides.

    cache = latent.LatentCache(model)                     # grows
    cache = latent.LatentCache(model, max_length=4096)    # fixed buffers, for compiled decoding
    model.generate(**inputs, past_key_values=cache)

Every layer holds the two tensors of its memory. Angles of the cached tokens, which memories that turn their keys late
need, are held once for all layers that share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .attention import ConvertedAttention
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
    """A cache of transformers for a converted model. Raises ValueError for any other model."""

    def __init__(self, model: nn.Module, max_length: int | None = None) -> None:
        attentions = sorted(
            (module for module in model.modules() if isinstance(module, ConvertedAttention)),
            key=lambda module: module.form.call.index,
        )
        _refuse_unconverted(model, [attention.form.call.index for attention in attentions])
        if max_length is not None and max_length < 1:
            raise ValueError(f"LatentCache: max_length is {max_length}; give the number of tokens that it should hold.")
        self.max_length = max_length
        super().__init__(layers=[self._layer_of(attention) for attention in attentions])
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
        """Raises ValueError: only attentions that were not converted call it."""
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


def _refuse_unconverted(model: nn.Module, indices: Sequence[int]) -> None:
    """Every layer of the model must be converted, or the others would find no place."""
    name = type(model).__name__
    if not indices:
        raise ValueError(
            f"LatentCache: {name} has no converted attention, so there is nothing small to keep: its layers hand keys "
            "and values to a cache in full, also where they are made of a latent. "
            "Convert it first: model = latent.convert(model, recipe, ...); or use a cache of transformers."
        )
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None) or max(indices) + 1
    if missing := sorted(set(range(count)) - set(indices)):
        raise ValueError(
            f"LatentCache: of {count} layers of {name}, {', '.join(map(str, missing))} are not converted. "
            "Convert the whole model, or use a cache of transformers."
        )
