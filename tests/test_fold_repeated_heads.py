"""Keys and values repeated for a group of heads are read once, in every way of repeating them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rewrite_tools import outcome
from torch import Tensor

B, K, G, S, T, D = 2, 3, 2, 5, 7, 4


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, K * G, S, D), (B, K, T, D), (B, K, T, D))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def expanded(x_BKTD: Tensor) -> Tensor:
    return x_BKTD[:, :, None].expand(B, K, G, T, D).reshape(B, K * G, T, D)


def interleaved(x_BKTD: Tensor) -> Tensor:
    return x_BKTD.repeat_interleave(G, dim=1)


def tiled(x_BKTD: Tensor) -> Tensor:
    return x_BKTD.repeat(1, G, 1, 1)


def attend(repeat_key: Callable[[Tensor], Tensor], repeat_value: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ repeat_key(key).mT * 0.5).softmax(-1) @ repeat_value(value)

    return attention


@pytest.mark.parametrize("repeat", [expanded, interleaved, tiled])
def test_repeated_heads_are_folded(repeat: Callable[[Tensor], Tensor]) -> None:
    found = outcome("fold_repeated_heads", attend(repeat, repeat), *qkv())
    assert found.verdict.outcome == "applied" and found.error < 1e-5


def test_keys_and_values_repeated_in_different_orders_stay() -> None:
    """The heads of a group are not the same ones for keys and for values."""
    found = outcome("fold_repeated_heads", attend(interleaved, tiled), *qkv())
    assert found.verdict.outcome == "refused" and found.error < 1e-5


def test_heads_that_are_not_repeated_stay() -> None:
    query, key, value = qkv()
    found = outcome("fold_repeated_heads", attend(lambda x: x, lambda x: x), query[:, :K], key, value)
    assert found.verdict.reason == "no key or value head is repeated"


def test_one_query_with_grouped_heads_becomes_rows() -> None:
    query, key, value = qkv()
    found = outcome("fold_repeated_heads", attend(expanded, expanded), query[:, :, :1], key, value)
    assert found.verdict.outcome == "applied" and found.error < 1e-5
