"""TARGET of the command line: a Hugging Face folder, or `file.py:factory` that returns (model, args, kwargs)."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

__all__ = ["Phase", "Target", "TargetError", "import_file", "load_target"]

Phase = Literal["prefill", "decode"]


class TargetError(ValueError):
    """A target that cannot be loaded: what is wrong, where, and what to do."""

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(f"{what}\n{todo}")
        self.what, self.todo = what, todo


@dataclass(frozen=True)
class Target:
    """A model and one call of it."""

    model: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What a reader should know: random weights, which phase, how many tokens."""


@dataclass(frozen=True)
class HFChoices:
    """How a Hugging Face folder is loaded and called."""

    from_config: bool = False
    phase: Phase = "prefill"
    tokens: int = 32
    attention: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is chosen, the number of tokens aside."""
        return dataclasses.replace(self, tokens=HFChoices.tokens) == HFChoices()


def load_target(text: str, choices: HFChoices | None = None) -> Target:
    """Load TARGET. Raises TargetError."""
    path, colon, name = text.rpartition(":")
    if Path(text).is_dir():
        from .huggingface import load_folder

        return load_folder(Path(text), choices or HFChoices())
    if colon and path.endswith(".py"):
        if choices is not None and not choices.is_plain:
            raise TargetError(
                f"{text}: --from-config, --phase and --attention belong to Hugging Face folders.",
                "Leave them out: the factory decides which model is called, and how.",
            )
        return load_factory(Path(path), name)
    if text.endswith(".py"):
        raise TargetError(f"{text}: a file alone is no target.", f"Name the function: {text}:make_model")
    raise TargetError(
        f"{text}: there is no such folder.",
        "TARGET is a Hugging Face folder (with a config.json), or file.py:factory. Nothing is downloaded.",
    )


def load_factory(file: Path, name: str) -> Target:
    """Call `name` of `file`, which returns (model, args, kwargs). Raises TargetError."""
    module = import_file(file)
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = {n for n, value in vars(module).items() if callable(value)}
        own = sorted(n for n in functions if getattr(getattr(module, n), "__module__", "") == module.__name__)
        raise TargetError(
            f"{file}: has no function {name!r}." if factory is None else f"{file}: {name!r} is not a function.",
            f"It defines: {', '.join(own) or 'no function at all'}.",
        )
    try:
        made = factory()
    except Exception as error:
        raise TargetError(
            f"{file}:{name} raised {type(error).__name__}: {error}{_where(error, file)}",
            "Call it in Python until it returns (model, args, kwargs).",
        ) from error
    return _checked(made, f"{file}:{name}")


def import_file(file: Path) -> ModuleType:
    """Run a file of the user's as a module. Raises TargetError."""
    if not file.is_file():
        raise TargetError(f"{file}: there is no such file.", f"Looked for it at {file.resolve()}.")
    spec = importlib.util.spec_from_file_location(f"latent_target_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TargetError(
            f"{file}: importing it raised {type(error).__name__}: {error}{_where(error, file)}",
            "The file is imported before its factory is called; make `python " + str(file) + "` run first.",
        ) from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module


def _checked(made: object, where: str) -> Target:
    form = "A factory returns three things: (model, args, kwargs), with args a tuple and kwargs a dictionary."
    if not isinstance(made, tuple) or len(made) != 3:
        got = f"{len(made)} things" if isinstance(made, tuple) else type(made).__name__
        raise TargetError(f"{where} returned {got}.", form)
    model, args, kwargs = made
    if not callable(model):
        raise TargetError(f"{where}: the model is a {type(model).__name__}, which cannot be called.", form)
    if not isinstance(args, Sequence) or isinstance(args, str | bytes):
        raise TargetError(f"{where}: args is a {type(args).__name__}.", f"{form} One tensor x is written (x,).")
    if not isinstance(kwargs, Mapping):
        raise TargetError(f"{where}: kwargs is a {type(kwargs).__name__}.", form)
    return Target(model, tuple(args), dict(kwargs))


def _where(error: BaseException, file: Path) -> str:
    """The last line of the user's file that an exception came through."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"  (line {error.lineno})"
    lines = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == file.name]
    return f"  ({file.name}:{lines[-1].lineno}: {lines[-1].line})" if lines else ""
