"""Flags of `latent convert` from the fields of recipes, and `latent recipes`, which lists both.

A flag belongs to the one recipe asked for that has such a field; where several have it, to the one that it names:
--joint-latent.share 0.5.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, Optional, Union

import typer

from .common import USAGE, Json, errors, stdout_is_for_us, stop
from .console import show

__all__ = ["parse_recipes", "recipes", "with_choices"]


def recipes(
    name: Annotated[
        Optional[str],  # noqa: UP045  # typer reads it while running, on Python 3.10 too
        typer.Argument(metavar="NAME", help="Show only this one, with its flags."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the recipes of `latent convert`: what each changes, what it needs, when nothing is lost, and its flags."""
    with errors(), stdout_is_for_us():
        chosen = list(_known().values()) if name is None else [_recipe(name)]
    if as_json:
        print(json.dumps([_facts(kind) for kind in chosen]))
    elif name is None:
        for kind in chosen:
            show(f"{kind.name}\n  {_summary(kind)}\n  needs {kind.needs} · exact {kind.exact}\n")
        show("latent recipes NAME shows its flags")
    else:
        show("\n".join(_text(chosen[0])))


def parse_recipes(names: Sequence[str], arguments: Sequence[str]) -> list[Any]:
    """The recipes of these names, with the choices that the other arguments of the command line make."""
    if not names:
        stop(f"no recipe is asked for.\nName one with --recipe: {', '.join(_known())}.", USAGE)
    kinds = [_recipe(name) for name in names]
    chosen: dict[str, dict[str, Any]] = {kind.name: {} for kind in kinds}
    if len(chosen) < len(kinds):
        stop("a recipe is asked for twice.\nGive each once; they are applied in order.", USAGE)
    for flag, given in _pairs(arguments):
        kind, field, negated = _owner(flag, kinds)
        chosen[kind.name][field.name] = _value(flag, given, _type(kind, field), negated)
    return [kind(**chosen[kind.name]) for kind in kinds]


def with_choices(recipe: Any) -> str:
    """A recipe as the command line writes it, without what is as it is by default."""
    made = [str(recipe.name)]
    for field in fields(recipe):
        value, name = getattr(recipe, field.name), _dashed(field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            made.append(f"--{name}" if value else f"--no-{name}")
        else:
            made.append(f"--{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(made)


# ** flags **


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """--flag value, --flag=value, or --flag alone."""
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            stop(f"{flag!r} belongs to no flag.\nThe only argument is TARGET; everything else is --flag value.", USAGE)
        name, equals, value = flag[2:].partition("=")
        if equals:
            yield name, value
        else:
            yield name, rest.pop(0) if rest and not rest[0].startswith("--") else None


def _owner(flag: str, kinds: Sequence[Any]) -> tuple[Any, Field[Any], bool]:
    """The recipe that a flag belongs to, the field, and whether it says no."""
    recipe, dot, name = flag.rpartition(".")
    asked = [kind for kind in kinds if not dot or _dashed(kind.name) == _dashed(recipe)]
    for negated, spelled in ((False, name), (True, name.removeprefix("no-"))):
        if negated and spelled == name:
            continue
        found = [(kind, field) for kind in asked for field in fields(kind) if _dashed(field.name) == spelled]
        if len(found) > 1:
            ways = " or ".join(f"--{_dashed(kind.name)}.{name}" for kind, _ in found)
            stop(f"--{name} is a flag of several recipes.\nWrite {ways}.", USAGE)
        if found:
            return *found[0], negated
    known = [f"--{_dashed(field.name)}" for kind in asked for field in fields(kind)]
    stop(f"--{flag} is a flag of none of the recipes.\nThey have: {', '.join(known) or 'no flags'}.", USAGE)


def _value(flag: str, given: str | None, kind: Any, negated: bool) -> Any:
    members = _members(kind)
    if bool in members and given is None:
        return not negated
    if negated:
        stop(f"--{flag}: there is nothing to switch off.", USAGE)
    if given is None:
        stop(f"--{flag} needs a value: {_type_text(kind)}.", USAGE)
    if given == "none" and type(None) in members:
        return None
    for member in members:
        try:
            return _read(given, member)
        except ValueError:
            continue
    stop(f"--{flag} {given}: this is no {_type_text(kind)}.", USAGE)


def _read(given: str, kind: Any) -> Any:
    """Raises ValueError where the text is nothing of this type."""
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if given not in choices:
            raise ValueError(given)
        return choices[given]
    if typing.get_origin(kind) is tuple:
        return tuple(_read(part, typing.get_args(kind)[0]) for part in given.split(",") if part)
    if kind is bool:
        if given not in ("true", "false"):
            raise ValueError(given)
        return given == "true"
    if kind in (int, float, str):
        return kind(given)
    raise ValueError(given)


def _type(kind: Any, field: Field[Any]) -> Any:
    return typing.get_type_hints(kind)[field.name]


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _type_text(kind: Any) -> str:
    """int, float, even|energy, int,int,..."""
    said = []
    for member in _members(kind):
        if typing.get_origin(member) is Literal:
            said += [str(choice) for choice in typing.get_args(member)]
        elif typing.get_origin(member) is tuple and typing.get_args(member)[0] in (int, float, str):
            said.append("{0},{0},...".format(typing.get_args(member)[0].__name__))
        elif member in (bool, int, float, str):
            said.append({bool: "yes or no", str: "text"}.get(member, member.__name__))
    return "|".join(said)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


# ** what there is to know **


def _known() -> dict[str, Any]:
    from ..convert.recipe import recipes as registered

    return registered()


def _recipe(name: str) -> Any:
    known = _known()
    found = known.get(name.replace("-", "_"))
    if found is None:
        stop(f"no recipe is named {name!r}.\nThere are: {', '.join(known)}.", USAGE)
    return found


def _facts(kind: Any) -> dict[str, Any]:
    flags = [
        {"flag": f"--{_dashed(f.name)}", "type": _type_text(_type(kind, f)), "default": _default(f)}
        for f in fields(kind)
    ]
    about = {"name": kind.name, "does": _summary(kind), "needs": kind.needs, "exact": kind.exact}
    return about | {"more": _more(kind), "flags": flags}


def _default(field: Field[Any]) -> Any:
    value = None if field.default is MISSING else field.default
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _summary(kind: Any) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _more(kind: Any) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[2].strip()


def _text(kind: Any) -> Iterator[str]:
    facts = _facts(kind)
    yield from (kind.name, f"  {facts['does']}", "")
    yield from (f"  {line}".rstrip() for line in facts["more"].splitlines())
    yield from ("", f"  needs   {kind.needs}", f"  exact   {kind.exact}", "")
    width = max((len(row["flag"]) for row in facts["flags"]), default=0)
    types_width = max((len(row["type"]) for row in facts["flags"]), default=0)
    for row in facts["flags"]:
        default = {None: "", "()": "", True: "yes", False: "no"}.get(row["default"], row["default"])
        yield f"  {row['flag']:<{width}}   {row['type']:<{types_width}}   {default}".rstrip()
