"""q·(U c) = (Uᵀ q)·c: attention to latents, in both forms, with every feature, and every reason not to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from corpus import ALL
from corpus.latent_attention import EXPECTED
from hypothesis import given, settings
from hypothesis import strategies as st
from latent.kernels.generated import reference, unavailable
from latent.kernels.latent_attention import LatentCall, absorbed, expanded, expanded_in_blocks, plain
from latent.rewriter import history
from rewrite_tools import outcome
from torch import Tensor

B, H, T, D, E, R, C = 2, 4, 9, 6, 5, 4, 10

Tensors = Mapping[str, Tensor]


def tensors(S: int = 1, **more: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (B, H, S, D),
        "query_rope": (B, H, S, R),
        "latent": (B, T, C),
        "key_rope": (B, 1, T, R),
        "weight": (H * (D + E), C),
        **more,
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def keys_and_values(latent: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    made = F.linear(latent, weight, bias).view(latent.shape[0], -1, H, D + E).transpose(1, 2)
    return made.split((D, E), -1)  # type: ignore[return-value]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask)


def native(query: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, weight: Tensor) -> Tensor:
    key, value = keys_and_values(latent, weight)
    key = torch.cat((key, key_rope.expand(-1, H, -1, -1)), -1)
    return attend(torch.cat((query, query_rope), -1), key, value)


@pytest.mark.parametrize("S", [1, 3])
def test_native_attention_to_latents(S: int) -> None:
    found = outcome("absorb_up_projection", native, *tensors(S).values())
    assert found.verdict.outcome == "applied", found.verdict
    assert found.verdict.error is not None and found.verdict.error < 1e-12
    assert found.error < 1e-5


class Scaled(torch.nn.Module):
    """Attention by hand whose scale is an attribute: with dynamic shapes Dynamo makes a symbol of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.37
        self.up = torch.nn.Linear(C, H * (D + E), bias=False)

    def forward(self, query: Tensor, latent: Tensor) -> Tensor:
        key, value = keys_and_values(latent, self.up.weight)
        return (query @ key.mT * self.scale).softmax(-1) @ value


@pytest.mark.skipif(bool(unavailable("cpu")), reason=unavailable("cpu"))
def test_a_symbolic_scale_keeps_the_kernel() -> None:
    t = tensors()
    found = outcome("absorb_up_projection", Scaled(), t["query"], t["latent"], dynamic=True)
    assert found.verdict.outcome == "applied" and found.error < 1e-5
    (graph,) = history.reports().graphs
    assert "plain operators" not in " ".join(graph.lowered)


def own_rope(query: Tensor, latent: Tensor, weight: Tensor, angle: Tensor) -> Tensor:
    """The keys are rotated after the up-projection: only the values can be absorbed."""
    key, value = keys_and_values(latent, weight)
    a, b = key.chunk(2, -1)
    key = torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
    return attend(query, key, value)


def test_values_alone() -> None:
    t = tensors(angle=(T, D // 2))
    found = outcome("absorb_up_projection", own_rope, *(t[n] for n in ("query", "latent", "weight", "angle")))
    assert found.verdict.outcome == "applied" and found.error < 1e-5


def test_biases_of_keys_cancel_and_those_of_values_stay() -> None:
    t = tensors(bias=(H * (D + E),))

    def biased(query: Tensor, latent: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return attend(query, *keys_and_values(latent, weight, bias))

    found = outcome("absorb_up_projection", biased, *(t[n] for n in ("query", "latent", "weight", "bias")))
    assert found.verdict.outcome == "applied" and found.error < 1e-5


def refused(function: Callable[..., Tensor], *names: str, **more: tuple[int, ...]) -> str:
    t = tensors(**more)
    found = outcome("absorb_up_projection", function, *(t[name] for name in names))
    assert found.verdict.outcome == "refused", found.verdict
    assert found.error < 1e-5
    return found.verdict.reason


def test_biases_beside_sinks_become_one_more_column() -> None:
    def sunk(query: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
        key, value = keys_and_values(latent, weight, bias)
        scores = torch.cat((query @ key.mT, sink.view(1, H, 1, 1).expand(B, H, 1, 1)), -1)
        return scores.softmax(-1)[..., :-1] @ value

    t = tensors(bias=(H * (D + E),), sink=(H,))
    found = outcome("absorb_up_projection", sunk, *(t[n] for n in ("query", "latent", "weight", "bias", "sink")))
    assert found.verdict.outcome == "applied" and found.error < 1e-5


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("less", ["sinks", "mask", "cap"])
def test_a_bias_on_one_side_where_the_weights_of_a_row_may_not_sum_to_one(side: str, less: str) -> None:
    """The other side is not linear in the latent."""

    def one_sided(query: Tensor, latent: Tensor, weight: Tensor, bias: Tensor, sink: Tensor, keep: Tensor) -> Tensor:
        key, value = keys_and_values(latent, weight, bias)
        key, value = (key, F.silu(value)) if side == "key" else (F.silu(key), value)
        if less == "mask":  # the first row sees nothing
            return F.scaled_dot_product_attention(query, key, value, keep)
        scores = query @ key.mT
        if less == "cap":
            return ((scores / 3).tanh() * 3).softmax(-1) @ value
        scores = torch.cat((scores, sink.view(1, H, 1, 1).expand(*scores.shape[:3], 1)), -1)
        return scores.softmax(-1)[..., :-1] @ value

    t = tensors(3, bias=(H * (D + E),), sink=(H,))
    keep = torch.arange(T) < torch.tensor([[0], [4], [T]])
    inputs = (*(t[name] for name in ("query", "latent", "weight", "bias", "sink")), keep)
    found = outcome("absorb_up_projection", one_sided, *inputs)
    assert found.verdict.outcome == "applied" and found.error < 1e-5, found


@pytest.mark.parametrize("S", [1, 3])
def test_keys_alone_beside_a_rotary_part(S: int) -> None:
    def keys_alone(query: Tensor, rope: Tensor, latent: Tensor, key_rope: Tensor, weight: Tensor) -> Tensor:
        key, value = keys_and_values(latent, weight)
        key = torch.cat((key, key_rope.expand(-1, H, -1, -1)), -1)
        return attend(torch.cat((query, rope), -1), key, F.silu(value))

    t = tensors(S)
    names = ("query", "query_rope", "latent", "key_rope", "weight")
    found = outcome("absorb_up_projection", keys_alone, *(t[name] for name in names))
    assert found.verdict.outcome == "applied" and found.error < 1e-5, found


def test_keys_that_are_the_queries_too() -> None:
    """The certificate computes what is queries and, absorbed, keys: drawn at random, the two would contradict."""

    def tied(latent: Tensor, weight: Tensor) -> Tensor:
        key = F.linear(latent, weight).view(B, -1, H, D + E).transpose(1, 2)
        return attend(key, key, key)

    found = outcome("absorb_up_projection", tied, *(tensors()[name] for name in ("latent", "weight")))
    assert found.verdict.outcome == "applied" and found.error < 1e-5


def test_what_is_not_linear_is_refused() -> None:
    def bent(query: Tensor, latent: Tensor, weight: Tensor) -> Tensor:
        key, value = keys_and_values(latent, weight)
        return attend(query, F.silu(key), F.silu(value))

    assert "no product of weights" in refused(bent, "query", "latent", "weight")


def test_what_is_no_narrower_is_refused() -> None:
    def wide(query: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return attend(query, *keys_and_values(x, weight))

    reason = refused(wide, "query", "x", "wide", x=(B, T, 80), wide=(H * (D + E), 80))
    assert "no narrower" in reason


def test_a_latent_that_is_overwritten_before_the_output_is_refused() -> None:
    def overwritten(query: Tensor, latent: Tensor, weight: Tensor) -> Tensor:
        latent = latent.clone()
        key, value = keys_and_values(latent, weight)
        latent.zero_()
        return attend(query, key, value) + latent.sum()

    assert "written in between" in refused(overwritten, "query", "latent", "weight")


# ** other people's spellings **


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, n in enumerate(EXPECTED)]
)
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static", "dynamic"])
def test_spellings(name: str, dynamic: bool) -> None:
    program = ALL[name]
    if dynamic and not program.dynamic_ok:
        pytest.skip(str(program.reason))
    torch._dynamo.reset()
    options = {"inner": "eager", "strict": True}
    with torch.no_grad():
        expected = program.fn(*program.inputs(seed=0))
        actual = torch.compile(program.fn, backend="latent", dynamic=dynamic or None, options=options)(
            *program.inputs(seed=0)
        )
    for one, other in zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    verdicts = [v for v in history.reports().verdicts if v.rewrite == "absorb_up_projection"]
    outcome = "applied" if EXPECTED[name].side != "none" else "refused"
    assert verdicts and all(v.outcome == outcome for v in verdicts), verdicts


# ** the forms of the operator **


@st.composite
def calls(draw: st.DrawFn) -> LatentCall:
    """Calls with every feature, in float64, so that forms may differ by rounding only."""
    B, L, per_latent, G = draw(st.tuples(*[st.integers(1, 2)] * 4))
    K = L * per_latent
    H, S, T = K * G, draw(st.integers(1, 6)), draw(st.integers(1, 40))
    D, E, R, C = draw(st.sampled_from([(5, 3, 2, 7), (6, 9, 4, 5)]))  # a kernel is built for each
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seed)

    with_rope, causal = draw(st.booleans()), draw(st.booleans())
    mask = None
    if draw(st.booleans()):
        mask = torch.rand((1, 1, S, T), generator=seed) < 0.6
        mask[..., 0] = True
        if draw(st.booleans()):
            mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    sinks = normal(H) if draw(st.booleans()) else None
    return LatentCall(
        normal(B, H, S, D),
        normal(B, H, S, R) if with_rope else None,
        normal(B, L, T, C),
        normal(B, draw(st.sampled_from([L, K])), T, R) if with_rope else None,
        normal(B, L, T, C) if draw(st.booleans()) else None,
        normal(K, D, C),
        normal(K, E, C),
        normal(K, E) if draw(st.booleans()) else None,
        mask,
        sinks,
        0.4,
        0.0 if with_rope else draw(st.sampled_from([0.0, 1.5])),
        causal,
        draw(st.sampled_from([0, 3])) if causal else 0,
    )


@settings(max_examples=60, deadline=None)
@given(calls())
def test_absorbed_and_expanded_agree(call: LatentCall) -> None:
    expected = plain(*(t.double() if isinstance(t, Tensor) and t.dtype != torch.bool else t for t in call))
    size = expected.abs().max().clamp(min=1e-3)
    for form in (
        lambda call: absorbed(call, reference),
        expanded,
        lambda call: expanded_in_blocks(call, block=7),
        lambda call: expanded_in_blocks(call),
    ):
        assert (form(call) - expected).abs().max() / size < 1e-5
