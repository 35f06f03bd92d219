"""softmax(scale · q kᵀ + mask) v  ->  attention(q, k, v, mask, scale), and every reason not to."""

from __future__ import annotations

import latent
import pytest
import torch
import torch.nn.functional as F
from rewrite_tools import outcome
from torch import Tensor

B, H, S, T, D, E = 2, 3, 5, 7, 4, 6


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, S, D), (B, H, T, D), (B, H, T, E))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def plain(query_BHSD: Tensor, key_BHTD: Tensor, value_BHTE: Tensor) -> Tensor:
    return (query_BHSD @ key_BHTD.mT * 0.3).softmax(-1) @ value_BHTE


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_plain_attention_is_fused_and_certified(dynamic: bool) -> None:
    found = outcome("fuse_attention", plain, *qkv(), dynamic=dynamic)
    assert found.verdict.outcome == "applied"
    assert found.verdict.error is not None and found.verdict.error < 1e-9
    assert found.error < 1e-5


def test_mild_fill_gives_hidden_rows_the_mean_of_the_values() -> None:
    """-1e4 is added to nothing: it takes the place of the score, so a hidden row is uniform."""
    hide_ST = torch.zeros(S, T, dtype=torch.bool)
    hide_ST[2] = True

    def filled(query: Tensor, key: Tensor, value: Tensor, hide: Tensor) -> Tensor:
        return (query @ key.mT).masked_fill(hide, -1e4).softmax(-1) @ value

    found = outcome("fuse_attention", filled, *qkv(), hide_ST)
    assert found.verdict.outcome == "applied" and found.error < 1e-5


@pytest.mark.parametrize("fill", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_any_fill_that_hides_is_certified_where_it_hides_a_whole_row(fill: float) -> None:
    """As if queries, keys and values were one tensor and every key were padding: uniform, in fp64 too."""
    hide_ST = torch.zeros(S, S, dtype=torch.bool)
    hide_ST[2] = True

    def filled(tokens: Tensor, hide: Tensor) -> Tensor:
        return (tokens @ tokens.mT).masked_fill(hide, fill).softmax(-1) @ tokens

    few = torch.randn(B, H, 2, D)  # of two keys the certificate's random mask hides both in some rows
    found = outcome("fuse_attention", filled, few, hide_ST[2:4, :2])
    assert found.verdict.outcome == "applied" and found.error < 1e-5


def test_two_products_are_one_of_twice_the_width() -> None:
    def absorbed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * 0.5 + query.flip(-1) @ (key * key).mT * 0.25).softmax(-1) @ value

    found = outcome("fuse_attention", absorbed, *qkv())
    assert found.verdict.outcome == "applied" and found.error < 1e-5


class Capped(torch.nn.Module):
    """A soft cap that is an attribute: with dynamic shapes Dynamo makes a symbol of it."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap
        self.v = torch.nn.Linear(E, E)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (torch.tanh(query @ key.mT / self.cap) * self.cap).softmax(-1) @ self.v(value)


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_symbolic_soft_cap_is_bound_by_a_guard(inner: str) -> None:
    torch._dynamo.reset()
    model = Capped(0.7).eval()
    compiled = torch.compile(model, backend="latent", dynamic=True, options={"inner": inner, "strict": True})
    for number, cap in enumerate((0.7, 0.3, -2.0, 30), 1):  # the last is an int
        model.cap = cap
        with torch.no_grad():
            torch.testing.assert_close(compiled(*qkv()), model(*qkv()))
        report = latent.reports()
        assert len(report.graphs) == number and report.count("fuse_attention") == number
        assert f"{abs(cap):g} tanh(" in report.sites[-1].equation


def test_what_a_cap_must_not_be() -> None:
    found = outcome("fuse_attention", lambda q, k, v: (torch.tanh(q @ k.mT) * 0.0).softmax(-1) @ v, *qkv())
    assert found.verdict.outcome == "refused" and found.verdict.reason == "the soft cap is 0"
    found = outcome("fuse_attention", lambda q, k, v: (torch.tanh(q @ k.mT) * q.sum()).softmax(-1) @ v, *qkv())
    assert found.verdict.outcome == "refused" and "only running the graph tells" in found.verdict.reason
    assert found.error < 1e-5


FUSED = {
    "negative soft cap": lambda q, k, v: (torch.tanh(q @ k.mT / 3) * -5).softmax(-1) @ v,
    "soft cap": lambda q, k, v: (torch.tanh(q @ k.mT / 5) * 5).softmax(-1) @ v,
    "off by one": lambda q, k, v: F.pad(q @ k.mT, (0, 1)).softmax(-1)[..., :-1] @ v,
    "sinks of heads": lambda q, k, v: (
        torch.cat((q @ k.mT, q[0, :, 0, 0].reshape(1, H, 1, 1).expand(B, H, S, 1)), -1).softmax(-1)[..., :-1] @ v
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_caps_and_sinks_are_part_of_the_operator(name: str) -> None:
    found = outcome("fuse_attention", FUSED[name], *qkv())
    assert found.verdict.outcome == "applied" and found.error < 1e-5


@pytest.mark.parametrize("queries", [5, 1])
def test_sinks_tell_the_key_heads_of_one_sequence_from_a_batch(queries: int) -> None:
    """One sequence has no batch axis: the one axis that queries and keys share are the heads that the sinks are of."""

    def attend(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        sinks = sink.view(-1, 1, 1).expand(*query.shape[:3], 1)
        return torch.cat((query @ key.mT, sinks), -1).softmax(-1)[..., :-1] @ value

    torch.manual_seed(0)
    given = torch.randn(1, 4, queries, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(4)
    found = outcome("fuse_attention", attend, *given)
    assert found.verdict.outcome == "applied" and found.error < 1e-5


def test_sinks_tell_all_axes_of_heads_from_a_batch() -> None:
    """Behind a cast, repeated keys are keys of their own: their heads have two axes (Flint)."""

    def attend(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
        key, value = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, 9, 8) for x in (key, value))
        sinks = sink.reshape(1, -1, 1, 1).expand(*query.shape[:3], 1)
        scores = torch.cat((query.double() @ key.double().mT, sinks), -1)
        return scores.softmax(-1)[..., :-1].to(value.dtype) @ value

    torch.manual_seed(0)
    given = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(4).double()
    found = outcome("fuse_attention", attend, *given)
    assert found.verdict.outcome == "applied" and found.error < 1e-5


REFUSED = {
    "differ from token to token": lambda q, k, v: torch.cat((q @ k.mT, q[..., :1]), -1).softmax(-1)[..., :-1] @ v,
    "read by something else": lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ v + w.sum(),
    "dropout of the weights is active": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v,
    "multiplied by a tensor after the softmax": lambda q, k, v: ((q @ k.mT).softmax(-1) * k[:, :, :1, :1]) @ v,
    "one fused call already": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "added to the row sums": lambda q, k, v: (e := (q @ k.mT).exp()) / (e.sum(-1, keepdim=True) + 1e-6) @ v,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_says_why(reason: str) -> None:
    torch.manual_seed(0)
    found = outcome("fuse_attention", REFUSED[reason], *qkv())
    assert found.verdict.outcome == "refused"
    assert reason in found.verdict.reason
    assert found.verdict.line.startswith("test_fuse_attention.py:")
