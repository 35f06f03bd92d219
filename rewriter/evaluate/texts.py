"""Texts that need no network, each in two halves: one to calibrate on, one to score, with no paragraph in both."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..units import plural

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEFAULT_TEXTS", "Text", "TextError", "calibration_tokens", "read_text", "scored_tokens"]

DEFAULT_TEXTS = ("pkg:pydoc", "pkg:stdlib")
"""Prose, the topics of Python's manual; and code, the modules of its standard library."""

SECTION = 4000
"""Characters of a file that count as one document."""
SHARED = 80
"""Characters from which a paragraph that occurs twice is a copy, not a phrase."""


class TextError(ValueError):
    """A text that cannot be used: what is wrong, and what to do."""

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(f"{what}\n{todo}")


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order."""

    name: str
    documents: tuple[str, ...]

    @cached_property
    def calibration(self) -> str:
        """Every other document."""
        return "\n\n".join(self.documents[0::2])

    @cached_property
    def scored(self) -> str:
        """The other documents, without the paragraphs that a calibration has seen: manuals and licences repeat."""
        seen = {p for p in map(str.strip, self.calibration.split("\n\n")) if len(p) >= SHARED}
        paragraphs = "\n\n".join(self.documents[1::2]).split("\n\n")
        return "\n\n".join(p for p in paragraphs if p.strip() not in seen)

    @property
    def digest(self) -> str:
        """Python's texts change with its version: scores compare where this is the same."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()[:8]


def read_text(name: str) -> Text:
    """The text of `pkg:pydoc`, `pkg:stdlib`, `pkg:PACKAGE` (its sources) or a file. Raises TextError."""
    documents = _package(name.removeprefix("pkg:")) if name.startswith("pkg:") else _sections(Path(name))
    if len(documents) < 2:
        raise TextError(
            f"{name}: the text has {plural(len(documents), 'document')}, so it cannot be split into a half to "
            "calibrate on and a half to score.",
            "Take a longer text, or a package of several modules.",
        )
    return Text(name, tuple(documents))


def calibration_tokens(tokenizer: Any, texts: Sequence[Text], windows: int, length: int, seed: int) -> Tensor:
    """[windows, length] token ids from the halves that are never scored, the texts in turn. Raises TextError."""
    import torch

    if not texts:
        raise TextError("There is no text to calibrate on.", f"Name one, as {DEFAULT_TEXTS[0]}.")
    shares = [windows // len(texts) + (n < windows % len(texts)) for n in range(len(texts))]
    parts = [
        _windows(tokenizer, text.name, text.calibration, share, length, seed)
        for text, share in zip(texts, shares, strict=True)
        if share
    ]
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
    return torch.cat(parts)[order]


def scored_tokens(tokenizer: Any, text: Text, windows: int, length: int, seed: int = 0) -> Tensor:
    """[windows, length] token ids from the half that is scored. Raises TextError."""
    return _windows(tokenizer, text.name, text.scored, windows, length, seed)


def _windows(tokenizer: Any, name: str, content: str, windows: int, length: int, seed: int) -> Tensor:
    """Windows that do not overlap, at a place and in an order that the seed draws."""
    import torch

    ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    first = _first_token(tokenizer)
    width = length - len(first)
    slots = len(ids) // width if width > 0 else 0
    if slots < windows:
        raise TextError(
            f"{name}: half of the text has {len(ids)} tokens, which are {slots} windows of {length}; {windows} are "
            "asked for.",
            "Ask for fewer tokens or shorter windows, or name a longer text.",
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(len(ids) - slots * width + 1, (), generator=generator))
    rows = ids[offset : offset + slots * width].view(slots, width)
    chosen = rows[torch.randperm(slots, generator=generator)[:windows]]
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(windows, -1), chosen], dim=1)


def _first_token(tokenizer: Any) -> list[int]:
    """The token that a model wants to see first, if its tokenizer puts one there."""
    start = tokenizer.bos_token_id
    return [start] if start is not None and tokenizer("a")["input_ids"][:1] == [start] else []


# ** where documents come from **


def _package(name: str) -> list[str]:
    if name == "pydoc":
        from pydoc_data.topics import topics

        return [topics[key] for key in sorted(topics)]
    if name == "stdlib":
        folder = Path(sysconfig.get_path("stdlib"))
        return _sources(file for file in folder.glob("*.py") if file.stem in sys.stdlib_module_names)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise TextError(
            f"pkg:{name}: no such package is installed.",
            "pkg:pydoc is prose, pkg:stdlib is code, pkg:PACKAGE are the sources of an installed package; "
            "without pkg: it is a file.",
        )
    if spec.submodule_search_locations is None:
        return _sections(Path(spec.origin)) if spec.origin and spec.origin.endswith(".py") else []
    return _sources(file for place in spec.submodule_search_locations for file in Path(place).rglob("*.py"))


def _sources(files: Iterable[Path]) -> list[str]:
    return [text for file in sorted(files) if (text := file.read_text(encoding="utf-8", errors="replace")).strip()]


def _sections(file: Path) -> list[str]:
    """A file in pieces of whole paragraphs."""
    if not file.is_file():
        raise TextError(
            f"{file}: there is no such file.", f"Name a text file, or one of {', '.join(DEFAULT_TEXTS)}, pkg:PACKAGE."
        )
    sections: list[list[str]] = [[]]
    size = 0
    for paragraph in file.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        if size > SECTION:
            sections.append([])
            size = 0
        sections[-1].append(paragraph)
        size += len(paragraph)
    return ["\n\n".join(section) for section in sections]
