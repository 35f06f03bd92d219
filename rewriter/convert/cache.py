"""`LatentCache`: what a converted model keeps from call to call, and nothing besides.

    cache = latent.LatentCache(model)                     # grows
    cache = latent.LatentCache(model, max_length=4096)    # fixed buffers, for compiled decoding
    model.generate(**inputs, past_key_values=cache)

Every layer holds the two tensors of its memory. Angles of the cached tokens, which memories that turn their keys late
need, are held once for all layers that share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .attention import ConvertedAttention
from .rotation import Turns

__all__ = ["LatentCache"]


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Rows of any widths, joined to those of earlier calls."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return int(self.keys.shape[-2]) if self.keys is not None else 0


class FixedLayer(StaticLayer):  # type: ignore[no-untyped-call]
    """Rows of any widths in buffers that are written in place."""

    is_croppable = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number as for other layers; their rows are written over."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, not {tokens_to_remove}")
        if self.is_initialized:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)


class LatentCache(Cache):
    """A cache of transformers for a converted model. Raises ValueError for any other model."""

    def __init__(self, model: nn.Module, max_length: int | None = None) -> None:
        attentions = sorted(
            (module for module in model.modules() if isinstance(module, ConvertedAttention)),
            key=lambda module: module.form.call.index,
        )
        if not attentions:
            raise ValueError(
                f"LatentCache: {type(model).__name__} has no converted attention, so there is nothing small to keep. "
                "Convert it first: model = latent.convert(model, recipe, ...); or use a cache of transformers."
            )
        indices = [attention.form.call.index for attention in attentions]
        if indices != list(range(len(indices))):
            raise ValueError(f"LatentCache: the converted layers are {indices}, and some in between are not converted.")
        self.max_length = max_length
        super().__init__(layers=[self._layer_of(attention) for attention in attentions])
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

    def update_turns(self, turns: Turns, layer_idx: int, batch: int) -> Turns:
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
        tensors = [t for layer in (*self.layers, *self._turns.values()) for t in _tensors(vars(layer).values())]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        for held in self._turns.values():
            held.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        for held in self._turns.values():
            held.reorder_cache(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        for held in self._turns.values():
            held.crop(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for held in self._turns.values():
            held.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for held in self._turns.values():
            held.batch_select_indices(indices)


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among some values, those in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
