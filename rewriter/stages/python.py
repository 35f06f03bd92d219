"""A stage as Python that runs by itself: the graph as a function, inputs like those seen, and a main part."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from .nesting import text_of
from .view import Node, Stage

__all__ = ["render"]

HELPERS = {
    "normal": """
def normal(shape, mean, std, dtype):
    return (torch.randn(shape, generator=generator) * std + mean).to(dtype)
""",
    "whole": """
def whole(shape, least, most, dtype):
    return torch.randint(least, most + 1, shape, generator=generator).to(dtype)
""",
    "strided": """
def strided(value, strides):
    return torch.empty_strided(value.shape, strides, dtype=value.dtype).copy_(value)
""",
}

MAIN = """

if __name__ == "__main__":
    with torch.no_grad():
        results = graph(**{values})
    for number, result in enumerate(results):
        print(number, result if not isinstance(result, torch.Tensor) else f"{{result.dtype}} {{tuple(result.shape)}}")
        if isinstance(result, torch.Tensor):
            print(result)
"""


def render(stage: Stage, whole: bool = True) -> str:
    """The file. `whole`: it is the whole graph, so the inputs kept beside it, if there are any, are used."""
    body = "\n".join([*_signature(stage), *_lines(stage, "    ")])
    fills = "\n".join(f"        {node.name!r}: {node.fill}," for node in stage.inputs)
    made = f"def inputs():\n{_INPUTS_DOC}    generator.manual_seed(0)\n    return {{\n{fills}\n    }}\n"
    main = MAIN.format(values="(torch.load(kept) if kept.exists() else inputs())" if whole else "inputs()")
    if whole:
        main = main.replace("    with torch", '    kept = Path(__file__).with_name("inputs.pt")\n    with torch', 1)
    helpers = "".join(f"\n{text}" for name, text in HELPERS.items() if f"{name}(" in fills)
    if "constants[" in body:
        helpers += '\nconstants = torch.load(Path(__file__).with_name("constants.pt"))\n'
    code = f"\ngenerator = torch.Generator()\n{helpers}\n\n{body}\n\n\n{made}{main}"
    return f"{_docstring(stage, whole)}{_imports(code)}{code}"


_INPUTS_DOC = (
    '    """Random where they are large, in the range of those seen; the same for every stage of the graph."""\n'
)


def _docstring(stage: Stage, whole: bool) -> str:
    name = f"{stage.graph}, {stage.name}" + ("" if whole else ", one layer")
    kept = "Runs on inputs.pt if that lies beside this file, else on `inputs()`." if whole else "Runs on `inputs()`."
    return f'"""{name}: {len(stage.calls)} calls. {kept}"""\n\n'


def _imports(code: str) -> str:
    lines = [f"import {name}" for name in ("math", "operator") if re.search(rf"\b{name}\.", code)]
    if special := [name for name in ("inf", "nan") if re.search(rf"\b{name}\b", code)]:
        lines.append(f"from math import {', '.join(special)}")
    if "Path(" in code:
        lines.append("from pathlib import Path")
    lines += ["", "import torch"] if lines else ["import torch"]
    if re.search(r"torch\.ops\.(?!higher_order\.)", code):
        lines += ["from latent.rewriter.registry import rewrites", "", "rewrites()  # loads what defines the operators"]
    return "\n".join([*lines, "", "aten = torch.ops.aten", ""])


def _signature(stage: Stage) -> Iterator[str]:
    yield "def graph("
    width = max((len(node.name) for node in stage.inputs), default=0) + 1
    for node in stage.inputs:
        place = f"   {node.target}" if node.target != node.name else ""
        yield f"    {node.name + ',':<{width}}  # {node.type}{place}"
    yield "):"


def _lines(stage: Stage, margin: str) -> Iterator[str]:
    place = ""
    for node in stage.nodes:
        if node.kind == "call":
            here = " ".join(filter(None, (node.module, node.line)))
            if here != place:
                code = f": {textwrap.shorten(node.code, 90, placeholder=' …')}" if node.code else ""
                yield f"\n{margin}# {here}{code}" if here else ""
                place = here
        yield from _statement(node, margin)


def _statement(node: Node, margin: str) -> Iterator[str]:
    if node.kind == "constant":
        yield f"{margin}{node.name} = {node.fill}  # {node.type}"
    elif node.kind == "function" and node.body is not None:
        parameters = ", ".join(inner.name for inner in node.body.inputs)
        yield f"\n{margin}def {node.name}({parameters}):"
        yield from _lines(node.body, f"{margin}    ")
        yield ""
    elif node.kind == "call":
        notes = [note for note in (node.type if node.types else "", node.rewrite) if note]
        yield f"{margin}{node.name} = {call_text(node)}" + ("  # " + "   ".join(notes) if notes else "")
    elif node.kind == "output":
        (result,) = node.args
        yield f"\n{margin}return {text_of(tuple(result) if isinstance(result, list) else result)}"


def call_text(node: Node) -> str:
    """The call as Python."""
    arguments = [text_of(argument) for argument in node.args]
    if node.target == "torch.ops.higher_order.tag_activation_checkpoint":  # matters to gradients alone
        return f"{arguments[0]}({', '.join(arguments[1:])})"
    arguments += [f"{key}={text_of(value)}" for key, value in node.kwargs.items()]
    return f"{node.target.removeprefix('torch.ops.') if _is_aten(node) else node.target}({', '.join(arguments)})"


def _is_aten(node: Node) -> bool:
    return node.target.startswith("torch.ops.aten.")
