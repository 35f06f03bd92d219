"""`latent convert` and `latent recipes`: flags from recipes, the gate, what is written, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import latent
import pytest
import torch
from latent.passes.recipes.joint_latent import JointLatent
from latent.rewriter.command import recipe_flags
from latent.rewriter.command.cli import app
from latent.rewriter.evaluate.quality import Comparison
from typer.testing import CliRunner

SMALL = ("--text", "pkg:json", "--other", "pkg:email", "--length", 64, "--calibration-windows", 8, "--tokens", 200)


@pytest.fixture
def folder(byte_model):
    return byte_model


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_a_model_is_converted_measured_written_and_loaded_in_a_new_process(folder, tmp_path):
    out = tmp_path / "half"
    told = run("convert", folder, "-o", out, "--recipe", "joint_latent", "--share", 0.75, *SMALL)
    assert told.exit_code == 0, told.stderr
    assert "joint_latent --share 0.75" in told.stdout and "× 2" in told.stdout and f"wrote {out}" in told.stdout
    card = (out / "README.md").read_text()
    for said in (
        "pkg:email",
        "JointMemory rank",
        'latent.load("half")',
        "logits of 64 tokens are equal",
        "| pkg:json |",
    ):
        assert said in card
    code = (
        "import sys, torch, latent\n"
        "model = latent.load(sys.argv[1])\n"
        "ids = torch.arange(10)[None]\n"
        "options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)\n"
        "print(model.generate(ids, past_key_values=latent.LatentCache(model), **options)[0].tolist())\n"
    )
    other = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    model = latent.load(out)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    here = model.generate(torch.arange(10)[None], past_key_values=latent.LatentCache(model), **options)
    assert json.loads(other.stdout) == here[0].tolist(), other.stderr
    again = run("convert", out, "--dry-run", "--recipe", "joint_latent", *SMALL)
    assert again.exit_code == 1 and "it is converted already" in again.stderr
    evaluated = run("eval", out, "--text", "pkg:json", "--tokens", 100, "--length", 64, "--prefix", 16, "--filled", 64)
    assert evaluated.exit_code == 0 and " B" in evaluated.stdout


def test_numbers_are_those_of_the_library(folder, tmp_path):
    """At full rank nothing changes; the bytes are those of the caches."""
    out = tmp_path / "same"
    arguments = ("--recipe", "joint_latent", "--rank", 32, *SMALL)
    told = json.loads(run("convert", folder, "-o", out, "--max-ppl-increase", "0.1%", "--json", *arguments).stdout)
    assert told["written"] == str(out) and set(told["scores"]) == {"pkg:json", "pkg:email"}
    assert told["unseen"] == ["pkg:email"] and told["calibrated"][0].startswith("pkg:json (")
    for score in told["scores"].values():
        assert abs(score["increase"]) < 1e-4 and score["agreement"] > 0.99 and score["tokens"] == 5 * 48
    assert told["bytes_before"] == 2 * 32 * 64 * 4
    assert told["bytes_after"] == 2 * 32 * 64 * 4 + 8 * 64 * 4  # latents of both layers, angles once
    assert [layer["bytes_per_token"] for layer in told["layers"]] == [32 * 4] * 2


def test_the_gate_writes_nothing(folder, tmp_path, monkeypatch):
    """A random model is as good as any other, so the increase is made up."""
    monkeypatch.setattr(Comparison, "increase", property(lambda self: 0.2))
    out = tmp_path / "small"
    told = run("convert", folder, "-o", out, "--recipe", "joint_latent", "--max-ppl-increase", "19.9%", *SMALL)
    assert told.exit_code == 3 and not told.stdout.count("wrote")
    assert "expectation failed: perplexity on pkg:json +20.0%, allowed 19.9%; nothing was written" in told.stderr
    assert not out.exists() and not any(tmp_path.iterdir())


def test_a_dry_run_shows_layers_and_writes_nothing(folder, tmp_path):
    out = tmp_path / "dry"
    told = run(
        *("convert", folder, "-o", out, "--dry-run", "--recipe", "joint_latent", "--recipe", "routed-heads"),
        *("--rank", 16, "--no-balance", "--joint-latent.share", 0.4, "--routed_heads.share=0.5", *SMALL),
    )
    assert told.exit_code == 0 and "perplexity" not in told.stdout
    assert "JointMemory rank 16, HeadRouter shared 1 picked 1" in told.stdout
    assert "joint_latent --rank 16 --share 0.4 --no-balance" in told.stdout
    assert "the routers are untrained" in told.stdout and not out.exists()


def test_a_card_says_that_training_is_needed(folder, tmp_path):
    out = tmp_path / "routed"
    told = run("convert", folder, "-o", out, "--recipe", "routed_heads", *SMALL, "--tokens", 0)
    assert told.exit_code == 0
    card = (out / "README.md").read_text()
    assert "It has to be trained before it is used" in card and "untrained" in card and "## Quality" not in card


def test_a_model_that_loads_as_another_is_not_written(folder, tmp_path, monkeypatch):
    from latent.rewriter.convert import store

    plain = store.load

    def load(path):
        made = plain(path)
        made.model.layers[1].self_attn.output.weight.data.add_(1e-3)
        return made

    monkeypatch.setattr(store, "load", load)
    out = tmp_path / "broken"
    told = run("convert", folder, "-o", out, "--recipe", "joint_latent", "--rank", 8, *SMALL, "--tokens", 0)
    assert told.exit_code == 1 and "gives other logits" in told.stderr and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ((), 2, "no recipe is asked for"),
        (("--recipe", "nothing"), 2, "no recipe is named 'nothing'"),
        (("--recipe", "joint_latent", "--recipe", "joint-latent"), 2, "asked for twice"),
        (("--recipe", "joint_latent", "--shares", 3), 2, "--shares is a flag of none"),
        (("--recipe", "joint_latent", "--rank", "many"), 2, "--rank many: this is no int"),
        (("--recipe", "joint_latent", "--ranks", "odd"), 2, "this is no even|energy"),
        (("--recipe", "joint_latent", "--rank"), 2, "--rank needs a value"),
        (("--recipe", "joint_latent", "--no-rank"), 2, "nothing to switch off"),
        (("--recipe", "joint_latent", "more"), 2, "belongs to no flag"),
        (("--recipe", "joint_latent", "--recipe", "routed_heads", "--share", 0.5), 2, "--routed-heads.share"),
        (("--recipe", "joint_latent", "--share", 0.01), 1, "no room"),
        (("--recipe", "joint_latent", "--max-ppl-increase", "much"), 2, "no percentage"),
        (("--recipe", "joint_latent", "--max-ppl-increase", "5%", "--tokens", 0), 2, "needs perplexities"),
    ],
)
def test_what_is_wrong_is_said(folder, tmp_path, arguments, code, reason):
    out = tmp_path / "out"
    told = run("convert", folder, "-o", out, *SMALL, *arguments)
    assert told.exit_code == code and reason in " ".join(told.stderr.split()) and not out.exists()


def test_nothing_is_overwritten(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    told = run("convert", folder, "-o", tmp_path, "--recipe", "joint_latent", *SMALL)
    assert told.exit_code == 1 and "it is there already" in told.stderr
    told = run("convert", "--recipe", "joint_latent", "--rank", 8, folder, "-o", tmp_path / "a", *SMALL)
    assert told.exit_code == 2 and "TARGET comes first" in told.stderr
    told = run("convert", folder, "--recipe", "joint_latent", *SMALL)
    assert told.exit_code == 2 and "nowhere to write to" in told.stderr


def test_recipes_are_listed_with_their_flags():
    told = json.loads(run("recipes", "--json").stdout)
    assert {row["name"]: row["needs"] for row in told}.items() >= {
        "joint_latent": "text",
        "routed_heads": "training",
    }.items()
    assert all(row["does"] and row["exact"] for row in told)
    text = run("recipes", "joint_latent").stdout
    for field in dataclasses.fields(JointLatent):
        assert f"--{field.name}" in text
    assert run("recipes", "nothing").exit_code == 2


def test_values_are_read_by_type():
    @dataclasses.dataclass(frozen=True)
    class Made:
        name = "made"
        lengths: tuple[int, ...] = ()
        plan: dict | str | None = "a"
        deep: bool = True
        rate: float | None = None

    def parsed(*arguments):
        chosen = {}
        for flag, given in recipe_flags._pairs(arguments):
            kind, field, negated = recipe_flags._owner(flag, [Made])
            chosen[field.name] = recipe_flags._value(flag, given, recipe_flags._type(kind, field), negated)
        return Made(**chosen)

    given = ("--lengths", "512,2048", "--plan=a.yaml", "--no-deep", "--rate", "-1e-3")
    assert parsed(*given) == Made((512, 2048), "a.yaml", False, -1e-3)
    assert parsed("--plan", "none", "--deep") == Made(plan=None)
    assert recipe_flags.with_choices(Made((1, 2), deep=False)) == "made --lengths 1,2 --no-deep"
