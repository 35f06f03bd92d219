"""The rewritten graphs through torch-mlir, as the dialects torch or linalg on tensors.

Every `latent::` operator becomes its own definition in plain ATen, writes become results, and torch-mlir's table of
decompositions opens what it has no conversion for. Weights are arguments of the functions.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from .backend import transform
from .compat import OpOverload, compile_id, hand_to_aot
from .explain import call_through
from .options import Options
from .report import GraphReport

__all__ = ["Dialect", "MlirError", "MlirGraph", "to_mlir"]

Dialect = Literal["torch", "linalg"]
OUTPUT_TYPES = {"torch": "torch", "linalg": "linalg-on-tensors"}

Runner = Callable[["MlirGraph"], Callable[..., Any]]


class MlirError(RuntimeError):
    """torch-mlir is not there, or has no conversion for an operator."""


@dataclass(frozen=True)
class MlirGraph:
    """One compiled graph: the function of this name in `module`, and the functional ATen that it was made from."""

    name: str
    module: Any
    aten: fx.GraphModule
    report: GraphReport


def to_mlir(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    dialect: Dialect = "linalg",
    runner: Runner = lambda graph: graph.aten.forward,
) -> tuple[tuple[MlirGraph, ...], Any]:
    """The graphs of one call of the model, and what the call returned. Raises MlirError.

    The call runs what `runner` makes of each graph; by default that is the ATen graph, node by node.
    """
    torch_mlir = _import_torch_mlir()
    graphs: dict[str, MlirGraph] = {}

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        identity = compile_id() or f"-{len(graphs)}"
        name = "graph_" + re.sub(r"\W", "_", identity)
        rewritten, report = transform(gm, example_inputs, options, {}, bodies=True)

        def convert(aten: fx.GraphModule, _: Sequence[object]) -> Callable[..., Any]:
            try:
                module = torch_mlir.stateless_fx_import(aten, output_type=OUTPUT_TYPES[dialect], model_name=name)
            except Exception as error:
                raise MlirError(f"torch-mlir cannot convert {name}: {_cause(error, aten)}") from error
            graphs[identity] = MlirGraph(name, module, aten, report)
            return runner(graphs[identity])

        return hand_to_aot(rewritten, example_inputs, convert, torch_mlir.get_decomposition_table())

    try:
        output, _ = call_through(model, backend, None, args, kwargs)
    except Exception as error:
        if isinstance(cause := getattr(error, "inner_exception", None), MlirError):
            raise cause from error
        raise
    return tuple(graphs.values()), output


def _import_torch_mlir() -> Any:
    try:
        return importlib.import_module("torch_mlir.fx")
    except ImportError as error:
        raise MlirError(
            f'torch-mlir cannot be imported: {error}.\nInstall it with: pip install "torch-latent[mlir]"'
        ) from error


def _cause(error: Exception, aten: fx.GraphModule) -> str:
    """The operators that torch-mlir cannot know, else the first line of what it raised; the rest is on stderr."""
    foreign = {str(node.target) for node in aten.graph.nodes if isinstance(node.target, OpOverload)}
    foreign = {name for name in foreign if not name.startswith(("aten.", "prims."))}
    if foreign:
        return f"{', '.join(sorted(foreign))} is none of ATen's operators."
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
