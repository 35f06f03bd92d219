"""The fixed layer of a cache whose heads see spans: buffers that are written in place, for compiled decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...compat import mark_static_address
from .attention import AtHand, Keys, rows_at
from .cache import Classes, Pair, SpanLayer, dropped, first_tokens
from .span import Span

__all__ = ["FixedSpans"]


class FixedSpans(SpanLayer):
    """Buffers that are written in place: for each class the slots of what is kept for good, then a ring.

    The token at position p that is not kept goes to place p mod w of a ring of w.
    """

    is_compileable = True
    is_croppable = False
    cumulative_length: Tensor  # type: ignore[assignment]

    def __init__(self, classes: Classes, max_length: int) -> None:
        super().__init__(classes)
        self.max_length = max_length
        self.cumulative_length = torch.tensor(0, dtype=torch.long)
        self.buffers: list[Pair] = []
        rings = [(span.kept(max_length), span.held(max_length)) for span, _ in self.classes]
        self.sizes = [(kept, ring) if ring < max_length else (0, max_length) for kept, ring in rings]
        """Of each class the slots, and the places of the ring; a class that sees everything has one for each token."""

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_length, 0

    def get_max_length(self) -> int:
        return self.max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        for (_, heads), (kept, ring) in zip(self.classes, self.sizes, strict=True):
            key, value = (x.new_zeros(x.shape[0], heads, kept + ring, x.shape[3]) for x in (key_states, value_states))
            self.buffers.append((key, value))
        if not torch.compiler.is_compiling():
            for tensor in self._tensors():
                mark_static_address(tensor)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, mask: Tensor | None = None
    ) -> list[AtHand]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        before = self.cumulative_length.clone()
        if not torch.compiler.is_compiling() and int(before) + tokens > self.max_length:
            raise ValueError(f"{int(before)} + {tokens} tokens are more than max_length={self.max_length} of the cache")
        self.cumulative_length.add_(tokens)
        if tokens > 1:
            self._start.copy_(first_tokens(self._start, before, mask, tokens))
        positions = before + torch.arange(tokens, device=self.device) - self._start[:, None]
        hands = []
        for n, span, key, value in self._by_class(key_states, value_states):
            if self.sizes[n][1] == self.max_length:
                hands.append(self._every(n, span, (key, value), positions, before))
            else:
                hands.append((self._one if tokens == 1 else self._many)(n, span, (key, value), positions))
        return hands

    def _every(self, n: int, span: Span, new: Pair, positions: Tensor, before: Tensor) -> AtHand:
        places = before + torch.arange(positions.shape[1], device=self.device)
        for buffer, x in zip(self.buffers[n], new, strict=True):
            buffer.index_copy_(2, places, x)
        return AtHand(span, positions, self._start, Keys(*self.buffers[n], positions, None), None, None)

    def _one(self, n: int, span: Span, new: Pair, positions: Tensor) -> AtHand:
        (kept, ring), buffers = self.sizes[n], self.buffers[n]
        place = torch.where(span.keeps(positions), span.slot(positions), kept + positions % ring)
        batch = torch.arange(len(place), device=self.device)[:, None]
        for buffer, x in zip(buffers, new, strict=True):
            buffer[batch, :, place] = x.transpose(1, 2)
        held = Keys(*buffers, self._places(n, span, positions), kept)
        return AtHand(span, positions, self._start, held, None, ring)

    def _many(self, n: int, span: Span, new: Pair, positions: Tensor) -> AtHand:
        (kept, ring), buffers = self.sizes[n], self.buffers[n]
        first, last = positions[:, :1], positions[:, -1:]
        places = self._places(n, span, positions)
        fresh = ((places >= first) & (places <= last))[:, None, :, None]
        found = rows_at(new, (places - first).clamp(0, positions.shape[1] - 1))
        filled = [torch.where(fresh, x, buffer) for x, buffer in zip(found, buffers, strict=True)]
        key, value = (torch.cat((x[:, :, :kept], b[:, :, kept:]), 2) for x, b in zip(filled, buffers, strict=True))
        held = Keys(key, value, torch.cat((places[:, :kept], self._places(n, span, first - 1)[:, kept:]), 1), kept)
        for buffer, x in zip(buffers, filled, strict=True):
            buffer.copy_(x)
        return AtHand(span, positions, self._start, held, Keys(*new, positions, 0), ring)

    def _places(self, n: int, span: Span, positions: Tensor) -> Tensor:
        """What each row of the buffers holds once the newest of these positions was written, [B, rows]."""
        kept, ring = self.sizes[n]
        last, row = positions[:, -1:], torch.arange(kept + ring, device=self.device)
        at, place = last % ring, row - kept
        newest = last - at + place - torch.where(place > at, ring, 0)
        return torch.where(row < kept, span.token(row), newest) if kept else newest

    def _tensors(self) -> list[Tensor]:
        return [*(tensor for pair in self.buffers for tensor in pair), self._start, self.cumulative_length]

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.buffers = [(change(key), change(value)) for key, value in self.buffers]

    def reset(self) -> None:
        if self.is_initialized:
            for tensor in self._tensors():
                tensor.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number as for other layers."""
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        seen = int(self.cumulative_length)
        left = max(0, seen - abs(tokens_to_remove))
        if any(ring < seen for _, ring in self.sizes):
            raise dropped(left)
        self.cumulative_length.fill_(left)
