"""A folder that is written again and again, and in which nothing is touched that this package did not write.

`manifest.json` lists what was written, with digests. A file that is not listed, or that was changed since, is its
owner's: it is neither deleted nor overwritten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["DumpError", "Folder"]

MANIFEST = "manifest.json"

Content = str | Callable[[Path], None]
"""A text, or what writes the file."""


class DumpError(RuntimeError):
    """A file stands in the way: which one, and what to do."""


class Folder:
    """The folder of a dump, made if missing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise DumpError(f"{root}: a file stands where the folder shall be\nName another folder.") from error
        manifest = root / MANIFEST
        self.written: dict[str, str] = {}
        if manifest.exists():
            self.written = _read(manifest)

    def replace(
        self, within: str, files: Mapping[str, Content], keep: Callable[[str], bool] = lambda name: False
    ) -> None:
        """Write `files`, and delete what was written below `within` before and is not among them, nor to `keep`.

        Raises DumpError before anything is touched.
        """
        old = [name for name in self.written if name.startswith(within) and name not in files and not keep(name)]
        for name in files:
            self._check(name)
        for name in old:
            if not self._changed(name):
                (self.root / name).unlink(missing_ok=True)
                self._drop_empty((self.root / name).parent)
            del self.written[name]
        for name, content in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            else:
                path.write_text(content, encoding="utf-8")
            self.written[name] = _digest(path)
        text = json.dumps({"writer": "latent", "files": self.written}, indent=1)
        (self.root / MANIFEST).write_text(f"{text}\n", encoding="utf-8")

    def _check(self, name: str) -> None:
        path = self.root / name
        if not path.exists():
            return
        if name not in self.written:
            raise DumpError(f"{path} was not written by latent and is kept\nMove it away, or name another folder.")
        if self._changed(name):
            raise DumpError(
                f"{path} was changed since latent wrote it and is kept\nMove it away, or name another folder."
            )

    def _changed(self, name: str) -> bool:
        path = self.root / name
        return path.exists() and _digest(path) != self.written[name]

    def _drop_empty(self, folder: Path) -> None:
        while folder != self.root and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _read(manifest: Path) -> dict[str, str]:
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
        if data["writer"] != "latent":
            raise KeyError("writer")
        return dict(data["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DumpError(
            f"{manifest} was not written by latent and is kept\nMove it away, or name another folder."
        ) from error


def _digest(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()[:16]
