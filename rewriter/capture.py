"""Capture: Dynamo's graph, traced again to pre-dispatch ATen, as a graph of our own.

Dynamo walks the placeholders of its graph once more after the backend has returned, so that graph is never edited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .compat import (
    DYNAMO_CONTROL_FLOW,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    adopt_constants,
    autocast_switch,
    checkpoint_body,
    copy_module_facts,
    copy_placeholder_facts,
    fake_mode_for,
    fake_mode_of,
    inference_switch,
    reads_data,
    set_checkpoint_policy,
    trace_pre_dispatch,
)
from .mutations import Mutations
from .purity import enables_grad
from .vmaps import has_derivatives, has_vmaps, open_vmaps

__all__ = ["CaptureError", "capture", "untouched_copy"]

PROVENANCE = ("nn_module_stack", "stack_trace")


class CaptureError(RuntimeError):
    """The graph could not be brought to ATen. `stage` says where, `reason` why; the graph given is unharmed."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage, self.reason = stage, reason


def capture(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    decompositions: Mapping[OpOverload, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """`gm` as pre-dispatch ATen: same inputs, same outputs, same writes; `gm` itself is not changed.

    `decompositions` opens operators while tracing. Raises CaptureError when the graph can not be traced again.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        raise CaptureError("inputs", f"{len(placeholders)} placeholders, {len(example_inputs)} example inputs")
    if has_derivatives(gm.graph):
        raise CaptureError("trace", "torch.func takes a derivative in the graph")
    fakes = _fakes(gm, placeholders, example_inputs)
    try:
        plain = _with_open_data(gm)
        traced = open_vmaps(plain) if has_vmaps(plain) else plain
        new = trace_pre_dispatch(_Tracer(traced).run_flat, fakes, fake_mode_of(gm, fakes), decompositions)
    except DYNAMO_CONTROL_FLOW:
        raise
    except Exception as error:
        raise CaptureError("trace", f"{type(error).__name__}: {_first_line(error)}") from error
    _carry_facts(gm, new, placeholders)
    if plain is not gm:
        _check_data_is_read_only(new.graph)
    _check_same_interface(gm, new)
    return new


def untouched_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph, node for node, that may be given away: compilers take ownership of their graph."""
    graph = fx.Graph()
    placed: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, placed)
    output = graph.output(result)
    output.meta = dict(gm.graph.output_node().meta)
    new = fx.GraphModule(gm, graph)
    copy_module_facts(gm, new)
    for old, mine in placed.items():
        if old.op == "placeholder":
            mine.meta.pop("grapharg", None)
            copy_placeholder_facts(old, mine)
    return new


# ** inputs **


def _fakes(gm: fx.GraphModule, placeholders: Sequence[fx.Node], example_inputs: Sequence[object]) -> list[object]:
    """What stands for each input: the value Dynamo traced with, or for graphs of other origin one made here."""
    held = [
        node.meta.get("example_value", node.meta.get("val", given))
        for node, given in zip(placeholders, example_inputs, strict=True)
    ]
    mode = fake_mode_of(gm, held) or fake_mode_for(held)
    return [_fake(value, mode) for value in held]


def _fake(value: object, mode: FakeTensorMode) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    return value


# ** before the trace **


def _with_open_data(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm`, or where it reads `.data` a copy that detaches instead, in the graphs that it holds as well.

    The trace does not see `.data`, and would freeze the value of the moment. Both lie in the storage of their tensor
    and have no history; they differ in the counter of writes, see `_check_data_is_read_only`.
    """
    if not any(_reads_data(module) for module in gm.modules()):
        return gm
    new = untouched_copy(gm)
    for node in new.graph.nodes:
        if node.op == "call_function" and reads_data(node.target):
            node.target = torch.ops.aten.detach.default
        elif node.op == "get_attr" and isinstance(body := getattr(gm, str(node.target), None), fx.GraphModule):
            setattr(new, str(node.target), _with_open_data(body))
    new.recompile()
    return new


def _reads_data(module: torch.nn.Module) -> bool:
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    return any(node.op == "call_function" and reads_data(node.target) for node in nodes)


# ** the trace **


class _Tracer(fx.Interpreter):
    """Runs a graph so that what is not an operator is recorded as well."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._grad_before_inference: list[bool] = []

    def run_flat(self, *args: object) -> Any:
        return self.run(*args)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (entering := autocast_switch(target)) is not None:
            return self._autocast(entering, args)
        if (entering := inference_switch(target)) is not None:
            return self._inference(entering, args)
        if args and (body := checkpoint_body(target, args[0])) is not None:
            mine = untouched_copy(body)
            set_checkpoint_policy(mine)
            args = (mine, *args[1:])
        return super().call_function(target, args, kwargs)

    @staticmethod
    def _autocast(entering: bool, args: tuple[Any, ...]) -> Any:
        # The tracer records Dynamo's function without running it, and the dtypes inside the region would be wrong.
        # The context manager is recorded as the same node, and runs.
        if entering:
            device, dtype, enabled, cache = args
            region: Any = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
            return region.__enter__()
        return args[0].__exit__(None, None, None)

    def _inference(self, entering: bool, args: tuple[Any, ...]) -> Any:
        # The tracer forgets inference mode, and gradients would flow where the user stopped them. Switching grad mode
        # is recorded and stops them too; results are then ordinary tensors without history.
        if entering:
            self._grad_before_inference.append(torch.is_grad_enabled())
            inference = args[0] if args else True
            torch._C._set_grad_enabled(not inference)
        else:
            torch._C._set_grad_enabled(self._grad_before_inference.pop())
        return None


# ** afterwards **


def _carry_facts(gm: fx.GraphModule, new: fx.GraphModule, placeholders: Sequence[fx.Node]) -> None:
    for old, mine in zip(placeholders, new.graph.find_nodes(op="placeholder"), strict=True):
        copy_placeholder_facts(old, mine)
    copy_module_facts(gm, new)
    adopt_constants(new)
    _check_constants(new)
    _inherit_provenance(new.graph)
    new.recompile()


def _check_constants(new: fx.GraphModule) -> None:
    """A fake tensor among the constants stands for a value that only a call has."""
    for module in new.modules():
        for name, value in (*module.named_buffers(recurse=False), *vars(module).items()):
            if isinstance(value, FakeTensor):
                raise CaptureError("trace", f"{name} {tuple(value.shape)} was made by something that is not recorded")


def _check_data_is_read_only(graph: fx.Graph) -> None:
    """Autograd counts a write through a detached tensor, not one through `.data`, and raises for what it has saved."""
    if not torch.is_grad_enabled() and not enables_grad(graph):
        return
    mutations = Mutations.of(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        if mutations.base_of(node) in mutations.writes:
            raise CaptureError("trace", "a tensor is written to through `.data` where gradients are on")


def _inherit_provenance(graph: fx.Graph) -> None:
    """Calls that lost their origin take it from the nearest producer that has one, consumer, or later node.

    Dynamo gives every call a stack trace; one without has lost it. One with a trace and no module stack ran in the
    forward of the compiled module itself, which is no entry of the stack.
    """
    nodes = [node for node in graph.nodes if node.op.startswith("call")]
    known = {node for node in nodes if node.meta.get("stack_trace")}
    for position, node in enumerate(nodes):
        if node not in known:
            near = (*sorted(node.all_input_nodes, reverse=True), *sorted(node.users), *nodes[position:])
            giver = next((other for other in near if other in known), None)
            node.meta.update({key: giver.meta[key] for key in PROVENANCE if key in giver.meta} if giver else {})


def _check_same_interface(gm: fx.GraphModule, new: fx.GraphModule) -> None:
    old_results = pytree.tree_leaves(gm.graph.output_node().args[0])
    new_results = pytree.tree_leaves(new.graph.output_node().args[0])
    if len(old_results) != len(new_results):
        raise CaptureError("outputs", f"{len(old_results)} before, {len(new_results)} after")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
