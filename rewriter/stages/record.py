"""From a graph module to a `Stage`: a copy of what can be read, in names that people use."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..compat import HigherOrderOperator, OpOverload, source_name, symbolic_functions
from ..emit import LOWERED, REPLACES, REWRITE
from ..provenance import attribute_path, module_path, source_line
from ..sizes import concrete
from .fills import fill_for
from .origins import Replacement, link
from .view import Argument, Code, Node, Ref, Stage, TensorType

__all__ = ["Recorder"]


@dataclass
class Recorder:
    """Keeps what a graph looked like at each stage. Inputs keep the names that the first stage gave them."""

    graph: str
    inputs: Sequence[Any]
    stages: dict[str, Stage] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    """Constants of the program that are too large to be written out."""

    @cached_property
    def fills(self) -> list[str]:
        return [fill_for(value) for value in self.inputs]

    def add(self, name: str, gm: fx.GraphModule) -> None:
        """Record the graph as it is now."""
        names = _input_names(gm.graph)
        nodes, replaced = [], {}
        fills = iter(self.fills)
        for node in gm.graph.nodes:
            made = _node(node, names, self.constants)
            if node.op == "placeholder":
                made = replace(made, fill=next(fills))
            replaced[made.name] = Replacement(node.meta.get(LOWERED, ""), tuple(node.meta.get(REPLACES, ())))
            nodes.append(made)
        stage = Stage(name, self.graph, tuple(nodes), {"torch": torch.__version__})
        before = list(self.stages.values())
        self.stages[name] = link(before[-1], stage, replaced) if before else stage

    def input_values(self) -> dict[str, Any]:
        """The inputs themselves by name, symbolic numbers as those of the example."""
        names = [node.name for node in next(iter(self.stages.values())).inputs]
        values = (v.detach() if isinstance(v, torch.Tensor) else concrete(v) for v in self.inputs)
        return dict(zip(names, values, strict=True))


# ** names **

_RESERVED = {"torch", "aten", "operator", "math", "inf", "nan", "graph", "inputs", "constants", "latent"}
_ARGUMENT = re.compile(r"^L\['(?P<name>[^']+)'\]$")


def input_path(node: fx.Node) -> str:
    """Where the user's program has an input: model.layers.0.q_proj.weight, input_ids."""
    source = source_name(node)
    found = _ARGUMENT.match(source)
    path = found["name"] if found else attribute_path(source)
    return path.removeprefix("kwargs.") if source.startswith("L['kwargs']") else path


def _input_names(graph: fx.Graph) -> dict[str, str]:
    """fx's names of the inputs -> names after their place in the program."""
    names: dict[str, str] = {}
    taken = {node.name for node in graph.nodes if node.op != "placeholder"} | _RESERVED
    for node in graph.find_nodes(op="placeholder"):
        name = re.sub(r"\W+", "_", input_path(node)).strip("_")
        if not name.isidentifier() or keyword.iskeyword(name):
            name = node.name
        if hasattr(torch.ops.aten, re.sub(r"_\d+$", "", name)):  # later nodes are named after operators
            name += "_input"
        while name in taken:
            name += "_"
        taken.add(name)
        names[node.name] = name
    return names


# ** nodes **


def _node(node: fx.Node, names: Mapping[str, str], constants: dict[str, torch.Tensor]) -> Node:
    line = source_line(node)
    made = Node(
        names.get(node.name, node.name),
        "call",
        types=_types(node.meta.get("val")),
        module=module_path(node),
        line=str(line or ""),
        code=line.code if line else "",
        rewrite=node.meta.get(REWRITE, ""),
    )
    if node.op == "placeholder":
        source = source_name(node)
        weight = "._parameters[" in source or "._buffers[" in source
        return replace(made, kind="input", target=input_path(node) or made.name, weight=weight)
    if node.op == "get_attr":
        return _attribute(made, node, constants)
    args, kwargs = _argument(node.args, names), _argument(node.kwargs, names)
    if node.op == "output":
        return replace(made, kind="output", args=args)
    return replace(made, target=target_text(node.target), args=args, kwargs=kwargs)


def _attribute(made: Node, node: fx.Node, constants: dict[str, torch.Tensor]) -> Node:
    held: Any = node.graph.owning_module
    for step in str(node.target).split("."):
        held = getattr(held, step)
    if isinstance(held, fx.GraphModule):
        inner = {n.name: n.name for n in held.graph.nodes}
        body = Stage(made.name, "", tuple(_node(n, inner, constants) for n in held.graph.nodes))
        return replace(made, kind="function", target=str(node.target), body=body)
    fill = fill_for(held, stored=f"constants[{str(node.target)!r}]")
    if fill.startswith("constants["):
        constants[str(node.target)] = held.detach()
    return replace(made, kind="constant", target=str(node.target), fill=fill, types=_types(held))


def _types(value: Any) -> tuple[TensorType, ...]:
    return tuple(_type(leaf) for leaf in pytree.tree_leaves(value) if leaf is not None)


def _type(value: Any) -> TensorType:
    if not isinstance(value, torch.Tensor):
        return TensorType({"SymInt": "int", "SymFloat": "float", "SymBool": "bool"}.get(n := type(value).__name__, n))
    dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
    if all(type(size) is int for size in shape):
        return TensorType(dtype, shape)
    symbolic = tuple(size if type(size) is int else str(size) for size in shape)
    sizes = tuple(concrete(size) for size in shape)
    return TensorType(dtype, symbolic, sizes if all(isinstance(size, int) for size in sizes) else None)


def _argument(value: Any, names: Mapping[str, str]) -> Argument:
    if isinstance(value, fx.Node):
        return Ref(names.get(value.name, value.name))
    if isinstance(value, list | tuple):
        items = [_argument(item, names) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        return {str(key): _argument(item, names) for key, item in value.items()}
    if isinstance(value, float) and not torch.tensor(value).isfinite():
        return Code(repr(value))  # `inf` and `nan` are names in the file
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return Code(f"torch.device({str(value)!r})")
    return Code(str(value) if isinstance(value, torch.dtype | torch.layout | torch.memory_format) else repr(value))


def target_text(target: Any) -> str:
    """What is called, as Python says it."""
    if isinstance(target, OpOverload):
        return f"torch.ops.{target}"
    if isinstance(target, HigherOrderOperator):
        name: str = target.name()
        return f"torch.ops.higher_order.{name}"
    name = getattr(target, "__qualname__", getattr(target, "__name__", str(target)))
    if target in symbolic_functions():
        return f"torch.{name}"
    return f"{getattr(target, '__module__', None) or 'torch'}.{name}".replace("_operator.", "operator.")
