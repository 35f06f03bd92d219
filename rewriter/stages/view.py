"""A graph at one stage of its way as plain data: what dumps, drawings and comparisons are made of. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

__all__ = ["STAGES", "Code", "Node", "Ref", "Stage", "TensorType", "map_refs", "refs"]

STAGES = ("captured", "normal_form", "rewritten", "lowered")
"""The stages that can be looked at, in order."""

FORMAT = 1
"""Of the JSON. A reader refuses another one."""

Kind = Literal["input", "constant", "function", "call", "output"]
Size = int | str


@dataclass(frozen=True)
class Ref:
    """An argument that is the value of another node."""

    name: str


@dataclass(frozen=True)
class Code:
    """An argument that JSON has no form for, as the Python that makes it: torch.float32, float("inf")."""

    text: str


Argument = Any
"""None, bool, int, float, str, Ref, Code, or a list, tuple or dictionary of arguments."""


@dataclass(frozen=True)
class TensorType:
    """dtype and shape of a tensor; a number has no shape."""

    dtype: str
    shape: tuple[Size, ...] | None = None
    example: tuple[int, ...] | None = None
    """The sizes of the example, where some are symbolic."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape in numbers."""
        return self.example or tuple(size for size in self.shape or () if isinstance(size, int))

    def __str__(self) -> str:
        """f32[1, 32, 576]."""
        short = SHORT.get(self.dtype, self.dtype)
        return short if self.shape is None else f"{short}[{', '.join(map(str, self.shape))}]"


SHORT = {
    **{"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "complex64": "c64"},
    **{"int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8", "complex128": "c128"},
}


@dataclass(frozen=True)
class Node:
    """One step. `target` is Python: torch.ops.aten.add.Tensor; for an input, where the user's program has it."""

    name: str
    kind: Kind
    target: str = ""
    args: tuple[Argument, ...] = ()
    kwargs: Mapping[str, Argument] = field(default_factory=dict)
    types: tuple[TensorType, ...] = ()
    module: str = ""
    line: str = ""
    code: str = ""
    rewrite: str = ""
    """What emitted the node; "" for nodes of the captured graph."""

    origins: tuple[str, ...] = ()
    """The nodes of the stage before that this one is, or that it stands for."""

    fill: str = ""
    """For inputs and constants: Python that makes a value like the one seen."""

    body: Stage | None = None
    """For functions that operators of higher order take."""

    weight: bool = False
    """For inputs: a parameter or buffer of the model."""

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The names of the nodes that are arguments, in order."""
        return tuple(refs((self.args, dict(self.kwargs))))

    @property
    def operator(self) -> str:
        """The target in short: linear, latent::attention, mul."""
        if self.target.startswith("torch.ops."):
            namespace, _, name = self.target.removeprefix("torch.ops.").partition(".")
            name = name.rpartition(".")[0] or name
            return name if namespace in ("aten", "higher_order") else f"{namespace}::{name}"
        return self.target.rpartition(".")[2]

    @property
    def type(self) -> str:
        text = ", ".join(map(str, self.types))
        return text if len(self.types) == 1 else f"({text})" if self.types else ""

    @property
    def ours(self) -> bool:
        """Whether it is an operator of this package."""
        return self.target.startswith("torch.ops.latent.")


@dataclass(frozen=True)
class Stage:
    """The nodes of a graph at one stage, in order."""

    name: str
    graph: str
    nodes: tuple[Node, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @property
    def inputs(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.kind == "input")

    @property
    def calls(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.kind == "call")

    def to_json(self) -> str:
        """One node a line, so that line-based tools have something to work with."""
        head = {"format": FORMAT, "name": self.name, "graph": self.graph, "versions": dict(self.versions)}
        nodes = ",\n  ".join(json.dumps(_node_to(node), ensure_ascii=False) for node in self.nodes)
        return f'{json.dumps(head)[:-1]}, "nodes": [\n  {nodes}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Stage:
        """Raises ValueError for anything else than what `to_json` gives."""
        data = json.loads(text)
        if not isinstance(data, dict) or not {"format", "name", "graph", "nodes"} <= data.keys():
            raise ValueError("it is no stage of a dump")
        if data["format"] != FORMAT:
            raise ValueError(f"it has format {data['format']}, and this version reads format {FORMAT}: dump it again")
        return _stage_from(data)


# ** arguments **


def refs(argument: Argument) -> Iterator[str]:
    """The names that an argument refers to, in order."""
    if isinstance(argument, Ref):
        yield argument.name
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from refs(item)
    elif isinstance(argument, Mapping):
        for item in argument.values():
            yield from refs(item)


def map_refs(argument: Argument, change: Mapping[str, str]) -> Argument:
    """The argument with other names in place of those that `change` knows."""
    if isinstance(argument, Ref):
        return Ref(change.get(argument.name, argument.name))
    if isinstance(argument, list | tuple):
        return type(argument)(map_refs(item, change) for item in argument)
    if isinstance(argument, Mapping):
        return {key: map_refs(item, change) for key, item in argument.items()}
    return argument


def _argument_to(value: Argument) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, Code):
        return {"code": value.text}
    if isinstance(value, tuple):
        return {"tuple": [_argument_to(item) for item in value]}
    if isinstance(value, list):
        return [_argument_to(item) for item in value]
    if isinstance(value, Mapping):
        return {"dict": {key: _argument_to(item) for key, item in value.items()}}
    return value


def _argument_from(value: Any) -> Argument:
    if isinstance(value, list):
        return [_argument_from(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((form, held),) = value.items()
    if form == "ref":
        return Ref(held)
    if form == "code":
        return Code(held)
    if form == "tuple":
        return tuple(_argument_from(item) for item in held)
    return {key: _argument_from(item) for key, item in held.items()}


# ** JSON **

_PLAIN = ("target", "module", "line", "code", "rewrite", "fill", "weight")


def _node_to(node: Node) -> dict[str, Any]:
    """Everything that is not empty."""
    data: dict[str, Any] = {"name": node.name, "kind": node.kind}
    data |= {key: value for key in _PLAIN if (value := getattr(node, key))}
    if node.args:
        data["args"] = [_argument_to(value) for value in node.args]
    if node.kwargs:
        data["kwargs"] = {key: _argument_to(value) for key, value in node.kwargs.items()}
    if node.types:
        data["types"] = [_type_to(each) for each in node.types]
    if node.origins:
        data["origins"] = list(node.origins)
    if node.body is not None:
        data["body"] = json.loads(node.body.to_json())
    return data


def _type_to(each: TensorType) -> dict[str, Any]:
    data: dict[str, Any] = {"dtype": each.dtype}
    if each.shape is not None:
        data["shape"] = list(each.shape)
    return data | ({"example": list(each.example)} if each.example else {})


def _stage_from(data: Mapping[str, Any]) -> Stage:
    nodes = tuple(_node_from(node) for node in data["nodes"])
    return Stage(data["name"], data["graph"], nodes, data.get("versions", {}))


def _node_from(data: Mapping[str, Any]) -> Node:
    node = Node(data["name"], data["kind"], **{key: data[key] for key in _PLAIN if key in data})
    return replace(
        node,
        args=tuple(_argument_from(value) for value in data.get("args", ())),
        kwargs={key: _argument_from(value) for key, value in data.get("kwargs", {}).items()},
        types=tuple(_type_from(each) for each in data.get("types", ())),
        origins=tuple(data.get("origins", ())),
        body=_stage_from(data["body"]) if "body" in data else None,
    )


def _type_from(data: Mapping[str, Any]) -> TensorType:
    shape, example = (tuple(data[key]) if key in data else None for key in ("shape", "example"))
    return TensorType(data["dtype"], shape, example)
