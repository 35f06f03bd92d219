"""Where a node comes from: the module that ran it and the line of the user's program."""

from __future__ import annotations

import functools
import operator
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from .compat import source_name

__all__ = [
    "SourceLine",
    "attribute_path",
    "is_learned",
    "module_path",
    "operator_name",
    "source_line",
    "tensor_name",
    "user_frames",
]


@dataclass(frozen=True)
class SourceLine:
    """One line of a program. `str()` and `short()` give `modeling_llama.py:287`."""

    file: str
    line: int
    code: str = ""

    def short(self) -> str:
        return f"{Path(self.file).name}:{self.line}"

    def __str__(self) -> str:
        return self.short()


# The ways Dynamo writes a step: ._modules['0'], ._parameters['weight'], .attention, .3 (in module stacks), [3]
_STEP = re.compile(
    r"\._(?:modules|parameters|buffers)\['(?P<registered>[^']*)'\]"
    r"|\.(?P<attribute>[^.\[\]]+)"
    r"|\[(?:'(?P<key>[^']*)'|(?P<index>-?\d+))\]"
)
# What a path starts from: a local, a global, or a cell of a closure
_ROOT = re.compile(r"^(?P<scope>[LG])\['(?P<name>[^']*)'\]")
_CELL = re.compile(r"^(?:\.__closure__\[\d+\]\.cell_contents|\.__func__|\.__self__)+")


@functools.lru_cache(maxsize=65536)
def attribute_path(source: str) -> str:
    """`L['self']._modules['layers']._modules['3']` -> `layers.3`: the path below the root, "" for the root itself."""
    root = _ROOT.match(source)
    rest = source[root.end() :] if root else source
    rest = _CELL.sub("", rest)
    steps = [next(filter(None, found.groups()), "") for found in _STEP.finditer(rest)]
    if not root and rest and not rest.startswith((".", "[")):
        steps.insert(0, re.split(r"[.\[]", rest, maxsplit=1)[0])
    return ".".join(step for step in steps if step)


def module_path(node: fx.Node) -> str:
    """The module that ran a node, as in `model.get_submodule(...)`; "" when the node has no module.

    The stack's entries are (source, class), outermost first; the innermost one is what ran the node.
    """
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        # a call from outside every module leaves an entry without a path
        if isinstance(path, str):
            return attribute_path(path.split("@")[0])
    return ""


def operator_name(node: fx.Node) -> str:
    """The operator as a user knows it: "pow", "topk"; the members of a list are what made them."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return operator_name(node.args[0])
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", None) or getattr(node.target, "__name__", node.target))


def tensor_name(node: fx.Node) -> str:
    """A tensor as a user knows it: an input by its path or its argument, a result by the operator that made it."""
    if node.op != "placeholder":
        return operator_name(node)
    source = source_name(node)
    root = _ROOT.match(source)
    return attribute_path(source) or (root["name"] if root else node.name)


def is_learned(node: fx.Node) -> bool:
    """A parameter or buffer of a module."""
    if node.op == "placeholder":
        source = source_name(node)
        return "._parameters[" in source or "._buffers[" in source
    return node.op == "get_attr"


_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*'
    r'(?:\n[ \t]+(?![ \t]|File ")(?P<code>[^\n]*))?'
)


# Of transformers, the models are a user's program, and what they call (caches, masks, attention functions) is not.
_INFRASTRUCTURE = re.compile(r"/transformers/(?!models/)")


@functools.cache
def _library_folders() -> tuple[str, ...]:
    own = Path(__file__).resolve().parent
    return (f"{Path(torch.__file__).parent}/", f"{own}/", f"{own.parent / 'kernels'}/")


def _is_library(file: str) -> bool:
    """Code that is nobody's model: torch, the standard library, this package, generated code."""
    if file.startswith(("<eval_with_key", "<frozen", *_library_folders())):
        return True
    in_packages = "/site-packages/" in file or "/dist-packages/" in file
    return not in_packages and file.startswith(f"{sysconfig.get_paths()['stdlib']}/")


@functools.lru_cache(maxsize=65536)
def user_frames(stack_trace: str) -> tuple[SourceLine, ...]:
    """The frames of a stack trace outside torch, the standard library and this package, outermost first."""
    found = (SourceLine(m["file"], int(m["line"]), (m["code"] or "").strip()) for m in _FRAME.finditer(stack_trace))
    return tuple(frame for frame in found if not _is_library(frame.file))


def source_line(node: fx.Node) -> SourceLine | None:
    """The innermost line of the user's program that made a node, or None when it is not known."""
    frames = user_frames(node.meta.get("stack_trace") or "")
    models = [frame for frame in frames if not _INFRASTRUCTURE.search(frame.file)]
    return next(reversed(models or frames), None)
