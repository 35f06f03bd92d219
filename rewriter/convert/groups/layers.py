"""Layers of a `LatentCache` that share one token factor within a group of them.

    x = [x_1 | ... | x_n] ≈ A [B_1 | ... | B_n]     A = x Bᵀ     B = the leading eigenvectors of Σ_t x_t x_tᵀ

for the keys before rope, and for the values, which can be weighed: x_l R_lᵀ stands in place of x_l then, and B_l R_l⁻ᵀ
in place of B_l. The first layer of a group holds A of both. Formed of the prompt
(`PromptLayer`), B is the prompt's own, and tokens that come later are kept as they are, or are compressed with it when
that is asked for. Formed of other text (`CalibratedLayer`), B is the model's, and every token goes into A once the
group's last layer has seen it. The tokens of a call attend to each other exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..cache import FixedLayer, GrowingLayer
from ..factored import Factored

__all__ = ["CalibratedLayer", "PromptLayer", "flat_rows", "leading", "unweighed"]

log = logging.getLogger(__name__)

Pair = tuple[Tensor, Tensor]
"""Something of the keys and the same of the values."""


def flat_rows(x_BNTw: Tensor) -> Tensor:
    """[B, N, T, w] -> [B, T, N·w]."""
    return x_BNTw.transpose(1, 2).flatten(2)


def leading(moment: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of second moments [..., n, n] as rows, [..., rank, n]."""
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors[..., -rank:].flip(-1).transpose(-1, -2).contiguous()


class FactorLayer(CacheLayerMixin):
    """Base: one layer of a group. `members` are the indices of the group's layers in the cache, in order."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, members: Sequence[int], make: Callable[[], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.members, self.make = tuple(members), make
        self.max_length: int | None = getattr(make(), "max_cache_len", None)
        self.is_compileable = self.max_length is not None
        self.group: list[Any] = [self]
        self.tokens: Any = None

    def join(self, layers: Sequence[Any]) -> None:
        """Meet the other layers of the group."""
        self.group = [layers[index] for index in self.members]

    @property
    def leader(self) -> Any:
        return self.group[0]

    @property
    def is_last(self) -> bool:
        return self is self.group[-1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def own(self) -> list[Any]:
        """The layers of plain rows that this one holds."""
        return [self.tokens] if self.tokens is not None else []

    def tensors(self) -> list[Tensor]:
        return [t for held in self.own() for t in held.tensors()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for held in self.own():
            held.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for held in self.own():
            held.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        for held in self.own():
            held.batch_select_indices(indices)


class CalibratedLayer(FactorLayer):
    """Tokens as rows of A; `into` and `bases` are the model's, [r, N·w] each: A = Σ_l x_l I_lᵀ, x_l ≈ A B_l."""

    def __init__(self, members: Sequence[int], make: Callable[[], Any], into: Pair, bases: Pair) -> None:
        super().__init__(members, make)
        self.into, self.bases = into, bases
        self.pending: Pair | None = None

    def join(self, layers: Sequence[Any]) -> None:
        super().join(layers)
        if self.leader is self:
            self.tokens = self.make()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, second = self._held(key_states, value_states)
        self._add(key_states, value_states)
        return first, second

    def _held(self, key: Tensor, value: Tensor) -> tuple[Any, Any]:
        """What was kept before this call, with the tokens of this call as they are."""
        tokens = self.leader.tokens
        if not tokens.is_initialized:
            return key, value
        place = None
        if self.max_length is not None:
            place = torch.arange(key.shape[-2], device=key.device) + tokens.cumulative_length
        past = zip((tokens.keys, tokens.values), self.bases, (key, value), strict=True)
        first, second = (Factored(token.squeeze(1), basis[None], exact, place) for token, basis, exact in past)
        return first, second

    def _add(self, key: Tensor, value: Tensor) -> None:
        leader = self.leader
        made = [flat_rows(x) @ into.t() for x, into in zip((key, value), self.into, strict=True)]
        if leader.pending is not None:
            made = [one + other for one, other in zip(made, leader.pending, strict=True)]
        leader.pending = (made[0], made[1])
        if self.is_last:
            leader.tokens.update(*(x.unsqueeze(1) for x in leader.pending))
            leader.pending = None

    def get_seq_length(self) -> Any:
        return self.leader.tokens.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.leader.tokens.get_mask_sizes(query_length)  # type: ignore[no-any-return]

    def crop(self, tokens_to_remove: int) -> None:
        for held in self.own():
            held.crop(tokens_to_remove)

    def reset(self) -> None:
        self.pending = None
        for held in self.own():
            held.reset()


class PromptLayer(FactorLayer):
    """The tokens of the first call as rows of A, those of later calls as they are until `compress`.

    A first call of fewer than `least` tokens is kept as it is: B would take more room than is saved.
    `ranks` are those of the group, `roots` are R of this layer's values, [N, w, w].
    """

    def __init__(
        self,
        members: Sequence[int],
        make: Callable[[], Any],
        ranks: tuple[int, int],
        least: int,
        roots: Tensor | None = None,
    ) -> None:
        super().__init__(members, make)
        self.ranks, self.least, self.roots = ranks, least, roots
        self.tail: Any = make()
        self.bases: Pair | None = None
        self.waiting: Pair | None = None
        self.speaks = False

    def join(self, layers: Sequence[Any]) -> None:
        super().join(layers)
        self.speaks = self is next(layer for layer in layers if isinstance(layer, PromptLayer))

    def update(
        self, key_states: Tensor, value_states: Tensor, mask: Tensor | None = None, *args: Any
    ) -> tuple[Any, Any]:
        if self.bases is not None:
            return self._held(key_states, value_states)
        if self.is_initialized or not self._worth(key_states.shape[-2]):
            self.is_initialized = True
            return self.tail.update(key_states, value_states)  # type: ignore[no-any-return]
        self.lazy_initialization(key_states, value_states)
        self.waiting = (key_states, value_states)
        if self.is_last:
            _factor(self.group, mask)
        return key_states, value_states

    def _worth(self, tokens: int) -> bool:
        if tokens < self.least and self.speaks and not torch.compiler.is_compiling():
            log.warning(
                "latent: a prompt of %d tokens is kept uncompressed; below %d the bases take too much of what is saved",
                tokens,
                self.least,
            )
        return tokens >= self.least

    def _held(self, key: Tensor, value: Tensor) -> tuple[Any, Any]:
        assert self.bases is not None
        kept = self.tail.update(key, value)
        tokens = self.leader.tokens
        past = zip((tokens.keys, tokens.values), self.bases, kept, strict=True)
        first, second = (Factored(token.squeeze(1), basis, exact) for token, basis, exact in past)
        return first, second

    def keep_factor(self, bases: Pair, tokens: Pair | None) -> None:
        """The exact rows go; what stays is this layer's bases and, in the first layer, the tokens' factor."""
        assert self.waiting is not None
        length = self.waiting[0].shape[-2]
        self.bases, self.waiting = bases, None
        if self.max_length is not None:
            self.tail = FixedLayer(self.max_length - length)
        if tokens is not None:
            self.tokens = GrowingLayer()  # type: ignore[no-untyped-call]
            self.tokens.update(*(x.unsqueeze(1) for x in tokens))

    def compress(self) -> None:
        """What later calls left as it is goes into the factor too, formed anew of all tokens; with the last layer."""
        length = int(self.get_seq_length())
        if not self.is_last or length == self._compressed() or not self.leader._worth(length):
            return
        rows = [layer.rows() for layer in self.group]
        for layer, pair in zip(self.group, rows, strict=True):
            layer.waiting, layer.tokens, layer.tail = pair, None, layer.make()
        _factor(self.group, None)

    def rows(self) -> Pair:
        """Keys and values of all tokens: formed of the factor, then those that were kept as they are."""
        count = int(self.tail.get_seq_length())
        kept = self.tail.keys[..., :count, :], self.tail.values[..., :count, :]
        if self.bases is None:
            return kept
        tokens = self.leader.tokens
        past = zip((tokens.keys, tokens.values), self.bases, kept, strict=True)
        first, second = (Factored(token.squeeze(1), basis, exact).rows() for token, basis, exact in past)
        return first, second

    def own(self) -> list[Any]:
        return [self.tail, *super().own()]

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *(self.bases or ()), *(self.waiting or ())]

    def _compressed(self) -> int:
        if self.waiting is not None:
            return int(self.waiting[0].shape[-2])
        return self.leader.tokens.get_seq_length() if self.bases is not None else 0

    def get_seq_length(self) -> Any:
        return self._compressed() + self.tail.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length, offset = self.tail.get_mask_sizes(query_length)
        return length + self._compressed(), offset

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number; those of the prompt go last."""
        from_tail = max(tokens_to_remove, -int(self.tail.get_seq_length()))
        self.tail.crop(from_tail)
        if self.tokens is not None:
            self.tokens.crop(tokens_to_remove - from_tail)

    def reset(self) -> None:
        self.tail, self.tokens, self.bases, self.waiting = self.make(), None, None, None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._choose(lambda basis: basis.index_select(0, beam_idx.to(basis.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._choose(lambda basis: basis.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._choose(lambda basis: basis[indices])

    def _choose(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.bases is not None:
            self.bases = (rows(self.bases[0]), rows(self.bases[1]))


def _factor(group: Sequence[PromptLayer], mask: Tensor | None) -> None:
    """Put in place of a group's rows their leading components; tokens that nobody sees have no say in which."""
    tokens, bases = [], []
    for which, rank in enumerate(group[0].ranks):
        roots = [layer.roots if which == 1 else None for layer in group]
        held = [(layer.waiting[which], root) for layer, root in zip(group, roots, strict=True) if layer.waiting]
        parts = [flat_rows(x if root is None else x.double() @ root.double().mT) for x, root in held]
        rows, widths = torch.cat(parts, -1).double(), [part.shape[-1] for part in parts]
        seen = rows if mask is None else rows * _seen(mask, rows.shape[1]).unsqueeze(-1)
        basis = leading(seen.transpose(1, 2) @ seen, min(rank, rows.shape[1], rows.shape[2]))
        tokens.append((rows @ basis.transpose(1, 2)).to(held[0][0]))
        split = zip(basis.split(widths, -1), held, strict=True)
        bases.append([(part if root is None else unweighed(part, root)).to(x) for part, (x, root) in split])
    for n, (layer, key, value) in enumerate(zip(group, *bases, strict=True)):
        layer.keep_factor((key.contiguous(), value.contiguous()), (tokens[0], tokens[1]) if n == 0 else None)


def unweighed(basis_rn: Tensor, roots: Tensor) -> Tensor:
    """B R⁻ᵀ: [..., r, N·w] and [N, w, w] -> [..., r, N·w]."""
    split = basis_rn.unflatten(-1, roots.shape[:2])
    inverse = torch.linalg.inv(roots.double()).to(split)
    return torch.einsum("...nw,nvw->...nv", split, inverse).flatten(-2)


def _seen(mask: Tensor, length: int) -> Tensor:
    """[B, T]: tokens that some query sees, which those that only fill up a batch are not."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[..., :length].flatten(1, -2).any(1)
