"""`latent plan`: a plan found on text, written as YAML, drawn and applied."""

from __future__ import annotations

import json
from pathlib import Path

import latent
import pytest
import torch
from latent.rewriter.command.cli import app
from latent.rewriter.convert.spans.plan import SpanPlan
from typer.testing import CliRunner


def test_a_plan_keeps_its_budget_and_can_be_applied(byte_model: Path, tmp_path: Path) -> None:
    target, written = str(byte_model), tmp_path / "plan.yaml"
    flags = ["--density", "0.5", "--density", "0.25", "--calibration-windows", "2", "--length", "64"]
    ran = CliRunner().invoke(app, ["plan", target, "-o", str(written), *flags, "--json"])
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    assert [row["density"]["64"] <= most for row, most in zip(said["plans"], (0.25, 0.5), strict=True)] == [True, True]
    assert said["plans"][0]["cost"] >= said["plans"][1]["cost"]
    plan = SpanPlan.load(written)
    assert 0.25 < plan.density(64) <= 0.5  # the first that was asked for
    drawn = CliRunner().invoke(app, ["masks", str(written), "--layer", "0", "--len", "16"])
    assert drawn.exit_code == 0 and "span plan" in drawn.output
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    small = latent.convert(model, latent.HeadSpans(plan=str(written)))
    assert small(torch.arange(8)[None]).logits.shape[1] == 8


@pytest.mark.parametrize(
    ("flags", "said"), [(["--density", "0.001"], "too little"), (["--text", "nowhere.txt"], "nowhere")]
)
def test_what_is_wrong_is_said(byte_model: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    few = ["--calibration-windows", "1", "--length", "64"]
    ran = CliRunner().invoke(app, ["plan", str(byte_model), "-o", str(tmp_path / "p.yaml"), *few, *flags])
    assert ran.exit_code == 1 and said in ran.output
