"""Measured benefit: what is timed is what was replaced and what replaces it, and commands show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latent.rewriter.command import measure as measuring
from latent.rewriter.command.cli import app
from latent.rewriter.explain import record
from latent.rewriter.regions import Regions
from torch import Tensor, nn
from typer.testing import CliRunner

MODEL = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).view(2, -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        hide = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return ((q @ k.mT).masked_fill(hide, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)

def make():
    torch.manual_seed(0)
    return nn.Sequential(Attention(), Attention()).eval(), (torch.randn(2, 16, 32),), {}
"""


class Latent(nn.Module):
    """Keys and values of every head are made of eight numbers a token."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down = nn.Linear(32, 64, bias=False), nn.Linear(32, 8, bias=False)
        self.up_k, self.up_v = nn.Linear(8, 64, bias=False), nn.Linear(8, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        latent = self.down(x)
        q, k, v = (t.view(2, -1, 4, 16).transpose(1, 2) for t in (self.q(x), self.up_k(latent), self.up_v(latent)))
        attended: Tensor = (0.25 * q @ k.mT).softmax(-1) @ v
        return attended


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hide = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    weights: Tensor = (q @ k.mT).masked_fill(hide, -torch.inf).softmax(-1)
    return weights @ v


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q[:, :, :1], k, v)


QKV = tuple(torch.randn(2, 4, 16, 8) for _ in range(3))


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL)
    return f"{tmp_path / 'model.py'}:make"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("model", "inputs", "names"),
    [
        (spelled_out, QKV, {"fuse_attention", "replace_proven_mask"}),
        (one_query, QKV, {"split_kv_decode"}),
        (Latent(), (torch.randn(2, 16, 32),), {"absorb_up_projection"}),
    ],
)
def test_both_sides_of_a_region_compute_the_same(model: Any, inputs: Any, names: set[str], dynamic: bool) -> None:
    regions: dict[str, Regions] = {}
    with torch.no_grad():
        record(model, dynamic=dynamic, stages=False, regions=regions)(*inputs)
        assert {name.split()[0] for name in regions} == names
        for name, each in regions.items():
            if name.startswith("replace_proven_mask"):  # the mask is an input here, and random
                continue
            torch.testing.assert_close(each.before(*each.inputs), each.after(*each.inputs), rtol=1e-4, atol=1e-5)


def test_a_region_ends_at_tensors_and_takes_weights_for_weights() -> None:
    regions: dict[str, Regions] = {}
    with torch.no_grad():
        record(Latent(), stages=False, regions=regions)(torch.randn(2, 16, 32))
    (region,) = regions.values()
    kinds = sorted((type(t) is nn.Parameter, tuple(t.shape)) for t in region.inputs)
    assert kinds == [(False, (2, 4, 16, 16)), (False, (2, 16, 8)), (True, (64, 8)), (True, (64, 8))]
    linear = torch.ops.aten.linear.default
    assert [n.target for n in region.before.graph.nodes].count(linear) == 2  # the up-projections alone


def test_regions_are_compiled_and_timed(target: str) -> None:
    data = json.loads(run("explain", target, "--measure", "--rewrite", "fuse_attention", "--json").stdout)
    (note,) = (note for note in data["notes"] if note.startswith("timed on"))
    applied = [v for v in data["graphs"][0]["verdicts"] if v["outcome"] == "applied"]
    assert len(applied) == 2 and all(v["timing"]["before"] > 0 < v["timing"]["after"] for v in applied)
    assert all(v["timing"]["device"] in note for v in applied)
    assert all(v["timing"] is None for v in data["graphs"][0]["verdicts"] if v["outcome"] != "applied")


def test_explain_and_report_show_what_was_measured(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_compiled", lambda gm, inputs: lambda: gm(*inputs))
    text = run("explain", target, "--measure").stdout
    assert "timed on" in text and text.count("takes ") == 2 and text.count(" × as fast") == 2
    pytest.importorskip("jinja2")
    run("report", target, "--measure", "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<th>measured</th>" in page and "measured, in each call" in page
    run("report", target, "-o", tmp_path / "page.html")
    assert "<th>measured</th>" not in (tmp_path / "page.html").read_text()


def test_what_cannot_be_compiled_is_named(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gm: object, inputs: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(measuring, "_compiled", broken)
    result = run("explain", target, "--measure")
    assert result.exit_code == 0 and "takes " not in result.stdout and "✓ fuse_attention" in result.stdout
    assert "fuse_attention is not measured: RuntimeError: no compiler" in result.stderr


# ** dumps **


def test_a_dump_is_explained_as_the_model_was(target: str, tmp_path: Path) -> None:
    run("dump", target, "--out", tmp_path / "dump")
    model, dump = (run("explain", t, "--json").stdout for t in (target, tmp_path / "dump"))
    (one,), (other,) = (json.loads(text)["graphs"] for text in (model, dump))
    assert one["sites"] == other["sites"] and one["verdicts"] == other["verdicts"]
    text = run("explain", tmp_path / "dump", "--site", "0").stdout
    assert f"a dump of {target}" in text and "attention   1 site" in text
    assert run("explain", tmp_path / "dump", "--expect", "attention=3").exit_code == 3


@pytest.mark.parametrize("option", [["--measure"], ["--dynamic"], ["--rewrite", "fuse_attention"], ["--from-config"]])
def test_options_that_need_the_model_are_refused_for_dumps(target: str, tmp_path: Path, option: list[str]) -> None:
    run("dump", target, "--out", tmp_path / "dump", "--stage", "rewritten", "--format", "json")
    result = run("explain", tmp_path / "dump", *option)
    assert result.exit_code == 1 and f"Give the model itself: {target}" in result.stderr and not result.stdout


def test_what_reads_no_dump_says_what_does(target: str, tmp_path: Path) -> None:
    run("dump", target, "--out", tmp_path / "dump", "--stage", "rewritten", "--format", "json")
    result = run("masks", tmp_path / "dump")
    assert result.exit_code == 1 and "`latent explain` and `latent report` read dumps" in result.stderr
