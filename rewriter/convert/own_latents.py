"""Caches for models that make keys and values of a latent, and hand them to their cache in full.

    [k_plain ; v] = U c + b      U = Q R, Q orthonormal      a = Qᵀ ([k_plain ; v] - b)      [k_plain ; v] = Q a + b

Kept are a, as wide as the latent c, and the columns of the keys that come from elsewhere, such as one turned key that
all heads share. Q is orthonormal, so a loses no more than rounding. What the model is given back is made of them, as a
product with Q: attention in compiled code reads a and leaves the keys and values unmade.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Affine
from .memory import heads_of

__all__ = ["OwnLatent"]


@dataclass(frozen=True)
class OwnLatent:
    """How keys [B, G, S, d] and values [B, G, S, e] of a layer hang on its latent.

    `basis` is Q [G(n + e), r], `bias` [G(n + e)]. The keys' columns from `first` to `end` are not of the latent, the
    other n are; `shared`: all heads have the same ones.
    """

    basis: Tensor
    bias: Tensor | None
    groups: int
    value_width: int
    first: int
    end: int
    shared: bool

    @classmethod
    def of(cls, key: Affine, value: Affine, shared: bool) -> OwnLatent | None:
        """From [G, d, r] and [G, e, r]; None where the columns that are not of the latent do not lie side by side."""
        groups, width, rank = key.weight.shape
        other = ~key.weight.abs().amax((0, 2)).bool()
        first = int(other.int().argmax()) if bool(other.any()) else width
        end = first + int(other.sum())
        if not bool(other[first:end].all()):
            return None
        plain = (slice(None), ~other)
        up = torch.cat((key.weight[plain].reshape(-1, rank), value.weight.reshape(-1, rank))).double()
        basis = torch.linalg.qr(up).Q.to(key.weight.dtype).contiguous()
        zeros = (torch.zeros_like(one.weight[..., 0]) if one.bias is None else one.bias for one in (key, value))
        key_bias, value_bias = zeros
        bias = torch.cat((key_bias[plain].reshape(-1), value_bias.reshape(-1)))
        value_width = value.weight.shape[1]
        weights = (_weight(basis), _weight(bias) if bool(bias.any()) else None)
        return cls(*weights, groups, value_width, first, end, shared)

    @property
    def numbers(self) -> int:
        """That are kept for a token."""
        return self.basis.shape[1] + (self.end - self.first) * (1 if self.shared else self.groups)

    def kept(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """a [B, 1, S, r], and the other columns [B, 1 or G, S, w]."""
        plain = torch.cat((key[..., : self.first], key[..., self.end :]), -1)
        rows = torch.cat((plain.transpose(1, 2).flatten(2), value.transpose(1, 2).flatten(2)), -1)
        if self.bias is not None:
            rows = rows - self.bias
        other = key[..., self.first : self.end]
        return (rows @ self.basis).unsqueeze(1), other[:, :1] if self.shared else other

    def made(self, latent: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is kept."""
        plain = self.groups * (self.basis.shape[0] // self.groups - self.value_width)
        bias = (None, None) if self.bias is None else (self.bias[:plain], self.bias[plain:])
        key, value = (
            heads_of(nn.functional.linear(latent.squeeze(1), weight, b), self.groups)
            for weight, b in zip((self.basis[:plain], self.basis[plain:]), bias, strict=True)
        )
        other = other.expand(-1, self.groups, -1, -1)
        parts = [x for x in (key[..., : self.first], other, key[..., self.first :]) if x.shape[-1]]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0], value

    def error(self, key: Tensor, value: Tensor) -> float:
        """The largest difference that keeping them makes, relative to the largest number."""
        pairs: Any = zip((key, value), self.made(*self.kept(key, value)), strict=True)
        return max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-30)) for x, y in pairs)


def _weight(x: Tensor) -> Tensor:
    """As a parameter: its sizes are no symbols, also where all others are (`dynamic=True`)."""
    return nn.Parameter(x, requires_grad=False)
