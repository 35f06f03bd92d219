"""Layers of a cache whose heads see spans: for each class of heads the tokens that are kept for good, and a ring.

Positions count from the first token of a row that is no padding, so that a row which was padded on the left holds what
it would hold alone. Kept tokens have slots of their own; of the others a class holds the newest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..compat import mark_static_address
from .span_attention import AtHand, Keys, rows_at
from .spans import Span

__all__ = ["Classes", "FixedSpans", "GrowingSpans", "SpanLayer", "leading"]

Classes = Sequence[tuple[Span, int]]
"""Spans, each with how many of the key heads have it; the heads in this order."""

Pair = tuple[Tensor, Tensor]
"""Keys and values, [B, heads, rows, width] each."""


def _first_tokens(start: Tensor, before: Tensor | int, mask: Tensor | None, tokens: int) -> Tensor:
    """How many tokens of padding a row begins with, [B], once `tokens` more have come after those `before`."""
    if mask is None or tokens == 1:  # a token that comes alone is no padding
        return start
    columns = torch.arange(tokens, device=mask.device) + before
    return torch.where(start == before, before + leading(mask.index_select(-1, columns)), start)


def leading(mask: Tensor) -> Tensor:
    """How many of the first keys no query sees, [B]."""
    own = mask[:, 0]
    shown = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    return (shown.any(1).cumsum(-1) == 0).sum(-1)


class SpanLayer(CacheLayerMixin):
    """What the growing and the fixed layer have in common. Its tensors begin with the batch."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.start: Tensor | None = None

    @abstractmethod
    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, mask: Tensor | None = None
    ) -> list[AtHand]:
        """Remember the tokens of a call; -> what each class has at hand for it."""

    @abstractmethod
    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every key and value."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        self.start = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        self.is_initialized = True

    @property
    def _start(self) -> Tensor:
        assert self.start is not None
        return self.start

    def _by_class(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Span, Tensor, Tensor]]:
        first = 0
        for n, (span, heads) in enumerate(self.classes):
            yield n, span, key[:, first : first + heads], value[:, first : first + heads]
            first += heads

    def _map_if_any(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.start = change(self._start)
            self.batch_size = len(self.start)
            self._map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:  # type: ignore[override]
        self._map_if_any(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_if_any(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_if_any(lambda x: x[indices])

    def offload(self) -> None:
        self._map_if_any(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map_if_any(lambda x: x.to(self.device, non_blocking=True))


class GrowingSpans(SpanLayer):
    """Rows that are joined to those of earlier calls, until there are as many as a span has."""

    is_croppable = False

    def __init__(self, classes: Classes) -> None:
        super().__init__(classes)
        self.seen = 0
        self.kept: list[Pair | None] = [None] * len(self.classes)
        self.recent: list[Pair | None] = [None] * len(self.classes)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, mask: Tensor | None = None
    ) -> list[AtHand]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, tokens = self.seen, key_states.shape[2]
        self.start = _first_tokens(self._start, before, mask, tokens)
        self.seen = before + tokens
        return [self._update(n, span, (k, v), before) for n, span, k, v in self._by_class(key_states, value_states)]

    def _update(self, n: int, span: Span, new: Pair, before: int) -> AtHand:
        total, old, slots = self.seen, self.recent[n], self.kept[n]
        ordered = new if old is None else _joined(old, new)
        positions = self._places(before, total)
        rows = span.held(total)
        if rows >= total:
            self.recent[n] = ordered
            return AtHand(span, positions, self._start, Keys(*ordered, self._places(0, total), 0), None, None)
        self.kept[n] = slots = self._kept(span, slots, ordered)
        self.recent[n] = newest = _newest(ordered, rows)
        count = slots[0].shape[2]
        kept = Keys(*slots, span.token(torch.arange(count, device=self.device))[None], count)
        if total - before == 1:
            return AtHand(
                span, positions, self._start, kept.joined(*newest, self._places(total - rows, total)), None, rows
            )
        held = kept if old is None else kept.joined(*old, self._places(before - old[0].shape[2], before))
        return AtHand(span, positions, self._start, held, Keys(*new, positions, 0), rows)

    def _places(self, first: int, end: int) -> Tensor:
        """The positions of a range of tokens, [B, n]."""
        return torch.arange(first, end, device=self.device) - self._start[:, None]

    def _kept(self, span: Span, slots: Pair | None, ordered: Pair) -> Pair:
        """What is kept for good: from the newest tokens while they are there, else from where it was kept."""
        tokens = span.token(torch.arange(span.kept(self.seen), device=self.device))
        index = tokens + self._start[:, None] - (self.seen - ordered[0].shape[2])
        found = rows_at(ordered, index.clamp(0, ordered[0].shape[2] - 1))
        if slots is None:
            return found
        gone = (index < 0)[:, None, :, None]
        room = len(tokens) - slots[0].shape[2]
        key, value = (torch.where(gone, F.pad(a, (0, 0, 0, room)), b) for a, b in zip(slots, found, strict=True))
        return key, value

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for held in (self.kept, self.recent):
            held[:] = [pair and (change(pair[0]), change(pair[1])) for pair in held]

    def reset(self) -> None:
        self.__init__(self.classes)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number as for other layers."""
        left = max(0, self.seen - abs(tokens_to_remove))
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if any(span.held(self.seen) < self.seen for span, _ in self.classes):
            raise _dropped(left)
        self.recent = [pair and (pair[0][:, :, :left], pair[1][:, :, :left]) for pair in self.recent]
        self.seen = left


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
        self.cumulative_length.add_(tokens)
        if tokens > 1:
            self._start.copy_(_first_tokens(self._start, before, mask, tokens))
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
        last = positions[:, -1:]
        at, place = last % ring, torch.arange(ring, device=self.device)
        newest = last - at + place - torch.where(place > at, ring, 0)
        slots = span.token(torch.arange(kept, device=self.device))[None].expand(len(newest), -1)
        return torch.cat((slots, newest), 1) if kept else newest

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
            raise _dropped(left)
        self.cumulative_length.fill_(left)


def _dropped(left: int) -> RuntimeError:
    return RuntimeError(
        f"crop: heads with a window have dropped tokens which a sequence of {left} would see again. Crop before a "
        "window is full, or start with a new cache."
    )


def _joined(first: Pair, second: Pair) -> Pair:
    return torch.cat((first[0], second[0]), 2), torch.cat((first[1], second[1]), 2)


def _newest(pair: Pair, rows: int) -> Pair:
    """Copies: a view would keep alive what it leaves out."""
    return pair[0][:, :, -rows:].clone(), pair[1][:, :, -rows:].clone()
