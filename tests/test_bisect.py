"""Fuel stops rewriting at an application, and bisection finds the one that is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latent
import pytest
import torch
from latent.passes.fuse_attention import FuseAttention
from latent.passes.replace_proven_mask import ReplaceProvenMask
from latent.rewriter.bisect import Bisection, BisectionError, bisect
from latent.rewriter.command.cli import app
from latent.rewriter.options import read_options
from latent.rewriter.provenance import module_path
from latent.rewriter.registry import unregister
from latent.rewriter.rules import Refusal
from torch import nn
from typer.testing import CliRunner

LAYERS, LAYER = 30, 17
X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = (q @ k.mT / 2).masked_fill(future, float("-inf")).softmax(-1)
        return x + (weights @ v).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Attention() for _ in range(LAYERS))).eval()


@pytest.fixture
def planted() -> Iterator[None]:
    """A rewrite of the proven mask that is wrong in one layer, and declared lossy, so that no certificate stops it."""

    @latent.rewrite("wrong_in_one_layer", exact=False, before=("replace_proven_mask",), after=("fold_repeated_heads",))
    class WrongInOneLayer(ReplaceProvenMask):
        """attention(q, k, v, mask)  ->  attention(q, k, v, causal), and a tenth more in one layer."""

        def build(self, match: Any, emit: Any) -> Any:
            output = super().build(match, emit)
            factor = 1.1 if module_path(match.site.anchor) == str(LAYER) else 1.0
            return emit.call(torch.ops.aten.mul.Tensor, output, factor)

    yield
    unregister("wrong_in_one_layer")


@torch.no_grad()
def search(model: Any, *args: Any, tolerance: float | None = None, **options: Any) -> Bisection:
    return bisect(model, args, {}, read_options({"inner": "eager", **options}), tolerance)


def test_finds_the_wrong_one_of_sixty_applications(stack: nn.Sequential, planted: None) -> None:
    found = search(stack, X, rewrites=("fuse_attention", "wrong_in_one_layer"))
    assert len(found.steps[0].applications) == 2 * LAYERS
    assert len(found.steps) <= 7
    assert found.verdict == "rewrite" and found.good and found.bad and found.culprit
    assert (found.good.fuel, found.bad.fuel) == (LAYERS + LAYER, LAYERS + LAYER + 1)
    assert found.good.error < found.tolerance < 1e-2 < found.bad.error
    assert (found.culprit.rewrite, found.culprit.path) == ("wrong_in_one_layer", str(LAYER))
    assert found.culprit.line.startswith("test_bisect.py:") and "softmax_j(" in found.culprit.equation


@torch.no_grad()
def test_the_option_stops_the_rewrites(stack: nn.Sequential) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(stack[:3], backend="latent", options={"fuel": 2, "inner": "eager", "strict": True})
    assert torch.allclose(compiled(X), stack[:3](X), atol=1e-5)
    verdicts = latent.reports().verdicts
    assert [v.site for v in verdicts if v.outcome == "applied"] == [0, 1]
    starved = [v for v in verdicts if v.reason == "no fuel left"]
    assert {v.outcome for v in starved} == {"off"} and {v.rewrite for v in starved} >= {"replace_proven_mask"}


def test_an_exact_one_needs_its_certificate_off(stack: nn.Sequential) -> None:
    @latent.rewrite("wrong_scale", exact=True, before=("fuse_attention",))
    class WrongScale(FuseAttention):
        """softmax(s q k) v  ->  1.1 attention(q, k, v, s), in the last layer."""

        def match(self, site: Any) -> Any:
            late = int(module_path(site.anchor)) >= 3
            return super().match(site) if late else Refusal("too early", site.anchor)

        def build(self, match: Any, emit: Any) -> Any:
            return emit.call(torch.ops.aten.mul.Tensor, super().build(match, emit), 1.1)

    try:
        assert search(stack[:4], X, rewrites="wrong_scale").verdict == "good"  # undone
        found = search(stack[:4], X, verify="off")
        assert found.verdict == "rewrite" and found.culprit and found.culprit.rewrite == "wrong_scale"
        assert len(found.steps) <= 7
    finally:
        unregister("wrong_scale")


def test_one_that_raises_when_it_runs(stack: nn.Sequential) -> None:
    @torch.library.custom_op("bisected::explode", mutates_args=())
    def explode(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of shared memory")

    explode.register_fake(torch.empty_like)

    @latent.rewrite("explosive", exact=False)
    class Explosive(FuseAttention):
        """softmax(s q k) v  ->  explode(attention(q, k, v))."""

        def build(self, match: Any, emit: Any) -> Any:
            return emit.call(torch.ops.bisected.explode.default, super().build(match, emit))

    try:
        found = search(stack[:4], X, rewrites="explosive")
        assert found.bad and found.bad.fuel == 1 and math.isinf(found.bad.error)
        assert "out of shared memory" in found.bad.failure
    finally:
        unregister("explosive")


def test_fuel_is_counted_over_graphs(planted: None) -> None:
    class TwoGraphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(), nn.ModuleList([nn.Identity()] * LAYER + [Attention()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second[LAYER](x)

    @latent.rewrite("wrong_in_the_second", exact=False, before=("fuse_attention",))
    class WrongInTheSecond(FuseAttention):
        """softmax(s q k) v  ->  2 attention(q, k, v), wherever the module is called second."""

        def build(self, match: Any, emit: Any) -> Any:
            factor = 2.0 if "second" in module_path(match.site.anchor) else 1.0
            return emit.call(torch.ops.aten.mul.Tensor, super().build(match, emit), factor)

    try:
        found = search(TwoGraphs().eval(), X, rewrites="wrong_in_the_second")
        assert found.bad and found.bad.fuel == 2 and found.culprit and found.culprit.path.startswith("second")
    finally:
        unregister("wrong_in_the_second")


def test_the_fault_may_lie_behind_the_rewrites(stack: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    def miscompiled(gm: Any, inputs: Any, options: Any) -> Any:
        return lambda *args: [tensor * 1.01 for tensor in gm.forward(*args)]

    monkeypatch.setattr("latent.rewriter.backend.finish", miscompiled)
    found = search(stack[:3], X)
    assert found.verdict == "elsewhere" and found.steps[-1].fuel == 0 and found.culprit is None


def test_a_model_that_draws_new_numbers_is_refused() -> None:
    class Drifting(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Drifting.calls += 1
            return x + Drifting.calls

    with pytest.raises(BisectionError, match="deterministic"):
        search(Drifting(), X)
    with pytest.raises(BisectionError, match="no tensor"):
        search(lambda x: None, X)


def test_every_call_sees_the_same_inputs(stack: nn.Sequential) -> None:
    def writes(x: torch.Tensor) -> torch.Tensor:
        return stack[0](x.add_(1.0))

    given = X.clone()
    assert search(writes, given, tolerance=1e-6).verdict == "good"
    assert torch.equal(given, X)


# ** the command **

FILE = """
import latent, torch
from latent.passes.fuse_attention import FuseAttention

@latent.rewrite("doubled", exact=True)
class Doubled(FuseAttention):
    '''softmax(s q k) v  ->  2 attention(q, k, v, s).'''

    def build(self, match, emit):
        return emit.call(torch.ops.aten.mul.Tensor, super().build(match, emit), 2.0)

def attend(q, k, v):
    return (q @ k.mT / 4).softmax(-1) @ v

def make():
    return attend, tuple(torch.randn(3, 2, 4, 8, 16)), {}
"""


def test_command(tmp_path: Path) -> None:
    file = tmp_path / "doubling.py"
    file.write_text(FILE)
    try:

        def run(*more: str) -> Any:
            command = ["bisect", f"{file}:make", "--rewrite", "doubled", *more]
            return CliRunner().invoke(app, command, catch_exceptions=False)

        assert run().exit_code == 0  # its certificate stops it
        wrong = run("--verify", "off")
        assert wrong.exit_code == 3
        assert "doubled at the model itself   doubling.py:13" in wrong.stdout
        (again,) = (line.split("latent ")[1].split() for line in wrong.stdout.splitlines() if "reproduce:" in line)
        assert again[-2:] == ["--fuel", "1"]
        once = CliRunner().invoke(app, [*again, "--json"], catch_exceptions=False)
        assert once.exit_code == 3 and len(json.loads(once.stdout)["steps"]) == 1
        data = json.loads(run("--verify", "off", "--json").stdout)
        assert data["culprit"]["rewrite"] == "doubled" and data["verdict"] == "rewrite"
        assert run("--verify", "off", "--tolerance", "10").exit_code == 0
    finally:
        unregister("doubled")
