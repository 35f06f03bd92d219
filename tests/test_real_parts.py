"""Complex products in real numbers: the same numbers, no complex operator left, and where they stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import latent
import pytest
import torch
from latent.rewriter.capture import capture
from latent.rewriter.lower import lower
from latent.rewriter.normal_form import remove_dead_code
from latent.rewriter.real_parts import in_real_parts
from torch import Tensor, fx
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

ANGLES = torch.linspace(-3, 3, 7 * 4, dtype=torch.float64).reshape(7, 4)
X = torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TURNS = torch.polar(torch.ones_like(ANGLES), ANGLES)


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    turns = torch.polar(torch.ones_like(angles), angles) * 1.5
    return torch.view_as_real(pairs(x) * turns[None, None]).flatten(3).type_as(x)


def cached_turns(x: Tensor, turns: Tensor) -> Tensor:
    """Factors that are complex already, a part of them, on the left."""
    return torch.view_as_real(turns[2:5].unsqueeze(0) * pairs(x)[:, :, 2:5]).flatten(3)


def moved(x: Tensor, turns: Tensor) -> Tensor:
    z = (pairs(x) * turns).transpose(1, 2).reshape(2, 7, -1).unsqueeze(1)
    return torch.view_as_real(z.expand(2, 5, 7, 12)[..., 3:])


def by_reals(x: Tensor, turns: Tensor) -> Tensor:
    """Real tensors and numbers as factors, and a product of products."""
    return torch.view_as_real(2.0 * (x[..., :4] * (turns * turns)) * pairs(x))


def in_place(x: Tensor, turns: Tensor) -> Tensor:
    """The source of the factor is written to before it is read, which its parts see as well."""
    x = x.clone()
    z = pairs(x)
    x.mul_(2.0)
    return torch.view_as_real(z * turns)


def changed(gm: fx.GraphModule) -> int:
    """How many complex products are left once theirs are made of reals."""
    said = list(in_real_parts(gm.graph))
    remove_dead_code(gm)
    gm.graph.lint()
    gm.recompile()
    left = [n for n in gm.graph.nodes if n.op == "call_function" and n.target is torch.ops.aten.mul.Tensor]
    assert len(said) <= 1
    return sum(n.meta["val"].is_complex() for n in left)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "function, other",
    [(rotated, ANGLES), (cached_turns, TURNS), (moved, TURNS), (by_reals, TURNS), (in_place, TURNS)],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_the_same_numbers(function: Callable[..., Tensor], other: Tensor, dynamic: bool) -> None:
    left = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, inputs)
        left.append(changed(captured))
        return captured.forward

    torch._dynamo.reset()
    x = X.clone().requires_grad_()
    made = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(x, other)
    made.sin().sum().backward()
    y = X.clone().requires_grad_()
    wanted = function(y, other)
    wanted.sin().sum().backward()
    assert left == [0]
    torch.testing.assert_close(made, wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-14, atol=1e-14)


def written(x: Tensor, turns: Tensor) -> Tensor:
    z = pairs(x) * turns
    z.mul_(2.0)
    return torch.view_as_real(z)


def by_imaginary(x: Tensor, turns: Tensor) -> Tensor:
    return torch.view_as_real(pairs(x) * turns * 1j)


def never_read(x: Tensor, turns: Tensor) -> Tensor:
    return pairs(x) * turns


@pytest.mark.parametrize("function", [written, by_imaginary, never_read])
def test_what_stays(function: Callable[..., Tensor]) -> None:
    """Products that are written to, factors that are complex numbers, complex results."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, inputs)
        assert changed(captured) > 0
        return captured.forward

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, backend=backend)(X, TURNS), function(X, TURNS))


def test_long_chains() -> None:
    """As scans over complex states are: no recursion."""

    def scan(x: Tensor, turns: Tensor) -> Tensor:
        z = pairs(x)
        for _ in range(1200):
            z = z * turns
        return torch.view_as_real(z)

    gm = torch.fx.experimental.proxy_tensor.make_fx(scan, tracing_mode="fake")(X, TURNS)
    assert changed(gm) == 0
    torch.testing.assert_close(gm(X, TURNS), scan(X, TURNS))


def test_no_complex_operator_runs_in_a_rotated_model() -> None:
    torch.manual_seed(0)
    config = DeepseekV2Config(
        **dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
        **dict(kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
        **dict(first_k_dense_replace=2, max_position_embeddings=64),
    )
    model = DeepseekV2ForCausalLM(config).eval()
    tokens = torch.arange(12).reshape(2, 6)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled.compile(backend="latent", fullgraph=True, options={"strict": True})
    with torch.no_grad():
        wanted, seen = model(tokens).logits, compiled(tokens).logits  # compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            seen = compiled(tokens).logits
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-5)
    assert not {e.key for e in profile.key_averages()} & {"aten::view_as_complex", "aten::polar", "aten::view_as_real"}
    assert any("complex products in real numbers: 4" in line for line in latent.reports().graphs[-1].lowered)


def test_a_graph_without_rewrites_stays_as_it_is() -> None:
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, inputs)
        before = str(captured.graph)
        assert lower(captured) == () and str(captured.graph) == before
        return captured.forward

    torch._dynamo.reset()
    torch.compile(rotated, backend=backend)(X, ANGLES)
