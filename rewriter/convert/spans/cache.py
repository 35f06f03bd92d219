"""Layers of a cache whose heads see spans: for each class of heads the tokens that are kept for good, and a ring.

Positions count from the first token of a row that is no padding, so that a row which was padded on the left holds what
it would hold alone. Kept tokens have slots of their own; of the others a class holds the newest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .attention import AtHand, Keys, rows_at
from .span import Span

__all__ = ["Classes", "GrowingSpans", "Pair", "SpanLayer", "dropped", "first_tokens", "leading"]

Classes = Sequence[tuple[Span, int]]
"""Spans, each with how many of the key heads have it; the heads in this order."""

Pair = tuple[Tensor, Tensor]
"""Keys and values, [B, heads, rows, width] each."""


def first_tokens(start: Tensor, before: Tensor | int, mask: Tensor | None, tokens: int) -> Tensor:
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
        super().__init__()  # type: ignore[no-untyped-call]
        self.classes = tuple(classes)
        self.start: Tensor | None = None

    @abstractmethod
    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, mask: Tensor | None = None, classes: Classes | None = None
    ) -> list[AtHand]:
        """Remember the tokens of a call; -> what each class has at hand for it.

        `classes` are the layer's own, as a module holds them: its numbers are no symbols where all others are.
        """

    @abstractmethod
    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor that the layer owns."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        self.start = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        self.is_initialized = True

    @property
    def _start(self) -> Tensor:
        assert self.start is not None
        return self.start

    def _by_class(self, classes: Classes | None, new: Pair) -> Iterator[tuple[int, Span, Pair]]:
        first = 0
        for n, (span, heads) in enumerate(classes or self.classes):
            key, value = (x[:, first : first + heads] for x in new)
            yield n, span, (key, value)
            first += heads

    def _map_if_any(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
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
        self, key_states: Tensor, value_states: Tensor, mask: Tensor | None = None, classes: Classes | None = None
    ) -> list[AtHand]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, tokens = self.seen, key_states.shape[2]
        self.start = first_tokens(self._start, before, mask, tokens)
        self.seen = before + tokens
        by_class = self._by_class(classes, (key_states, value_states))
        return [self._update(n, span, new, before) for n, span, new in by_class]

    def _update(self, n: int, span: Span, new: Pair, before: int) -> AtHand:
        total, old, slots = self.seen, self.recent[n], self.kept[n]
        ordered = _joined(old, new) if old is not None else new if len(self.classes) == 1 else _copied(new)
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
        return AtHand(span, positions, self._start, held, Keys(*new, positions, 0), rows, first=old is None)

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
        self.start = change(self._start)
        self.batch_size = len(self.start)
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
            raise dropped(left)
        self.recent = [pair and (pair[0][:, :, :left], pair[1][:, :, :left]) for pair in self.recent]
        self.seen = left


def dropped(left: int) -> RuntimeError:
    return RuntimeError(
        f"crop: heads with a window have dropped tokens which a sequence of {left} would see again. Crop before a "
        "window is full, or start with a new cache."
    )


def _joined(first: Pair, second: Pair) -> Pair:
    return torch.cat((first[0], second[0]), 2), torch.cat((first[1], second[1]), 2)


def _newest(pair: Pair, rows: int) -> Pair:
    return _copied((pair[0][:, :, -rows:], pair[1][:, :, -rows:]))


def _copied(pair: Pair) -> Pair:
    """A view would keep alive what it leaves out: other tokens, or the heads of other classes."""
    return pair[0].clone(), pair[1].clone()
