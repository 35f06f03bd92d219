"""What is installed is what is there."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from latent.rewriter.command.scaffold import PATTERN, REWRITE

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTALLED = ("rewriter", "passes", "patterns", "kernels")


def test_every_folder_with_code_is_a_package_that_is_installed() -> None:
    folders = {path.parent for folder in INSTALLED for path in (ROOT / folder).rglob("*.py")}
    names = {".".join(("latent", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert names | {"latent"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_other_file_in_a_package_is_its_data() -> None:
    given = PROJECT["tool"]["setuptools"]["package-data"]
    listed = {
        path
        for package, patterns in given.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    there = {path for folder in INSTALLED for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert {path for path in there if path.suffix not in (".py", ".pyc", ".md")} <= listed
    assert {ROOT / "examples" / f"{scaffold.example}.py" for scaffold in (PATTERN, REWRITE)} <= listed


def test_kernels_is_no_regular_package() -> None:
    """It would shadow the Hugging Face package of that name for whoever runs from the root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_pass_and_pattern_is_registered_like_a_plug_in() -> None:
    entries = PROJECT["project"]["entry-points"]
    passes = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert set(entries["latent.rewrites"]) == passes
    installed = {e.value for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "latent"}
    assert installed == {"latent.rewriter.backend:latent"}


def test_one_rewrite_one_file_one_test_of_the_same_name() -> None:
    passes = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert {f"test_{name}" for name in passes} <= {path.stem for path in (ROOT / "tests").glob("test_*.py")}
