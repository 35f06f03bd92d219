"""What `latent rewrites new` and `latent patterns new` write: an example of this package under another name, to be
changed, and its test."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from .targets import TargetError

__all__ = ["PATTERN", "REWRITE", "Scaffold", "write_scaffold"]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@dataclass(frozen=True)
class Scaffold:
    """An example that is written, the words in it that change with the name, and the test."""

    example: str
    words: Callable[[str], Mapping[str, str]]
    test: Template


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


REWRITE = Scaffold(
    "write_a_rewrite",
    lambda name: {"plain_attention": name, "PlainAttention": _class_name(name)},
    Template('''\
"""$name applies to its examples, computes the same, and says why it stays away from the rest."""

from __future__ import annotations

import latent
import torch
from $name import $klass, spelled_out
from torch import Tensor

Q, K, V = (torch.randn(2, 3, length, 8) for length in (5, 7, 7))


def test_its_examples() -> None:
    """Sizes drawn at random, certificates, gradients, symbolic shapes."""
    report = latent.testing.check_rewrite($klass)
    assert report.applied


def test_it_is_applied_and_agrees_with_eager() -> None:
    options = {"rewrites": "$name", "expect": {"$name": 1}, "inner": "eager", "strict": True}
    compiled = torch.compile(spelled_out, backend="latent", options=options)
    torch.testing.assert_close(compiled(Q, K, V), spelled_out(Q, K, V))


def test_it_refuses_what_it_does_not_know() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (30 * torch.tanh(q @ k.transpose(-1, -2) / 30)).softmax(-1) @ v

    (verdict,) = (v for v in latent.explain(capped)(Q, K, V).verdicts if v.rewrite == "$name")
    assert verdict.outcome == "refused" and "only a scale" in verdict.reason
'''),
)

PATTERN = Scaffold(
    "custom_spelling",
    lambda name: {"read_soft_clip": name, "mine": name},
    Template('''\
"""$name makes its example attention, reads it rightly, and leaves other operators alone."""

from __future__ import annotations

import latent
import torch
from $name import attend

Q, K, V = (torch.randn(2, 3, length, 8) for length in (5, 7, 7))


def test_its_examples() -> None:
    """No attention without it, one with it, and certificates that run the operator itself."""
    (reading,) = latent.testing.check_pattern("$name").readings
    assert "fuse_attention" in reading.certified


def test_what_it_reads_is_rewritten_and_agrees_with_eager() -> None:
    options = {"expect": {"fuse_attention": 1}, "inner": "eager", "strict": True}
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(attend, backend="latent", options=options)(Q, K, V), attend(Q, K, V))
'''),
)


def write_scaffold(scaffold: Scaffold, name: str, folder: Path, taken: list[str]) -> tuple[Path, Path]:
    """Write NAME.py and test_NAME.py. Raises TargetError, and then has written nothing."""
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise TargetError(f"{name}: no name for a file of Python.", "Use small letters, digits and underscores.")
    if name in taken:
        raise TargetError(f"{name}: this name is registered already.", f"Taken are: {', '.join(taken)}.")
    if not folder.is_dir():
        raise TargetError(f"--out {folder}: there is no such folder.", "Make it, or name another.")
    files = folder / f"{name}.py", folder / f"test_{name}.py"
    for file in files:
        if file.exists():
            raise TargetError(f"{file}: is there already, and is not overwritten.", "Move it, or choose another name.")
    text = (EXAMPLES / f"{scaffold.example}.py").read_text(encoding="utf-8")
    text = text.replace(f"examples/{scaffold.example}.py", f"{name}.py")
    for old, new in scaffold.words(name).items():
        text = re.sub(rf"\b{old}\b", new, text)
    files[0].write_text(text, encoding="utf-8")
    files[1].write_text(scaffold.test.substitute(name=name, klass=_class_name(name)), encoding="utf-8")
    return files
