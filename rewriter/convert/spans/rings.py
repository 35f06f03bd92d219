"""The fixed layer of a cache whose heads see spans: buffers that are written in place, for compiled decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compat import mark_static_address
from .attention import AtHand, Keys, SharedMasks, rows_at
from .cache import Classes, Pair, SpanLayer, dropped, first_tokens
from .span import Span

__all__ = ["FixedSpans"]


@dataclass(frozen=True)
class _Ring:
    """What a call does to the slots and the ring of a class, in every layer that has them alike.

    `held` [B, rows] are the positions of what attention finds in them. One token goes to the row `place` [B, 1];
    of many the one at `index` [B, rows] goes to each row that is `fresh`.
    """

    held: Tensor
    masks: SharedMasks
    place: Tensor | None = None
    index: Tensor | None = None
    fresh: Tensor | None = None


@dataclass(frozen=True)
class _Call:
    """A call as the first layer counted it: `before` tokens had come, `start` [B] of each row were padding.

    `first` is true if none had come, as far as Python knows.
    """

    positions: Tensor
    before: Tensor
    start: Tensor
    first: bool
    rings: dict[str, _Ring]

    def on(self, device: Any) -> _Call:
        if self.positions.device == device:
            return self
        return _Call(self.positions.to(device), self.before.to(device), self.start.to(device), self.first, {})


class FixedSpans(SpanLayer):
    """Buffers that are written in place: for each class the slots of what is kept for good, then a ring.

    The token at position p that is not kept goes to place p mod w of a ring of w. All layers of a cache count as the
    first of them does, so that positions and masks of a class are computed once for all layers.
    """

    is_compileable = True
    is_croppable = False
    cumulative_length: Tensor  # type: ignore[assignment]

    def __init__(self, classes: Classes, max_length: int) -> None:
        super().__init__(classes)
        self.max_length = max_length
        self.cumulative_length = torch.tensor(0, dtype=torch.long)
        self.together: list[FixedSpans] = [self]
        self.call: _Call | None = None
        self.empty = True
        self.buffers: list[Pair] = []
        rows = [(span.kept(max_length), span.held(max_length)) for span, _ in self.classes]
        self.rows = [f"{kept} {ring}" if ring < max_length else f"0 {max_length}" for kept, ring in rows]
        self.names = [f"{span!r}: {rows}" for (span, _), rows in zip(self.classes, self.rows, strict=True)]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of each class the slots, and the places of the ring; a class that sees everything has one for each token.

        They are kept as text: with dynamic=True numbers would be symbols, others in every layer.
        """
        numbers = [rows.split() for rows in self.rows]
        return [(int(kept), int(ring)) for kept, ring in numbers]

    def join(self, layers: Sequence[Any]) -> None:
        """Meet the other layers of a cache, which are called in this order and count as the first does."""
        self.together = [layer for layer in layers if isinstance(layer, FixedSpans)]
        self.cumulative_length = self.together[0].cumulative_length

    def get_seq_length(self) -> Any:
        """The tokens that the layer holds: inside of a call, before it has its own, those that had come before it."""
        if not self.is_initialized:
            return 0
        call = None if self is self.together[0] else self.together[0].call
        return self.cumulative_length if call is None else call.before.to(self.device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_length, 0

    def get_max_length(self) -> int:
        return self.max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.together[0] is self:
            self.cumulative_length = self.cumulative_length.to(self.device)
        else:
            self.start = None
        for (_, heads), (kept, ring) in zip(self.classes, self.sizes, strict=True):
            key, value = (x.new_zeros(x.shape[0], heads, kept + ring, x.shape[3]) for x in (key_states, value_states))
            self.buffers.append((key, value))
        if not torch.compiler.is_compiling():
            for tensor in self._tensors():
                mark_static_address(tensor)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, mask: Tensor | None = None, classes: Classes | None = None
    ) -> list[AtHand]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.together[0]
        if first is self:
            self.call = self._count(key_states.shape[2], mask)
        if first.call is None:
            raise RuntimeError("a layer of a LatentCache was called before the first one, which counts for all")
        call = first.call.on(self.device)
        if self is self.together[-1]:
            first.call = None
        by_class = self._by_class(classes, (key_states, value_states))
        return [self._hand(n, call, span, new) for n, span, new in by_class]

    def _count(self, tokens: int, mask: Tensor | None) -> _Call:
        """For all layers: more tokens have come, and, if these are the first, rows may begin with padding."""
        before, start = self.cumulative_length.clone(), self._start
        if not torch.compiler.is_compiling() and int(before) + tokens > self.max_length:
            raise ValueError(f"{int(before)} + {tokens} tokens are more than max_length={self.max_length} of the cache")
        self.cumulative_length.add_(tokens)
        if tokens > 1:
            start.copy_(first_tokens(start, before, mask, tokens))
        empty, self.empty = self.empty, False
        return _Call(before + torch.arange(tokens, device=self.device) - start[:, None], before, start, empty, {})

    def _hand(self, n: int, call: _Call, span: Span, new: Pair) -> AtHand:
        (kept, ring), positions = self.sizes[n], call.positions
        if ring == self.max_length:
            places = call.before + torch.arange(positions.shape[1], device=self.device)
            for buffer, x in zip(self.buffers[n], new, strict=True):
                buffer.index_copy_(2, places, x)
            return AtHand(span, positions, call.start, Keys(*self.buffers[n], positions, None), None, None)
        if (one := call.rings.get(self.names[n])) is None:
            one = call.rings[self.names[n]] = _ring(span, kept, ring, call)
        found = self._put_one(n, one, new) if one.place is not None else self._put_many(n, one, new)
        fresh = None if one.place is not None else Keys(*new, positions, 0)
        return AtHand(span, positions, call.start, Keys(*found, one.held, kept), fresh, ring, one.masks, call.first)

    def _put_one(self, n: int, ring: _Ring, new: Pair) -> Pair:
        assert ring.place is not None
        batch = torch.arange(len(ring.place), device=self.device)[:, None]
        for buffer, x in zip(self.buffers[n], new, strict=True):
            buffer[batch, :, ring.place] = x.transpose(1, 2)
        return self.buffers[n]

    def _put_many(self, n: int, ring: _Ring, new: Pair) -> Pair:
        """-> what attention finds: the slots as they are now, and the ring as it was before."""
        assert ring.index is not None and ring.fresh is not None
        kept, buffers = self.sizes[n][0], self.buffers[n]
        filled = [torch.where(ring.fresh, x, b) for x, b in zip(rows_at(new, ring.index), buffers, strict=True)]
        slots = [x[:, :, :kept] for x in filled]
        if ring.held.shape[1] == kept:
            key, value = slots
        else:
            key, value = (torch.cat((x, b[:, :, kept:]), 2) for x, b in zip(slots, buffers, strict=True))
        for buffer, x in zip(buffers, filled, strict=True):
            buffer.copy_(x)
        return key, value

    def _tensors(self) -> list[Tensor]:
        counts = [] if self.start is None else [self.start, self.cumulative_length]
        return [*(tensor for pair in self.buffers for tensor in pair), *counts]

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.start = None if self.start is None else change(self.start)
        self.buffers = [(change(key), change(value)) for key, value in self.buffers]
        self.batch_size = len(self.buffers[0][0])

    def reset(self) -> None:
        if self.is_initialized:
            self.empty = True
            for tensor in self._tensors():
                tensor.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number as for other layers."""
        if tokens_to_remove == 0 or not self.is_initialized or self.together[0] is not self:
            return
        seen = int(self.cumulative_length)
        left = max(0, seen - abs(tokens_to_remove))
        if any(ring < seen for layer in self.together for _, ring in layer.sizes):
            raise dropped(left)
        self.cumulative_length.fill_(left)


def _ring(span: Span, kept: int, ring: int, call: _Call) -> _Ring:
    positions = call.positions
    if positions.shape[1] == 1:
        place = torch.where(span.keeps(positions), span.slot(positions), kept + positions % ring)
        return _Ring(_rows(span, kept, ring, positions), SharedMasks(), place)
    first, last = positions[:, :1], positions[:, -1:]
    rows = _rows(span, kept, ring, last)
    held = rows[:, :kept]
    if not call.first:
        held = torch.cat((held, _rows(span, kept, ring, first - 1)[:, kept:]), 1)
    fresh = ((rows >= first) & (rows <= last))[:, None, :, None]
    return _Ring(held, SharedMasks(), index=(rows - first).clamp(0, positions.shape[1] - 1), fresh=fresh)


def _rows(span: Span, kept: int, ring: int, last: Tensor) -> Tensor:
    """Which position each row of a class holds once the token at `last` [B, 1] was written, [B, rows]."""
    at, row = last % ring, torch.arange(kept + ring, device=last.device)
    place = row - kept
    newest = last - at + place - torch.where(place > at, ring, 0)
    return torch.where(row < kept, span.token(row), newest) if kept else newest
