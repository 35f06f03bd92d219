"""Keys or values of a layer that are kept as a product, and attention to them that forms as little of it as it can.

    x_t = A_t B + b     for tokens that were compressed; A is shared by a group of layers, B is the layer's own
    x_t = y_t + b       for the others

Values are not formed: Σ_t p_t (A_t B + b) = (Σ_t p_t A_t) B + (Σ_t p_t) b. Keys are turned by their positions, which
stands between q and B, so they are formed, a block of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Rotary
from .memory import heads_of
from .rotation import Turns, rotate
from .scoring import Scoring

__all__ = ["BLOCK", "Factored", "attend_to_factors", "formed"]

BLOCK = 1024
"""Tokens whose keys are formed at once. Compiled code forms all of a layer's: a loop would fix the number of tokens."""


@dataclass(frozen=True)
class Factored:
    """Keys or values x [B, N, T + S, w] of a layer.

    token [B, T, r], basis [B or 1, r, N·w], exact [B, N, S, w], bias [N·w]. The exact ones follow the T tokens; with
    `place` [S] they stand at those indices of the T tokens, whose factor is not read there.
    """

    token: Tensor
    basis: Tensor
    exact: Tensor
    place: Tensor | None = None
    bias: Tensor | None = None
    turns: Turns | None = None
    rotary: Rotary | None = None

    def rows(self) -> Tensor:
        """All of x, turned."""
        return torch.cat(list(self.blocks()), 2)

    def blocks(self, size: int | None = None) -> Iterator[Tensor]:
        """x in parts along the tokens, each formed of `size` tokens; one part where exact ones are `place`d."""
        if self.place is not None:
            yield self._done(self._formed(self.token).index_copy(2, self.place, self.exact), 0)
            return
        length = self.token.shape[1]
        if size is None:
            yield self._done(self._formed(self.token), 0)
        else:
            for start in range(0, length, size):
                yield self._done(self._formed(self.token[:, start : start + size]), start)
        yield self._done(self.exact, length)

    def weighed(self, weights_BGnT: Tensor) -> Tensor:
        """Σ_t p_t x_t, [B, G, n, w], for x that is not turned."""
        batch, groups, repeats, _ = weights_BGnT.shape
        if self.place is None:
            past, own = weights_BGnT.split((self.token.shape[1], self.exact.shape[2]), -1)
        else:
            past, own = weights_BGnT.index_fill(-1, self.place, 0), weights_BGnT.index_select(-1, self.place)
        seen_BGnr = (past.reshape(batch, groups * repeats, -1) @ self.token).view(batch, groups, repeats, -1)
        basis_BGrw = self.basis.unflatten(-1, (groups, -1)).transpose(1, 2)
        out = seen_BGnr @ basis_BGrw + own @ self.exact
        if self.bias is not None:  # beside sinks the weights sum to less than one
            out = out + weights_BGnT.sum(-1, keepdim=True) * self.bias.view(groups, 1, -1)
        made: Tensor = out
        return made

    def _formed(self, token: Tensor) -> Tensor:
        return heads_of(token @ self.basis, self.exact.shape[1])

    def _done(self, x_BNTw: Tensor, start: int) -> Tensor:
        """With bias and turned; the first of x is token `start`."""
        if self.bias is not None:
            x_BNTw = x_BNTw + self.bias.view(x_BNTw.shape[1], 1, -1)
        if self.turns is None or self.rotary is None:
            return x_BNTw
        cos, sin = (t[:, start : start + x_BNTw.shape[2]] for t in self.turns)
        return rotate(x_BNTw, (cos, sin), self.rotary)


def formed(x: Tensor | Factored) -> Tensor:
    """Keys or values as one tensor."""
    return x.rows() if isinstance(x, Factored) else x


def attend_to_factors(
    query_BH1d: Tensor, key: Factored, value: Factored, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """Attention of one query, [B, 1, H, e], that forms `BLOCK` keys at a time and no values. `mask` as for `attend`."""
    batch, heads, _, _ = query_BH1d.shape
    groups = key.exact.shape[1]
    query_BGnd = query_BH1d.reshape(batch, groups, heads // groups, -1)
    size = None if torch.compiler.is_compiling() else BLOCK
    products_BGnT = torch.cat([query_BGnd @ block.transpose(-1, -2) for block in key.blocks(size)], -1)
    if mask is not None:
        mask = mask[:, :, 0, : products_BGnT.shape[-1]]
        mask = mask.unflatten(1, (groups, -1)) if mask.shape[1] == heads else mask.unsqueeze(1)
        mask = mask.unsqueeze(-2)
    weights = scoring.weights(products_BGnT.unsqueeze(-2), mask).squeeze(-2)
    return value.weighed(weights).reshape(batch, 1, heads, -1)
