"""sdpa with one query token  ->  attention over parts of the keys, for every kind of heads and mask."""

from __future__ import annotations

import latent
import pytest
import torch
import torch.nn.functional as F
from latent.kernels.generated import unavailable
from latent.rewriter import history
from rewrite_tools import outcome
from torch import Tensor

B, K, G, T, D = 2, 3, 2, 37, 16

pytestmark = pytest.mark.skipif(bool(unavailable("cpu")), reason=unavailable("cpu"))


def qkv(S: int = 1, heads: int = K * G) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, heads, S, D), (B, K, T, D), (B, K, T, D))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


CALLS = {
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "scaled": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.2),
    "masked": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, k[:, :1, None, :, 0] > -1, enable_gqa=True),
    "biased": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, k[:, :1, None, :, 0], enable_gqa=True),
    "ungrouped": lambda q, k, v: F.scaled_dot_product_attention(q[:, ::G], k, v),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_with_one_query_token(name: str) -> None:
    found = outcome("split_kv_decode", CALLS[name], *qkv())
    assert found.verdict.outcome == "applied" and found.error < 1e-5
    assert any("keys split over cores" in line for graph in history.reports().graphs for line in graph.lowered)


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_heads_may_be_symbols(name: str, batch: int) -> None:
    found = outcome("split_kv_decode", CALLS[name], *(t[:batch] for t in qkv()), dynamic=True)
    assert found.verdict.outcome == "applied" and found.error < 1e-5


def test_one_graph_with_symbolic_heads_serves_other_numbers_of_heads() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CALLS["grouped"], backend="latent", dynamic=True, options={"inner": "eager"})
    with torch.no_grad():
        for heads, keys in ((6, 3), (4, 2), (8, 2), (9, 3)):
            q, k, v = torch.randn(B, heads, 1, D), torch.randn(B, keys, T, D), torch.randn(B, keys, T, D)
            torch.testing.assert_close(compiled(q, k, v), CALLS["grouped"](q, k, v))
    assert len(latent.reports().graphs) == 1


@pytest.mark.parametrize("mask", [None, (B, 1, 1, T), (B, K * G, 1, T)], ids=["none", "padding", "per head"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_keys_of_one_head_are_read_once_for_all_heads(mask: tuple[int, ...] | None, dynamic: bool) -> None:
    """Multi-query attention without a word about groups: the keys broadcast over the heads."""
    q, k, v = qkv()
    bias = None if mask is None else torch.randn(mask)
    found = outcome(
        "split_kv_decode",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias),
        *(q, k[:, :1].clone(), v[:, :1].clone()),
        dynamic=dynamic,
    )
    assert found.verdict.outcome == "applied" and found.error < 1e-5
    benefit = found.verdict.estimate
    assert benefit is not None and benefit.bytes_before == K * G * benefit.bytes_after


@pytest.mark.parametrize("per_head", [False, True])
def test_one_token_of_multi_query_attention_by_hand_gets_the_same_kernel(per_head: bool) -> None:
    bias = torch.randn(B, K * G if per_head else 1, 1, T)
    found = outcome("fuse_attention", lambda q, k, v: (q @ k[:, :1].mT * 0.25 + bias).softmax(-1) @ v[:, :1], *qkv())
    assert found.verdict.outcome == "applied" and found.error < 1e-5
    assert any("keys split over cores" in line for graph in history.reports().graphs for line in graph.lowered)


def test_a_spelling_by_hand_gets_the_same_kernel() -> None:
    def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
        return (q @ k.mT * 0.25).softmax(-1) @ v

    found = outcome("split_kv_decode", spelled, *qkv())
    assert found.verdict.reason == "it is latent::attention already" and found.error < 1e-5
    assert any("keys split over cores" in line for graph in history.reports().graphs for line in graph.lowered)


class Scaled(torch.nn.Module):
    """Attention by hand whose scale is an attribute: with dynamic shapes Dynamo makes a symbol of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.37
        self.q, self.k, self.v = (torch.nn.Linear(D, D) for _ in range(3))  # their weights fix the widths

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.q(q[:, ::G]) @ self.k(k).mT * self.scale).softmax(-1) @ self.v(v)


def test_a_symbolic_scale_keeps_the_kernel() -> None:
    found = outcome("fuse_attention", Scaled(), *qkv(), dynamic=True)
    assert found.verdict.outcome == "applied" and found.error < 1e-5
    assert any("keys split over cores" in line for graph in history.reports().graphs for line in graph.lowered)


REFUSED = {
    "query tokens": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), qkv(4)),
    "also does what is not read": (lambda q, k, v: F.scaled_dot_product_attention(q[:, ::G], k, v, None, 0.5), qkv()),
    "not one fused call": (lambda q, k, v: (w := (q[:, ::G] @ k.mT).softmax(-1)) @ v + w.sum(), qkv()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_says_why(reason: str) -> None:
    function, inputs = REFUSED[reason]
    torch.manual_seed(0)
    found = outcome("split_kv_decode", function, *inputs)
    assert found.verdict.outcome == "refused" and reason in found.verdict.reason


def test_gradients_reach_the_keys() -> None:
    """The kernel has no gradient: where one is needed, the library's attention stays."""
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in qkv())
    compiled = torch.compile(CALLS["grouped"], backend="latent", options={"inner": "eager", "strict": True})
    compiled(q, k, v).sum().backward()
    actual, k.grad = k.grad, None
    CALLS["grouped"](q, k, v).sum().backward()
    torch.testing.assert_close(actual, k.grad)
