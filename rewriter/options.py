"""The options of the backend: typed, validated, with an error that lists the valid ones."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .compat import inductor_modes, inductor_options

Verify = Literal["fast", "full", "off"]
Inner = Literal["inductor", "eager"]


class OptionError(ValueError):
    """An option that does not exist, or a value that it does not take."""


class ExpectationFailed(RuntimeError):
    """Fewer sites or rewrites than `expect` states. The message lists what was found and why the rest was not."""


@dataclass(frozen=True)
class Options:
    """What `torch.compile(model, backend="latent", options={...})` accepts."""

    rewrites: tuple[str, ...] | None = None
    """Names of the rewrites to run; None runs every exact one. Lossy rewrites run only when named."""

    verify: Verify = "fast"
    """"fast" certifies one of several identical sites, "full" every site, "off" none."""

    fuel: int | None = None
    """How many applications of rewrites are allowed per graph, in the order of judging; None is all of them."""

    strict: bool = False
    """Raise what goes wrong inside latent instead of falling back with a warning."""

    expect: Mapping[str, int] = field(default_factory=dict)
    """Least counts per compiled graph that has a softmax: "attention" for sites, else the name of a rewrite."""

    dump: Path | None = None
    """A folder that receives every stage of every compiled graph (text, Python, JSON, drawings) and what was done."""

    inner: Inner = "inductor"
    """What compiles the rewritten graph; "eager" runs it node by node, for debugging."""

    mode: str | None = None
    """Inductor's mode, as `torch.compile(mode=...)`."""

    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Options handed to inductor."""


def read_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Check and convert a plain dictionary. Raises OptionError with the valid names."""
    given = dict(options or {})
    valid = [f.name for f in dataclasses.fields(Options)]
    for key in given:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"latent has no option {key!r}{hint} The options are: {', '.join(valid)}.")
    if mode is not None:
        given.setdefault("mode", mode)
    return Options(**{key: _READ[key](key, value) for key, value in given.items()})


def _names(key: str, value: Any) -> tuple[str, ...] | None:
    from .registry import rewrites

    if value is None:
        return None
    if not isinstance(value, str | list | tuple | set | frozenset):
        raise OptionError(f"option {key!r} takes names of rewrites, not {value!r}")
    names = (value,) if isinstance(value, str) else tuple(value)
    valid = [entry.name for entry in rewrites()]
    if unknown := [name for name in names if name not in valid]:
        raise OptionError(f"option {key!r}: no rewrite is named {unknown[0]!r}; there are: {', '.join(valid)}")
    return names


def _one_of(choices: Any) -> Callable[[str, Any], Any]:
    def read(key: str, value: Any) -> Any:
        if value not in get_args(choices):
            raise OptionError(f"option {key!r} takes one of {', '.join(get_args(choices))}, not {value!r}")
        return value

    return read


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"option {key!r} takes True or False, not {value!r}")
    return value


def _fuel(key: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise OptionError(f"option {key!r} takes a number of applications, or None for all, not {value!r}")
    return value


def _counts(key: str, value: Any) -> Mapping[str, int]:
    from .registry import rewrites

    valid = ["attention", *(entry.name for entry in rewrites())]
    if not isinstance(value, Mapping):
        raise OptionError(f"option {key!r} takes counts such as {{'attention': 30}}, not {value!r}")
    for name, count in value.items():
        if name not in valid:
            raise OptionError(f"option {key!r}: {name!r} is none of {', '.join(valid)}")
        if not isinstance(count, int) or count < 0:
            raise OptionError(f"option {key!r}: the count of {name!r} is {count!r}, which is no count")
    return dict(value)


def _folder(key: str, value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | Path):
        raise OptionError(f"option {key!r} takes a path, not {value!r}")
    return Path(value)


def _mode(key: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise OptionError(f"option {key!r} takes a mode of torch.compile, not {value!r}")
    if value is not None and value not in (modes := inductor_modes()):
        raise OptionError(f"option {key!r} takes one of {', '.join(modes)}, not {value!r}")
    return value


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"option {key!r} takes a dictionary of inductor's options, not {value!r}")
    valid = inductor_options()
    for name in value:
        if name.replace("-", "_") not in valid:
            near = difflib.get_close_matches(name, valid, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"option {key!r}: inductor has no option {name!r}{hint}")
    return dict(value)


_READ = {
    "rewrites": _names,
    "verify": _one_of(Verify),
    "inner": _one_of(Inner),
    "fuel": _fuel,
    "strict": _flag,
    "expect": _counts,
    "dump": _folder,
    "mode": _mode,
    "inductor": _mapping,
}
