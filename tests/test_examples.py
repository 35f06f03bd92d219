"""What the examples and the README say is what happens."""

import ast
import contextlib
import functools
import io
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@functools.cache
def run(path):
    """What a user sees who runs it."""
    return subprocess.run([sys.executable, path], check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path):
    output = run(path)
    assert "attention   " in output or "explain(" not in path.read_text()
    for what, number in re.findall(r"from (eager|the model as it is|the edit made by hand): +(\S+)", output):
        assert float(number) > 1e-2 if what == "the model as it is" else float(number) < 1e-5


def test_the_report_in_the_readme_is_the_quickstarts():
    output = run(ROOT / "examples" / "quickstart.py")
    shown = re.search(r"```\n(1 graph · .*?)```", README, re.S)[1]
    for line in shown.splitlines():
        if line.strip("─") and not line.startswith("graph"):
            assert re.sub(r"\d+e-\d+", "", line) in re.sub(r"\d+e-\d+", "", output)


def test_the_near_miss_in_the_readme_is_the_examples():
    shown = re.search(r"```\n(near miss .*?)```", README, re.S)[1]
    assert shown in run(ROOT / "examples" / "explain_a_miss.py")


def test_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec("\n".join(blocks), {})
    assert "1 ['self_attn']" in output.getvalue()


@pytest.mark.parametrize(("form", "example"), [("rewrite", "write_a_rewrite"), ("pattern", "custom_spelling")])
def test_the_code_in_the_readme_is_the_examples(form, example):
    shown = re.search(rf"```py\n(@latent.{form}\(.*?)```", README, re.S)[1]
    assert shown.strip() in (ROOT / "examples" / f"{example}.py").read_text()


def test_the_check_in_the_readme_is_the_examples():
    shown = re.search(r"examples/custom_spelling.py\n✓ (.*?)```", README, re.S)[1]
    assert shown in run(ROOT / "examples" / "custom_spelling.py")


def test_the_table_of_options_is_that_of_the_code():
    tree = ast.parse((ROOT / "rewriter" / "options.py").read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Options").body
    told = {f.target.id: doc.value.value for f, doc in pairwise(body) if isinstance(f, ast.AnnAssign)}
    shown = re.search(r"<!-- options: begin -->\n(.*?)<!-- options: end -->", README, re.S)[1]
    rows = [re.match(r"\| `(\w+)` \| `[^`]+` \| (.*) \|$", line) for line in shown.splitlines()[2:]]
    assert {row[1]: row[2] for row in rows} == told
