"""Comparisons of stages: by what nodes are and read, never by their names; identical layers once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latent.rewriter.command.cli import app
from latent.rewriter.dump import Recorded, graph_files, write_dump
from latent.rewriter.explain import record
from latent.rewriter.report import Report
from latent.rewriter.stages.compare import Comparison, compare
from latent.rewriter.stages.compare_html import render as html
from latent.rewriter.stages.compare_text import render, stat
from latent.rewriter.stages.view import Stage, map_refs
from test_dump import Attention, Choices, Layers, layers
from torch import nn
from typer.testing import CliRunner


def recorded_of(model: Any, *inputs: torch.Tensor) -> Recorded:
    with torch.no_grad():
        _, (graph,) = record(model)(*inputs)
    return graph


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    model, inputs = layers()
    return recorded_of(model, inputs["x"])


def captured(model: Any, *inputs: torch.Tensor) -> Stage:
    return recorded_of(model, *inputs).stages["captured"]


def changes(difference: Comparison) -> list[tuple[str, str]]:
    return [
        (line.sign, (line.after or line.before).operator)  # type: ignore[union-attr]
        for module in difference.modules
        for line in module.changes
    ]


def renamed(stage: Stage) -> Stage:
    """The same graph with other names for all its nodes."""
    names = {node.name: f"n{len(stage.nodes) - number}" for number, node in enumerate(stage.nodes)}
    nodes = (
        replace(node, name=names[node.name], args=map_refs(node.args, names), kwargs=map_refs(node.kwargs, names))
        for node in stage.nodes
    )
    return replace(stage, nodes=tuple(nodes))


# ** what differs **


def test_names_do_not_matter(recorded: Recorded) -> None:
    for stage in recorded.stages.values():
        difference = compare(stage, renamed(stage))
        assert difference.equal, render(difference)
        assert "no difference in 7 modules" in render(difference)


TWO = torch.randn(2, 4), torch.randn(2, 4)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (lambda x, y: x - y, lambda x, y: y - x, [("~", "sub")]),
        (lambda x, y: x * 2 + y, lambda x, y: x * 3 + y, [("-", "mul"), ("+", "mul"), ("~", "add")]),
        (lambda x, y: x.relu() + y, lambda x, y: x + y, [("-", "relu"), ("~", "add")]),
        (lambda x, y: (x + y).sum(1), lambda x, y: (x + y).sum(1, True), [("-", "sum"), ("+", "sum")]),
        (lambda x, y: x.sin() + y.cos(), lambda x, y: x.sin() + x.cos(), [("~", "cos")]),
        (lambda x, y: x.exp() * x.exp() + y, lambda x, y: x.exp() * y.exp() + y, None),
    ],
)
def test_small_changes(
    one: Callable[..., Any], other: Callable[..., Any], expected: list[tuple[str, str]] | None
) -> None:
    difference = compare(captured(one, *TWO), captured(other, *TWO))
    assert not difference.equal
    if expected is not None:
        assert changes(difference) == expected


def test_order_of_independent_nodes_does_not_matter() -> None:
    def one(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = x.sin(), y.cos()
        return a + b

    def other(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        b, a = y.cos(), x.sin()
        return a + b

    assert compare(captured(one, *TWO), captured(other, *TWO)).equal


def test_inputs_and_shapes() -> None:
    difference = compare(captured(nn.Linear(4, 3), TWO[0]), captured(nn.Linear(4, 5, bias=False), TWO[0]))
    assert {(line.sign, line.text_before, line.text_after) for line in difference.inputs} == {
        ("~", "weight: f32[3, 4]", "weight: f32[5, 4]"),
        ("-", "bias: f32[3]", ""),
    }
    assert "  ~ weight: f32[3, 4] → weight: f32[5, 4]" in render(difference)


# ** identical layers **


def test_captured_against_rewritten_fits_on_a_screen(recorded: Recorded) -> None:
    text = render(compare(recorded.stages["captured"], recorded.stages["rewritten"]))
    lines = text.splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 112
    assert text.count("layers.[0-2] × 3") == 1 and text.count("latent::attention") == 1
    for said in ("softmax f32[2, 12, 12]", "by fuse_attention", "latent::attention f32[1, 2, 12, 16]"):
        assert said in text
    short = stat(compare(recorded.stages["captured"], recorded.stages["rewritten"]))
    assert re.search(r"layers\.\[0-2\] × 3 +- .*matmul × 2.*softmax", short) and len(short.splitlines()) < 9


def test_a_layer_that_changed_stands_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 16)
    one, other = Layers(4), Layers(4)

    class Hotter(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * 2)

    other.layers[2] = Hotter()
    text = render(compare(captured(one, x), captured(other, x)))
    assert re.search(r"^layers\.2$", text, re.M) and "× 4" not in text
    assert "+ mul f32[2, 12, 16]" in text


def test_versions_of_a_library() -> None:
    """The same model with its attention spelled in two ways, as two versions of a library would."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    stages = []
    for spelling in ("eager", "sdpa"):
        config = transformers.LlamaConfig(num_hidden_layers=3, vocab_size=64, attn_implementation=spelling, **sizes)
        model = transformers.LlamaForCausalLM(config).eval()
        stages.append(recorded_of(lambda ids, m=model: m(input_ids=ids, use_cache=False).logits, torch.arange(8)[None]))
    before = compare(stages[0].stages["captured"], stages[1].stages["captured"])
    attention = next(m for m in before.modules if m.paths[0].endswith("self_attn"))
    assert len(attention.paths) == 3 and attention.counts("+")["scaled_dot_product_attention"] == 1
    assert {line.sign for m in before.modules for line in m.changes if "proj" in m.paths[0]} <= {"~"}
    after = compare(stages[0].stages["lowered"], stages[1].stages["lowered"])
    assert not any("softmax" in m.counts("-") for m in after.modules), "rewritten, both attend in one call"


# ** forms **


def test_html_is_escaped_and_loads_nothing(recorded: Recorded) -> None:
    pytest.importorskip("jinja2")
    stage = recorded.stages["captured"]
    bad = "<script>alert(1)</script>"
    other = replace(stage, nodes=tuple(replace(n, module=bad) if n.kind == "call" else n for n in stage.nodes))
    page = html([compare(stage, other, ("a<b", "c"))])
    assert bad not in page and "&lt;script&gt;" in page and "a&lt;b" in page
    assert not re.search(r"https?://|src=|url\(|@import", page)
    page = html([compare(stage, recorded.stages["rewritten"])])
    assert page.count("<details") == 2 and 'class="old"' in page and 'class="new"' in page and 'class="same"' in page


# ** the command **


@pytest.fixture(scope="module")
def dumps(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    choices = Choices(formats=("json",))
    write_dump(folder / "one", Report((recorded.report,)), [recorded], choices)
    model, inputs = layers()
    without = recorded_of(lambda x: model(x), inputs["x"].double().float()[:, :9])
    write_dump(folder / "two", Report((without.report,)), [without], choices)
    assert set(graph_files(recorded, choices)) >= {"captured.json", "report.json"}
    return folder


def latent(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_command(dumps: Path, tmp_path: Path) -> None:
    graph = dumps / "one" / "graph_0"
    stages = latent("diff", graph / "captured", graph / "rewritten.json")
    assert stages.exit_code == 0 and "layers.[0-2] × 3" in stages.stdout
    same = latent("diff", dumps / "one", dumps / "one")
    assert same.exit_code == 0 and same.stdout.count("no difference") == 4
    runs = latent("diff", dumps / "one", dumps / "two", "--stat")
    assert runs.stdout.count("\n+ ") == 1, "later stages follow from the first that differs"
    assert "rewritten" in latent("diff", dumps / "one", dumps / "two", "--stage", "rewritten").stdout
    full = latent("diff", graph / "captured", graph / "rewritten", "--full")
    assert "- softmax(masked_fill, -1)   f32[2, 12, 12]" in full.stdout
    (data,) = json.loads(latent("diff", graph / "captured", graph / "rewritten", "--json").stdout)
    assert data["modules"][0]["paths"] == ["layers.0", "layers.1", "layers.2"]
    assert data["modules"][0]["added"]["latent::attention"] == 1
    page = tmp_path / "page.html"
    assert latent("diff", graph, dumps / "two" / "graph_0", "--html", page).exit_code == 0
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("one/graph_0/missing", "one", "missing: there is no such dump"),
        ("one/graph_0/report.json", "one/graph_0/captured", "report.json cannot be read: it is no stage of a dump"),
        ("one/graph_0/captured", "one/graph_0", "one is a stage, the other a folder"),
    ],
)
def test_errors_in_words(dumps: Path, a: str, b: str, said: str) -> None:
    result = latent("diff", dumps / a, dumps / b)
    assert result.exit_code == 1 and said in result.stderr and "Traceback" not in result.stderr
    assert latent("diff", dumps / "one", dumps / "two", "--stage", "final").exit_code == 2


def test_needs_no_torch(dumps: Path) -> None:
    """Comparing two files takes no second."""
    import subprocess
    import sys

    from test_dump import environment

    graph = dumps / "one" / "graph_0"
    code = (
        "import sys; from latent.rewriter.command.cli import app\n"
        f"try: app(['diff', {str(graph / 'captured')!r}, {str(graph / 'lowered')!r}])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.endswith("False\n"), done.stdout + done.stderr
