"""Runs linalg on tensors on the CPU: torch-mlir's wheel has LLVM's passes and its execution engine, and no backend.

The pipeline makes plain loops, for checks and not for speed. Arguments are pointers to pointers to descriptors of
memory, outputs last; without `modify-public-functions` the outputs would stay zero with no error.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from latent.rewriter.mlir import MlirGraph
from torch import Tensor
from torch.utils import _pytree as pytree

PIPELINE = """builtin.module(
    func.func(linalg-generalize-named-ops), convert-elementwise-to-linalg,
    one-shot-bufferize{bufferize-function-boundaries=1 function-boundary-type-conversion=identity-layout-map},
    buffer-results-to-out-params{modify-public-functions=1},
    func.func(convert-linalg-to-loops), expand-strided-metadata, lower-affine, convert-scf-to-cf,
    func.func(convert-math-to-llvm), convert-math-to-libm, expand-strided-metadata, lower-affine,
    finalize-memref-to-llvm, func.func(convert-arith-to-llvm), convert-cf-to-llvm, convert-func-to-llvm,
    reconcile-unrealized-casts)"""


def executed(graph: MlirGraph) -> Callable[..., list[Tensor]]:
    """The function of a graph, compiled by LLVM: tensors in, tensors out."""
    from torch_mlir import ir
    from torch_mlir.execution_engine import ExecutionEngine
    from torch_mlir.passmanager import PassManager
    from torch_mlir.runtime import get_ranked_memref_descriptor

    module = graph.module
    with module.context:
        for operation in module.body.operations:
            if "sym_name" in operation.attributes and operation.attributes["sym_name"].value == graph.name:
                operation.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()
        PassManager.parse(re.sub(r"\s+", " ", PIPELINE)).run(module.operation)
        engine = ExecutionEngine(module, opt_level=2)
    results = [node.meta["val"] for node in pytree.tree_leaves(graph.aten.graph.output_node().args[0])]

    def call(*tensors: Any) -> list[Tensor]:
        outputs = [torch.zeros(value.shape, dtype=value.dtype).numpy() for value in results]
        inputs = [np.ascontiguousarray(tensor.detach().numpy()) for tensor in tensors]
        descriptors = [get_ranked_memref_descriptor(array) for array in (*inputs, *outputs)]
        engine.invoke(graph.name, *(ctypes.pointer(ctypes.pointer(each)) for each in descriptors))
        return [torch.from_numpy(array) for array in outputs]

    return call
