"""Attention in which heads see some of the keys: from what is at hand in a call, without a square mask.

A key that is kept for good is seen through its slot among the kept ones and nowhere else, so that it counts once where
it also lies in the band. One query reads one run of rows. Many queries go in blocks: the kept ones, what is held of
earlier calls where the band still reaches it, and that part of the new ones which the block's bands cover.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention import attend
from ..scoring import Scoring
from .span import Span, seen, seen_in_band

__all__ = ["AtHand", "Keys", "SharedMasks", "attend_spans", "rows_at"]

BLOCK = 256
"""The fewest queries of a block."""

MOST_SHARED = 1 << 24
"""Elements of the masks of a class that are kept through a call."""


@dataclass(frozen=True)
class Keys:
    """Keys [B, g, n, d], values [B, g, n, e] and their positions [B or 1, n]; positions below 0 hold no token.

    The first `kept` are those that are kept for good; None: they stand among the others, at their places.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    kept: int | None

    def __getitem__(self, rows: slice) -> Keys:
        kept = None if self.kept is None else min(self.kept, rows.stop or self.kept)
        return Keys(self.key[:, :, rows], self.value[:, :, rows], self.positions[:, rows], kept)

    def joined(self, key: Tensor, value: Tensor, positions: Tensor) -> Keys:
        """With more that are not kept for good."""
        every = torch.cat((self.positions.expand(len(positions), -1), positions), 1)
        return Keys(torch.cat((self.key, key), 2), torch.cat((self.value, value), 2), every, self.kept)


class SharedMasks:
    """Masks of one call for all layers that hold the same tokens of a class, while there is room."""

    def __init__(self) -> None:
        self.made: list[tuple[int, Tensor | None, Tensor]] = []
        """(a block's first query, the call's own mask, what both hide)."""
        self.room = MOST_SHARED

    def find(self, block: int, given: Tensor | None) -> Tensor | None:
        return next((mask for first, other, mask in self.made if first == block and other is given), None)

    def keep(self, block: int, given: Tensor | None, mask: Tensor) -> Tensor:
        if mask.numel() <= self.room:
            self.room -= mask.numel()
            self.made.append((block, given, mask))
        return mask


@dataclass(frozen=True)
class AtHand:
    """What the heads of one class have in a call: what was held, and the call's own tokens unless they are among it.

    `positions` [B or 1, S] are those of the queries, `column` [B or 1] says which column of the call's mask is position
    0. A band never reaches further back than `reach` tokens; None: every token is seen, as the call's own mask has it.
    `first`: no token came before those of the call. `masks` are those that other layers have made in this call, if
    they would be the same.
    """

    span: Span
    positions: Tensor
    column: Tensor
    held: Keys
    new: Keys | None
    reach: int | None
    masks: SharedMasks | None = None
    first: bool = False


def attend_spans(query_BHSd: Tensor, hand: AtHand, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """[B, S, H, e]. `mask` is the call's own, [B or 1, 1, S, all tokens]: what it hides stays hidden."""
    if hand.reach is None:
        return attend(query_BHSd, hand.held.key, hand.held.value, mask, scoring)
    made = []
    for rows, keys in _blocks(hand, query_BHSd.shape[2]):
        key, value = (torch.cat([getattr(k, name) for k in keys], 2) if len(keys) > 1 else getattr(keys[0], name)
                      for name in ("key", "value"))  # fmt: skip
        made.append(attend(query_BHSd[:, :, rows], key, value, _mask_of_block(hand, rows, keys, mask), scoring))
    return torch.cat(made, 1) if len(made) > 1 else made[0]


def _mask_of_block(hand: AtHand, rows: slice, keys: list[Keys], given: Tensor | None) -> Tensor:
    shared = hand.masks
    if shared is not None and (found := shared.find(rows.start, given)) is not None:
        return found
    made = torch.cat([_mask(hand, rows, k, given) for k in keys], -1)
    return made if shared is None else shared.keep(rows.start, given, made)


def _blocks(hand: AtHand, queries: int) -> Iterator[tuple[slice, list[Keys]]]:
    assert hand.reach is not None
    if hand.new is None:
        block = queries if queries == 1 else BLOCK
        yield from ((slice(at, at + block), [hand.held]) for at in range(0, queries, block))
        return
    block = max(BLOCK, hand.reach)
    for at in range(0, queries, block):
        end = min(at + block, queries)
        if hand.first and at < hand.reach:  # what is kept for good is still at its place among the others
            yield slice(at, end), [replace(hand.new, kept=None)[:end]]
            continue
        held = hand.held if at < hand.reach else hand.held[: hand.held.kept or 0]
        new = hand.new[max(0, at - hand.reach + 1) : end]
        yield slice(at, end), [held, new] if held.key.shape[2] else [new]


def _mask(hand: AtHand, rows: slice, keys: Keys, mask: Tensor | None) -> Tensor:
    """[B or 1, 1, Q, n]: whether a query sees a key, or what the call's mask adds to its score."""
    query, key = hand.positions[:, None, rows, None], keys.positions[:, None, None, :]
    many = query.shape[2] > 1
    if keys.kept is None:
        allowed = seen(hand.span, query, key)
    elif many or hand.new is not None or hand.span.elastic:
        allowed = _through_slots(query, key, keys.kept, seen_in_band(hand.span, query, key))
    else:  # what is held is the band of the one query
        allowed = _through_slots(query, key, keys.kept, hand.span.recent(key))
    padding = (query == key) & (query < 0)  # sees itself: a row that sees nothing has no softmax
    if mask is None:
        return allowed | padding if many else allowed
    columns = (keys.positions + hand.column[:, None]).clamp(0, mask.shape[-1] - 1)[:, None, None, :]
    batch = max(mask.shape[0], columns.shape[0])
    given = mask[:, :, rows]
    given = given.expand(batch, -1, -1, -1).gather(-1, columns.expand(batch, 1, given.shape[2], -1))
    if given.dtype != torch.bool:
        return torch.where(allowed, given, torch.finfo(given.dtype).min)
    return (given & allowed) | padding if many else given & allowed


def _through_slots(query: Tensor, key: Tensor, kept: int, band: Tensor) -> Tensor:
    if not kept:
        return band
    slots = torch.arange(key.shape[-1], device=key.device) < kept
    return torch.where(slots, key <= query, band)


def rows_at(pair: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of an index [B or 1, n] of keys and of values, each row of the batch its own."""
    index = index.expand(pair[0].shape[0], -1)[:, None, :, None]
    key, value = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in pair)
    return key, value
