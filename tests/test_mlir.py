"""The rewritten graphs through torch-mlir, run by LLVM: an oracle that shares no code with inductor or our kernels."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latent.kernels import gemv
from latent.rewriter.command.cli import app
from latent.rewriter.mlir import MlirError, MlirGraph, to_mlir
from latent.rewriter.options import read_options
from mlir_tools import executed
from torch import Tensor, nn
from typer.testing import CliRunner

needs_torch_mlir = pytest.mark.skipif(
    importlib.util.find_spec("torch_mlir") is None,
    reason="torch-mlir is not installed (pip install --no-deps torch-mlir)",
)


class Layer(nn.Module):
    """Grouped heads, rotated, under a causal mask that is built as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        hidden = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        weights = (q @ k.mT * 0.5 + hidden).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class Latents(nn.Module):
    """One query token against a cache of latents."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(16, 32), nn.Linear(6, 64, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        k, v = self.up(latents).unflatten(-1, (4, 16)).transpose(1, 2).chunk(2, -1)
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        return ((q @ k.mT / 3).softmax(-1) @ v).transpose(1, 2).flatten(2)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@torch.no_grad()
def run(model: Any, *inputs: Any, **options: Any) -> tuple[tuple[MlirGraph, ...], float]:
    """The graphs as LLVM ran them, and the error relative to eager."""
    expected = model(*inputs)
    graphs, actual = to_mlir(model, inputs, {}, read_options(options), "linalg", executed)
    return graphs, float((actual - expected).abs().max() / expected.abs().max())


@needs_torch_mlir
def test_rewritten_layers_agree_with_eager() -> None:
    model = nn.Sequential(made(Layer), made(Layer)).eval()
    (graph,), error = run(model, torch.randn(2, 6, 16))
    assert graph.report.count("fuse_attention") == graph.report.count("replace_proven_mask") == 2
    assert error < 1e-5


@needs_torch_mlir
def test_absorbed_attention_to_a_cache_agrees_with_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "WORTH", 0)  # no kernel comes in, however large the weights
    (graph,), error = run(made(Latents), torch.randn(2, 1, 16), torch.randn(2, 9, 6))
    assert graph.report.count("absorb_up_projection") == 1
    assert error < 1e-5


@needs_torch_mlir
def test_the_oracle_sees_a_wrong_number() -> None:
    """The run is LLVM's own: a weight that changes in the module, and not in eager, shows."""

    def tampered(graph: MlirGraph) -> Any:
        call = executed(graph)
        return lambda *tensors: call(*(t * 1.001 if t.dim() == 2 else t for t in tensors))

    model, x = made(Layer), torch.randn(2, 6, 16)
    with torch.no_grad():
        expected = model(x)
        _, actual = to_mlir(model, (x,), {}, read_options({}), "linalg", tampered)
    assert (actual - expected).abs().max() > 1e-5


@needs_torch_mlir
def test_a_write_becomes_a_result() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(2, 3, 4))

        def forward(self, q: Tensor, position: Tensor) -> Tensor:
            self.cache.index_copy_(1, position, q)
            return (q @ self.cache.mT).softmax(-1) @ self.cache

    model, q = Written(), torch.randn(2, 1, 4)
    with torch.no_grad():
        (graph,), output = to_mlir(model, (q, torch.tensor([1])), {}, read_options({}))
        assert torch.count_nonzero(model.cache) == 0  # as latent.explain leaves it
        assert torch.allclose(model(q, torch.tensor([1])), output)
    assert str(graph.module).count("tensor<2x3x4xf32>") > 1


@needs_torch_mlir
@pytest.mark.parametrize(("dialect", "operation"), [("torch", "torch.aten.bmm"), ("linalg", "linalg.batch_matmul")])
def test_command(tmp_path: Path, dialect: str, operation: str) -> None:
    file = tmp_path / "factory.py"
    file.write_text(
        "import torch\n"
        "def attend(q, k, v):\n    return (q @ k.mT / 4).softmax(-1) @ v\n"
        "def make():\n    return attend, tuple(torch.randn(3, 2, 4, 8, 16)), {}\n"
    )
    out = tmp_path / "attend.mlir"
    command = ["mlir", f"{file}:make", "--dialect", dialect]
    result = CliRunner().invoke(app, [*command, "--out", str(out), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (graph,) = json.loads(result.stdout)["graphs"]
    assert graph["sites"] == 1 and graph["operations"] > 5
    text = out.read_text()
    assert operation in text and f"@{graph['graph']}(" in text and "latent" not in text
    piped = CliRunner().invoke(app, command, catch_exceptions=False)
    assert piped.stdout.rstrip() == text.rstrip()


@needs_torch_mlir
def test_an_operator_without_a_conversion_is_named() -> None:
    @torch.library.custom_op("unconverted::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)
    with pytest.raises(MlirError, match=r"cannot convert graph_0_0: unconverted\.twice\.default is none"):
        to_mlir(lambda x: twice(x) + 1, (torch.ones(3),), {}, read_options({}))


def test_without_torch_mlir_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_mlir.fx", None)
    with pytest.raises(MlirError, match=r"torch-latent\[mlir\]"):
        to_mlir(lambda x: x, (torch.ones(2),), {}, read_options({}))
