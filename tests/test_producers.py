"""Every spelling of what keys are made with, each with a twin that differs in one thing and is something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from latent.rewriter.origins.pieces import CacheRead, Found, ScaleBy
from latent.rewriter.registry import _patterns, pattern
from origin_tools import B, D, H, S, heads, key_of, origins_of, text
from torch import Tensor, nn

W = H * D


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ** norms **


class Normed(nn.Module):
    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.change = nn.Parameter(torch.rand(D)), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x, self.weight)


def rms_llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rms_gemma(x: Tensor, weight: Tensor) -> Tensor:
    return (x * torch.pow((x * x).mean(-1, keepdim=True) + 1e-6, -0.5)) * (1.0 + weight.float())


def rms_divided(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rms_without_weight(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(-1) + 1e-6)


NORMS: dict[Callable[[Tensor, Tensor], Tensor], str] = {
    rms_llama: "rms(8) input",
    rms_gemma: "rms(8) input",
    rms_divided: "rms(8) input",
    rms_without_weight: "rms(8) input",
    lambda x, w: F.rms_norm(x, (D,), w): "rms(8) input",
    lambda x, w: F.layer_norm(x, (D,), w): "layer(8) input",
    lambda x, w: rms_llama(x - x.mean(-1, keepdim=True), w): "layer(8) input",
    lambda x, w: F.normalize(x, dim=-1): "l2(8) input",
    lambda x, w: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6): "l2(8) input",
    lambda x, w: x / x.norm(dim=-1, keepdim=True): "l2(8) input",
}


@pytest.mark.parametrize("change", NORMS, ids=lambda f: NORMS[f].split("(")[0])
def test_norm(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert key_of(Normed(change), heads()) == NORMS[change]


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6),  # over the tokens
        lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6),  # not the squares
        lambda x, w: x * torch.rsqrt(x.exp().pow(2).mean(-1, keepdim=True) + 1e-6),  # of another tensor
        lambda x, w: x * x.pow(2).mean(-1, keepdim=True),  # no root
        lambda x, w: x[:, :, :4, :4] * torch.rsqrt(x[:, :, :4, :4].pow(2).mean(-1)[:, :, None] + 1.0),  # misaligned
    ],
    ids=["tokens", "cubes", "other", "no root", "misaligned"],
)
def test_no_norm(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    def padded(x: Tensor, weight: Tensor) -> Tensor:
        changed = change(x, weight)
        return F.pad(changed, (0, D - changed.shape[-1])) if changed.shape[-1] < D else changed

    assert key_of(Normed(padded), heads()) in ("?mul", "?pad")


# ** projections and scales **


def to_heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], H, -1).transpose(1, 2)


class Projected(nn.Module):
    def __init__(self, change: Callable[[Projected, Tensor], Tensor], out: int = W) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(W, out), change
        self.weight, self.bias = nn.Parameter(torch.randn(W, out)), nn.Parameter(torch.randn(out))
        self.per_head = nn.Parameter(torch.randn(W, H, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, x)


PROJECTIONS: dict[Callable[[Projected, Tensor], Tensor], str] = {
    lambda m, x: to_heads(m.linear(x)): "linear(32>32 bias)",
    lambda m, x: to_heads(F.linear(x, m.weight)): "linear(32>32)",
    lambda m, x: to_heads(x @ m.weight): "linear(32>32 T)",
    lambda m, x: to_heads(x @ m.weight.t()): "linear(32>32)",
    lambda m, x: to_heads(x @ m.weight + m.bias): "linear(32>32 T bias)",
    lambda m, x: to_heads(torch.addmm(m.bias, x.view(-1, W), m.weight).view(x.shape)): "linear(32>32 T bias)",
    lambda m, x: torch.einsum("bsc,chd->bhsd", x, m.per_head): "linear(32>32)",
    lambda m, x: to_heads(m.linear(x)) * 0.5: "scale(0.5) linear(32>32 bias)",
    lambda m, x: to_heads(m.linear(x) / 2): "scale(0.5) linear(32>32 bias)",
    lambda m, x: to_heads(F.dropout(m.linear(x), 0.5, False)): "linear(32>32 bias)",
    lambda m, x: to_heads(F.linear(x, m.weight * 2.0)): "linear(32>32)",
    lambda m, x: m.linear(x)[:, :, None, :D].transpose(1, 2).expand(-1, H, -1, -1): (
        "repeat(4) width(0:8 of 32) linear(32>32 bias)"
    ),
}


@pytest.mark.parametrize("change", PROJECTIONS, ids=[f"{i}-{text}" for i, text in enumerate(PROJECTIONS.values())])
def test_projection(change: Callable[[Projected, Tensor], Tensor]) -> None:
    assert key_of(Projected(change), torch.randn(B, S, W)) == PROJECTIONS[change]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m, x: to_heads(m.linear(x).split(W, -1)[1]), "width(32:64 of 96) linear(32>96 bias)"),
        (lambda m, x: to_heads(m.linear(x)[..., W : 2 * W]), "width(32:64 of 96) linear(32>96 bias)"),
        (
            lambda m, x: m.linear(x).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)[1],
            "width(32:64 of 96) linear(32>96 bias)",
        ),
        (lambda m, x: to_heads(m.linear(x)).chunk(3, -1)[1], "width(8:16 of each 24) linear(32>96 bias)"),
        (
            lambda m, x: m.linear(x).view(B, S, H, 3, D)[..., 1, :].transpose(1, 2),
            "width(8:16 of each 24) linear(32>96 bias)",
        ),
    ],
    ids=["split", "slice", "five axes", "per head", "per head axis"],
)
def test_fused_projection(change: Callable[[Projected, Tensor], Tensor], expected: str) -> None:
    assert key_of(Projected(change, 3 * W), torch.randn(B, S, W)) == expected


def test_a_linear_map_by_an_activation_is_no_projection() -> None:
    def computed(m: Projected, x: Tensor) -> Tensor:
        return to_heads(F.linear(x, torch.tanh(x[0].mT @ x[0])))

    assert key_of(Projected(computed), torch.randn(B, S, W)) == "?linear"


def test_a_weight_that_is_given_is_told_from_a_learned_one() -> None:
    assert key_of(lambda x, w: to_heads(x @ w), torch.randn(B, S, W), torch.randn(W, W)) == "linear(32>32 T given)"


# ** caches **

OLD = 5


def assigned(cache: Tensor, x: Tensor) -> Tensor:
    cache[:, :, OLD : OLD + S] = x
    return cache[:, :, : OLD + S]


def index_copied(cache: Tensor, x: Tensor) -> Tensor:
    cache.index_copy_(2, torch.arange(S) + OLD, x)
    return cache


def index_copied_and_cut(cache: Tensor, x: Tensor) -> Tensor:
    cache.index_copy_(2, torch.arange(S), x)
    return cache[:, :, :S]


def put(cache: Tensor, x: Tensor) -> Tensor:
    cache[:, :, torch.arange(S) + OLD] = x
    return cache


def rolled(cache: Tensor, x: Tensor) -> Tensor:
    moved = cache.roll(-1, dims=-2)
    moved[:, :, torch.tensor([-1])] = x[:, :, :1]
    cache.copy_(moved)
    return cache


def tokens_first(cache: Tensor, x: Tensor) -> Tensor:
    by_token = cache.transpose(1, 2)
    return torch.cat([by_token, x.transpose(1, 2)], 1).transpose(1, 2)


CACHES: dict[Callable[[Tensor, Tensor], Tensor], str] = {
    lambda cache, x: torch.cat([cache, x], 2): "cache(concatenated 2) input",
    lambda cache, x: torch.cat([cache, x], -2)[:, :, -S:]: "cache(sliding 2) input",
    tokens_first: "cache(concatenated 1) input",
    lambda cache, x: torch.cat([torch.tensor([]), x], -2): "cache(concatenated 2 fresh) input",
    assigned: "tokens(0:11 of 16) cache(slice assigned 2) input",
    index_copied: "cache(static 2) input",
    index_copied_and_cut: "tokens(0:6 of 16) cache(static 2) input",
    put: "cache(static 2) input",
    rolled: "cache(sliding 2) tokens(0:1 of 6) input",
    lambda cache, x: cache.index_copy(2, torch.arange(S), x): "cache(static 2) input",
}


@pytest.mark.parametrize("store", CACHES, ids=[f"{i}-{text}" for i, text in enumerate(CACHES.values())])
def test_cache(store: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert key_of(store, heads(B, H, 16, D), heads()) == CACHES[store]


def test_what_a_cache_is_made_of() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, position: Tensor) -> Tensor:
        cache.index_copy_(2, position, k)
        return (q @ cache.mT).softmax(-1) @ v

    found = origins_of(function, heads(), heads(), heads(B, H, 16, D), heads(B, H, 16, D), torch.arange(S)).key[0]
    assert isinstance(found, CacheRead)
    assert (found.source, found.written.name, str(found.position)) == ("L['cache']", "l_k_", "l_position_")
    assert not found.fresh and found.earlier == ()


class Prefixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(B, H, 2, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.prefix, x], 2)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x, y: torch.cat([x.exp(), y], 2), "tokens[?exp | input]"),
        (lambda x, y: torch.cat([x[..., :3], y[..., :5]], -1), "width[width(0:3 of 8) input | width(0:5 of 8) input]"),
        (lambda x, y: torch.cat([x[:1], y[1:]], 0), "other[other(0:1 of 2) input | other(1:2 of 2) input]"),
    ],
    ids=["computed", "width", "batch"],
)
def test_a_join_that_is_no_cache(make: Callable[[Tensor, Tensor], Tensor], expected: str) -> None:
    assert key_of(make, heads(), heads()) == expected


def test_a_learned_prefix_is_no_cache() -> None:
    assert key_of(Prefixed(), heads()) == "tokens[input | input]"


def test_a_read_before_the_write_does_not_see_it() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        output = (q @ cache.mT).softmax(-1) @ v
        return output, cache.index_copy_(2, torch.arange(S), k)

    cache = heads(B, H, 16, D)
    assert text(origins_of(function, heads(), heads(), cache.clone(), cache).key) == "input"


def test_a_write_that_is_no_cache_ends_the_walk() -> None:
    def halved(x: Tensor) -> Tensor:
        y = x * 2.0
        y[..., ::2].mul_(3.0)
        return y

    assert key_of(halved, heads()) == "?mul"


# ** new spellings **


def test_a_spelling_can_be_added() -> None:
    @pattern("producer")
    def exponential(node: Any, reading: Any) -> Found | None:
        """exp(x), as if it were a scale."""
        return Found(ScaleBy(node, None), node.args[0]) if str(node.target) == "aten.exp.default" else None

    try:
        assert key_of(lambda x: x.exp() * 2.0, heads()) == "scale(2) scale(None) input"
    finally:
        _patterns["producer"].remove(exponential)
    assert key_of(lambda x: x.exp() * 2.0, heads()) == "scale(2) ?exp"


def test_a_spelling_that_fails_is_passed_over() -> None:
    @pattern("producer")
    def broken(node: Any, reading: Any) -> Found | None:
        """Fails everywhere."""
        raise RuntimeError("broken")

    try:
        assert key_of(lambda x: x * 2.0, heads()) == "scale(2) input"
    finally:
        _patterns["producer"].remove(broken)
