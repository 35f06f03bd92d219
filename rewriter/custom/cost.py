"""What a function costs on paper: bytes that its operators read and write, and floating point operations."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from ..layouts import is_tensor, layout_step
from ..rules import Cost


def cost_of(traced: fx.GraphModule) -> Cost:
    """Every operator reads its tensors and writes its result; layout operations move nothing."""
    moved = 0
    for node in traced.graph.nodes:
        if node.op == "call_function" and layout_step(node) is None:
            moved += sum(_bytes(tensor) for tensor in (node, *node.all_input_nodes))
    inputs = [node.meta["val"] for node in traced.graph.find_nodes(op="placeholder")]
    with inputs[0].fake_mode, FlopCounterMode(display=False) as counter, torch.no_grad():
        traced(*inputs)
    return Cost(counter.get_total_flops(), moved)


def _bytes(node: fx.Node) -> int:
    return int(node.meta["val"].numel()) * node.meta["val"].element_size() if is_tensor(node) else 0
