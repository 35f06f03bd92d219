"""Input makers of the second set: small, and either different on every axis or equal on every axis."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .base import Inputs, Rand

B, H, K, G = 2, 12, 4, 3
S, T, D, E = 10, 14, 8, 6
SCALE = D**-0.5
C, HEADS = 48, 6
"""Channels of the activations that modules take, and their heads of width D."""
SIDE = 8
"""Every axis of the square inputs: a wrong axis order is a legal shape."""


def heads(
    rand: Rand,
    *,
    groups: int = 1,
    queries: int = S,
    keys: int = S,
    width_v: int = D,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """query_BHSD, key_BKTD, value_BKTE, where K is H unless the heads are grouped."""
    query_BHSD, key_BKTD = rand(B, H, queries, D), rand(B, H // groups, keys, D)
    value_BKTE = rand(B, H // groups, keys, width_v)
    return query_BHSD.to(dtype), key_BKTD.to(dtype), value_BKTE.to(dtype)


same = heads
"""As many keys as queries, values as wide as keys."""
cross = functools.partial(heads, keys=T, width_v=E)
"""Every axis has a size of its own."""
grouped = functools.partial(heads, groups=G, keys=T, width_v=E)
"""The same with K key heads."""
one_key_head = functools.partial(heads, groups=H, keys=T, width_v=E)
"""The same with one key head: key_B1TD, value_B1TE."""


def square(rand: Rand) -> Inputs:
    """B = H = S = T = D = E."""
    return tuple(rand(SIDE, SIDE, SIDE, SIDE) for _ in range(3))


def square_single(rand: Rand) -> Inputs:
    """B = S = T = D = E, no axis of heads."""
    return tuple(rand(SIDE, SIDE, SIDE) for _ in range(3))


def tokens_first(rand: Rand) -> Inputs:
    """query_BSHD, key_BTHD, value_BTHE."""
    return tuple(tensor.transpose(1, 2).contiguous() for tensor in cross(rand))


def grouped_tokens_first(rand: Rand) -> Inputs:
    """query_BSHD, key_BTKD, value_BTKE."""
    return tuple(tensor.transpose(1, 2).contiguous() for tensor in grouped(rand))


def folded(rand: Rand) -> Inputs:
    """query_NSD, key_NTD, value_NTE."""
    return tuple(tensor.flatten(0, 1) for tensor in cross(rand))


def single(rand: Rand) -> Inputs:
    """query_BSD, key_BTD, value_BTE: one head, without an axis for it."""
    return rand(B, S, D), rand(B, T, D), rand(B, T, E)


def flat(rand: Rand) -> Inputs:
    """query_SD, key_TD, value_TE: no batch either."""
    return rand(S, D), rand(T, D), rand(T, E)


def channels_first(rand: Rand) -> Inputs:
    """query_BCS, key_BCT, value_BCT: tokens last, as after a 1x1 convolution."""
    return rand(B, D, S), rand(B, D, S), rand(B, D, S)


def tokens(rand: Rand, *, width: int = C) -> Inputs:
    """x_BSC."""
    return (rand(B, S, width),)


def tokens_context(rand: Rand) -> Inputs:
    """x_BSC and context_BTC."""
    return rand(B, S, C), rand(B, T, C)


def image(rand: Rand) -> Inputs:
    """x_BCXY."""
    return (rand(B, C, 4, 6),)


def valid_keys(keys: int = T) -> Tensor:
    """[B, T], True where the key is not padding; at least one key of every sequence is valid."""
    lengths_B = torch.tensor([keys, keys - 5])
    return torch.arange(keys) < lengths_B[:, None]


def past(size: int = S) -> Tensor:
    """[S, S], True where the key may be read."""
    return torch.ones(size, size, dtype=torch.bool).tril()


def cross_padding(rand: Rand) -> Inputs:
    """query_BHSD, key_BHTD, value_BHTE and valid_BT."""
    return *cross(rand), valid_keys()


def same_padding(rand: Rand) -> Inputs:
    """query_BHSD, key_BHTD, value_BHTE and valid_BT, with S = T."""
    return *same(rand), valid_keys(S)


def same_past(rand: Rand) -> Inputs:
    """query_BHSD, key_BHTD, value_BHTE and past_ST."""
    return *same(rand), past()


def cross_bias(rand: Rand) -> Inputs:
    """query_BHSD, key_BHTD, value_BHTE and a finite bias_1HST."""
    return *cross(rand), rand(1, H, S, T)
