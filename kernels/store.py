"""Where generated sources, libraries and verdicts are kept: by content, so that nothing there ever goes stale."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def folder(kind: str) -> Path:
    """The folder for one kind of thing, made if missing: LATENT_CACHE, else ~/.cache/torch-latent."""
    root = os.environ.get("LATENT_CACHE") or Path.home() / ".cache" / "torch-latent"
    path = Path(root) / kind
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, text: str) -> None:
    """Write a file so that other processes see all of it or none."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(path)
