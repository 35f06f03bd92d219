"""Under autocast rewritten attention is as right as eager's, and operators are out of its reach."""

from __future__ import annotations

import contextlib
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import latent
import pytest
import torch
import torch.nn.functional as F
from latent.kernels import picked_heads
from latent.kernels.generated import unavailable
from latent.rewriter.backend import transform
from latent.rewriter.options import read_options
from torch import Tensor, nn

H, D, C, T, WIDTH = 4, 32, 16, 40, 64
assert picked_heads  # defines latent::attend_used
NEEDS_COMPILER = pytest.mark.skipif(bool(unavailable("cpu")), reason=unavailable("cpu"))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def narrow(enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * D**-0.5).softmax(-1) @ value


def in_float32(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with narrow(False):
        weights = (query.float() @ key.float().mT * D**-0.5).softmax(-1)
        return weights @ value.float()


def without_matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (query[:, :, :, None].float() * key[:, :, None].float()).sum(-1)
    return (scores * D**-0.5).softmax(-1).to(value.dtype) @ value


ATTENTIONS: list[Callable[..., Tensor]] = [by_hand, in_float32, without_matmul, F.scaled_dot_product_attention]


class Latents(nn.Module):
    """Keys or values or both are made of float32 latents; `inside` says where the region of autocast is."""

    def __init__(self, attend: Callable[..., Tensor], made: str, inside: bool) -> None:
        super().__init__()
        self.query, self.own = nn.Linear(WIDTH, H * D, bias=False), nn.Linear(WIDTH, H * D)
        self.key, self.value = nn.Linear(C, H * D), nn.Linear(C, H * D)
        self.attend, self.made, self.inside = attend, made, inside

    def forward(self, x: Tensor, latents: Tensor, tokens: Tensor) -> Tensor:
        with narrow() if self.inside else contextlib.nullcontext():
            key = self.own(tokens) if self.made == "values" else self.key(latents)
            value = self.own(tokens) if self.made == "keys" else self.value(latents)
            by_head = (t.view(1, -1, H, D).transpose(1, 2) for t in (self.query(x), key, value))
            return self.attend(*by_head)


def check(model: Latents, queries: int, inner: str, gradients: bool = False) -> None:
    given = torch.randn(1, queries, WIDTH), torch.randn(1, T, C), torch.randn(1, T, WIDTH)
    with torch.set_grad_enabled(gradients), narrow(not model.inside):
        eager = model(*given)
        compiled = torch.compile(model, backend="latent", options={"inner": inner, "strict": True})
        actual = compiled(*given)
    applied = [v.rewrite for graph in latent.reports().graphs for v in graph.verdicts if v.outcome == "applied"]
    assert applied == ["absorb_up_projection"]
    assert actual.dtype == eager.dtype
    assert (actual - eager).abs().max() <= 1.5e-2 * eager.abs().max()
    if gradients:
        actual.float().square().sum().backward()
        assert all(p.grad is not None for p in (model.query.weight, model.value.weight))


AROUND_OR_INSIDE = pytest.mark.parametrize("inside", [False, True], ids=["around the call", "inside the model"])


@AROUND_OR_INSIDE
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("attend", ATTENTIONS)
def test_float32_latents(attend: Callable[..., Tensor], queries: int, inside: bool) -> None:
    check(Latents(attend, "keys and values", inside), queries, "eager")


@AROUND_OR_INSIDE
@pytest.mark.parametrize("attend", [by_hand, in_float32])
@pytest.mark.parametrize("made", ["keys", "values"])
def test_one_of_both_is_a_latent(made: str, attend: Callable[..., Tensor], inside: bool) -> None:
    check(Latents(attend, made, inside), 1, "eager")


@AROUND_OR_INSIDE
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("attend", [by_hand, in_float32])
def test_float32_latents_through_inductor(attend: Callable[..., Tensor], queries: int, inside: bool) -> None:
    check(Latents(attend, "keys and values", inside), queries, "inductor")


@AROUND_OR_INSIDE
@pytest.mark.parametrize("attend", [by_hand, in_float32])
def test_gradients(attend: Callable[..., Tensor], inside: bool) -> None:
    check(Latents(attend, "keys and values", inside), 5, "eager", gradients=True)


def test_products_are_as_narrow_as_autocast_makes_them() -> None:
    model = Latents(by_hand, "keys and values", inside=False)
    kept: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        kept.append(transform(gm, inputs, read_options({}, None), {})[0])
        return gm.forward

    with torch.no_grad(), narrow():
        torch.compile(model, backend=backend)(torch.randn(1, 5, WIDTH), torch.randn(1, T, C), torch.randn(1, T, WIDTH))
    (either,) = [n for n in kept[0].graph.nodes if str(n.target).startswith("latent.latent_attention")]
    tensors = [n.meta["val"].dtype for n in either.all_input_nodes]
    assert set(tensors) == {torch.bfloat16}


def test_dumped_stages_are_python(tmp_path: Path) -> None:
    model, given = Latents(by_hand, "keys and values", inside=True), (torch.randn(1, 1, WIDTH), torch.randn(1, T, C))
    options = {"inner": "eager", "strict": True, "dump": str(tmp_path)}
    with torch.no_grad():
        expected = model(*given, given[0])
        torch.compile(model, backend="latent", options=options)(*given, given[0])
    (lowered,) = tmp_path.rglob("lowered.py")
    assert "_enter_autocast('cpu', torch.bfloat16, False, True)" in lowered.read_text(encoding="utf-8")
    made = runpy.run_path(str(lowered))
    with torch.no_grad():
        (actual,) = made["graph"](**made["inputs"]())
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)


def operators() -> dict[str, Callable[[], Tensor]]:
    ops, scoring = torch.ops.latent, (None, None, 0.2, 0.0, False, 0)
    query, key = torch.randn(1, H, 1, D), torch.randn(1, 1, T, D)
    several, latents, up = torch.randn(1, H, 300, D), torch.randn(1, 1, T, C), torch.randn(H, D, C)
    rows, weight, used = torch.randn(1, 512), torch.randn(512, 512), torch.ones(1, H, dtype=torch.bool)
    return {
        "attention": lambda: ops.attention(query, key, key, *scoring, True),
        "generated_attention": lambda: ops.generated_attention(query, None, key, None, None, *scoring, 0),
        "latent_attention": lambda: ops.latent_attention(query, None, latents, None, None, up, up, None, *scoring),
        "either, absorbed": lambda: ops.latent_attention_either(
            query, None, latents, None, None, up, up, None, *scoring
        ),
        "either, expanded": lambda: ops.latent_attention_either(
            several, None, latents, None, None, up, up, None, *scoring
        ),
        "gemv": lambda: ops.gemv(rows, [weight], [None])[0],
        "attend_used": lambda: ops.attend_used(query, used, key, key, None, 0.2, None),
    }


@NEEDS_COMPILER
@pytest.mark.parametrize("name", operators())
def test_operators_compute_in_the_dtypes_of_their_arguments(name: str) -> None:
    run = operators()[name]
    with torch.no_grad():
        plain = run()
        with narrow():
            torch.testing.assert_close(run(), plain, rtol=1e-5, atol=1e-5)
