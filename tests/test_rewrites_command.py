"""latent rewrites and latent patterns: list, show, test, new."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latent
import pytest
from latent.rewriter.command.cli import app
from latent.rewriter.registry import KINDS, patterns, rewrites, unregister, unregister_pattern
from latent.rewriter.rule_facts import pattern_facts, rewrite_facts
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


# ** list and show **


def test_rewrites_are_listed_in_their_order() -> None:
    names = [line.split()[1] for line in run("rewrites").stdout.splitlines()]
    assert names == [entry.name for entry in rewrites()]
    rows = json.loads(run("rewrites", "--json").stdout)
    assert [row["name"] for row in rows] == names and {row["class"] for row in rows} == {"exact"}


def test_patterns_are_listed_by_kind() -> None:
    lines = run("patterns").stdout.splitlines()
    heads = [line.split("   ")[0] for line in lines if not line.startswith(" ")]
    assert heads == list(KINDS)
    assert len(lines) == len(KINDS) + sum(len(patterns(kind)) for kind in KINDS)  # type: ignore[arg-type]


def test_show_says_what_the_source_says() -> None:
    text = run("rewrites", "show", "replace_proven_mask").stdout
    assert "exact   4 of 5" in text and "latent/passes/replace_proven_mask.py:" in text
    assert "runs after   absorb_up_projection, fuse_attention, fold_repeated_heads" in text
    assert "the mask is …, which no flag of a fused call expresses" in text
    assert "causal(q[B H S D], k[B H T D], v[B H T E])" in text
    assert max(map(len, text.splitlines())) <= 114


def test_every_rewrite_has_an_equation_a_place_and_reasons() -> None:
    for facts in rewrite_facts():
        assert facts.equation and facts.conditions, facts.name
        assert facts.defined.startswith(f"latent/passes/{facts.name}.py:")


def test_a_pattern_is_shown_with_its_source() -> None:
    text = run("patterns", "show", "soft_cap").stdout
    assert "latent/patterns/scores.py:" in text and "aten.tanh.default" in text
    (facts,) = json.loads(run("patterns", "show", "soft_cap", "--json").stdout)
    assert facts["kind"] == "score_step" and facts["source"].startswith("@pattern")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rewrites", "show", "fuse_attentio"], "Did you mean fuse_attention?"),
        (["patterns", "show", "nonsense"], "There are: "),
        (["rewrites", "show", "no_such_file.py"], "there is no such file"),
        (["patterns", "test", "transformer_operators"], "declares no example"),
        (["patterns", "test", "no_such_file.py"], "there is no such file"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1 and said in result.stderr and not result.stdout


# ** test **


@pytest.mark.parametrize("name", [facts.name for facts in rewrite_facts()])
def test_built_in_rewrites_hold_on_their_examples(name: str) -> None:
    pytest.importorskip("hypothesis")
    result = run("rewrites", "test", name)
    assert result.exit_code == 0, result.output
    assert f"✓ {name}: applied to " in result.stdout and "gradients agree" in result.stdout


@pytest.mark.parametrize("name", [facts.name for facts in pattern_facts() if facts.examples])
def test_built_in_patterns_read_their_examples_and_nothing_else_does(name: str) -> None:
    report = latent.testing.check_pattern(name)
    without = "no softmax is found" if report.kind == "call" else ("no softmax: ", "the product of", "the weights go")
    assert all(reading.without.startswith(without) for reading in report.readings)
    if report.kind in ("softmax", "score_step"):
        assert all("fuse_attention" in reading.certified for reading in report.readings)


WRONG = """
import latent, torch
from latent.passes.fuse_attention import FuseAttention, spelled_out

@latent.rewrite("a_tenth_more", exact=True)
class ATenthMore(FuseAttention):
    '''softmax(scale · q kᵀ + mask) v  ->  1.1 attention(q, k, v, mask, scale).

    A slip of the pen.
    '''

    def build(self, match, emit):
        return emit.call(torch.ops.aten.mul.Tensor, super().build(match, emit), 1.1)
"""


def test_a_wrong_rewrite_of_a_file_is_found(tmp_path: Path) -> None:
    pytest.importorskip("hypothesis")
    file = tmp_path / "tenth.py"
    file.write_text(WRONG)
    try:
        shown = run("rewrites", "show", file).stdout
        assert f"{file}:5" in shown and "A slip of the pen." in shown
        result = run("rewrites", "test", file)
        assert result.exit_code == 3
        assert "✗ a_tenth_more is wrong at" in result.stdout and "certificate" in result.stdout
        (row,) = json.loads(run("rewrites", "test", file, "--json").stdout)
        assert row["holds"] is False
    finally:
        unregister("a_tenth_more")


SPELLINGS = """
import latent, torch
from latent.rewriter.authoring import Scale, Tanh, args_of
from torch import Tensor

@torch.library.custom_op("{name}::halve", mutates_args=())
def halve(x: Tensor) -> Tensor:
    return 0.5 * x

halve.register_fake(torch.empty_like)
QKV = dict(q="B H S D", k="B H T D", v="B H T E")

def halved(q, k, v):
    return halve(q @ k.mT).softmax(-1) @ v

def weights_halved(q, k, v):
    return halve((q @ k.mT).softmax(-1)) @ v

def plain(q, k, v):
    return (q @ k.mT).softmax(-1) @ v

@latent.pattern("score_step", examples=(({example}, QKV),))
def {name}(node, scores):
    '''halve(scores) = scores / 2.'''
    return Scale(node, {factor}) if node.target is torch.ops.{name}.halve.default else None
"""


@pytest.mark.parametrize(
    ("name", "example", "factor", "said"),
    [
        ("reads_rightly", "halved", 0.5, "fuse_attention certified, relative error"),
        ("reads_wrongly", "halved", 0.6, "misreads halved: fuse_attention its certificate does not hold"),
        ("reads_another", "weights_halved", 0.5, "the weights go through halve"),
        ("reads_nothing", "plain", 0.5, "adds nothing to plain"),
    ],
)
def test_a_spelling_of_a_file_is_checked(tmp_path: Path, name: str, example: str, factor: float, said: str) -> None:
    file = tmp_path / f"{name}.py"
    file.write_text(SPELLINGS.format(name=name, example=example, factor=factor))
    with no_new_patterns():
        result = run("patterns", "test", file)
        shown = run("patterns", "show", name).stdout
        (row,) = json.loads(run("patterns", "test", name, "--json").stdout)
    assert f"examples     {example}(q[B H S D], k[B H T D], v[B H T E])" in shown
    assert row["holds"] is (name == "reads_rightly") and said in row["report"]
    assert said in result.stdout and result.exit_code == (0 if row["holds"] else 3)
    if row["holds"]:
        missed = "the product of queries and keys goes through halve, which is no step of attention"
        assert "without it   " + missed in result.stdout
        assert "with it      softmax_j( 0.5 · q[b h i d] k[b h d j] ) v[b h j e]" in result.stdout


@contextlib.contextmanager
def no_new_patterns() -> Iterator[None]:
    before = {function for kind in KINDS for function in patterns(kind)}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for function in {function for kind in KINDS for function in patterns(kind)} - before:  # type: ignore[arg-type]
            unregister_pattern(function)


# ** new **


@pytest.mark.parametrize(("group", "passed"), [("rewrites", "3 passed"), ("patterns", "2 passed")])
def test_the_scaffold_passes_as_generated(tmp_path: Path, group: str, passed: str) -> None:
    pytest.importorskip("hypothesis")
    result = run(group, "new", "my_own", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(written) == {"my_own.py", "test_my_own.py"}
    assert all(f"wrote {tmp_path / name}" in result.stdout for name in written)
    example = (ROOT / "examples" / ("write_a_rewrite.py" if group == "rewrites" else "custom_spelling.py")).read_text()
    assert len(written["my_own.py"].splitlines()) == len(example.splitlines())
    assert not re.search(r"examples/|\bmine\b|plain_attention|soft_clip\(node", written["my_own.py"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    tests = subprocess.run(pytest_, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert passed in tests.stdout
    lint = [sys.executable, "-m", "ruff", "check", "--select", "F,E,I", "--line-length", "120", str(tmp_path)]
    assert subprocess.run(lint, check=False).returncode == 0


@pytest.mark.parametrize("there", ["mine.py", "test_mine.py"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("precious")
    result = run("rewrites", "new", "mine", "--out", tmp_path)
    assert result.exit_code == 1 and "is not overwritten" in result.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(there, "precious")]


@pytest.mark.parametrize(
    ("name", "said"), [("my-rule", "no name"), ("class", "no name"), ("fuse_attention", "already")]
)
def test_names_that_cannot_be(tmp_path: Path, name: str, said: str) -> None:
    result = run("rewrites", "new", name, "--out", tmp_path)
    assert result.exit_code == 1 and said in result.stderr and not list(tmp_path.iterdir())


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    assert "no such folder" in run("rewrites", "new", "mine", "--out", tmp_path / "no").stderr
