"""Everything private of torch that this package uses, in one place.

No other file imports an underscore name of torch or touches one of its private attributes. Each use names the torch
release it was last seen in, so that a break points at the line to change.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
import torch._dynamo.utils
import torch.compiler.config
from torch import fx
from torch._dynamo.exc import RestartAnalysis, ShortenTraceback, SkipFrame  # 2.13
from torch._dynamo.source import ConstantSource  # 2.13
from torch._guards import Source, TracingContext  # 2.13
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # 2.13
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatefulSymbolicContext,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.fx.experimental.symbolic_shapes import statically_known_true as _known_true
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = [
    "DYNAMO_CONTROL_FLOW",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "WeightStates",
    "add_input",
    "adopt_constants",
    "autocast_switch",
    "autocast_switches",
    "cache_tag",
    "checkpoint_body",
    "compile_id",
    "copy_module_facts",
    "copy_placeholder_facts",
    "debug_folder",
    "differentiates",
    "emit_trace_artifact",
    "expr_of",
    "fake_mode_of",
    "fake_of_shape",
    "fqn_of",
    "guarded_number",
    "hand_to_aot",
    "hand_to_inductor",
    "inductor_modes",
    "inductor_options",
    "inference_switch",
    "is_opened_while_compiling",
    "is_static_input",
    "list_mode_options",
    "mark_static_address",
    "new_unbacked_symbols",
    "random_ops_kept",
    "reads_data",
    "real_tensors_allowed",
    "reset_with_dynamo",
    "set_checkpoint_policy",
    "size_hints",
    "source_name",
    "statically_known_true",
    "storage_of",
    "switches_mode",
    "symbolic_functions",
    "symint_of",
    "trace_enabled",
    "trace_pre_dispatch",
]

OpOverload = torch._ops.OpOverload  # 2.13
HigherOrderOperator = torch._ops.HigherOrderOperator  # 2.13

DYNAMO_CONTROL_FLOW: tuple[type[BaseException], ...] = (RestartAnalysis, SkipFrame, ShortenTraceback)
"""Exceptions by which a backend tells Dynamo what to do next. A catch-all has to let them through."""


# ** values **


def fake_mode_of(gm: fx.GraphModule, values: Sequence[object] = ()) -> FakeTensorMode | None:
    """The fake mode a graph was traced with, or None when it holds no fake tensor.

    `TracingContext.get().fake_mode` is another mode than the one of the placeholders, and torch refuses to mix them.
    """
    held = (node.meta.get(key) for node in gm.graph.nodes for key in ("example_value", "val"))
    for value in (*values, *held):
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, FakeTensor):
                return item.fake_mode
    return None


def fake_mode_for(values: Sequence[object]) -> FakeTensorMode:
    """A new fake mode that shares the symbols of the SymInts among `values`, if there are any."""
    env = next((v.node.shape_env for v in values if isinstance(v, torch.SymInt | torch.SymFloat)), None)
    return FakeTensorMode(shape_env=env or ShapeEnv(), allow_non_fake_inputs=True)


def fake_of_shape(mode: FakeTensorMode, shape: Sequence[int], symbolic: Sequence[bool]) -> torch.Tensor:
    """A fake float32 tensor on the CPU, some of whose dimensions are symbolic."""
    if not any(symbolic):
        with mode:
            return torch.empty(shape)
    dims = [DimDynamic.DUCK if one else DimDynamic.STATIC for one in symbolic]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dims)  # 2.13
    return mode.from_tensor(torch.empty(shape), symbolic_context=context)


def expr_of(value: object) -> sympy.Expr:
    """The sympy expression of a number, which may be a SymInt, SymFloat or SymBool. Raises TypeError for others."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.expr  # 2.13
    if isinstance(value, bool | int | float):
        return sympy.sympify(value)
    raise TypeError(f"{type(value).__name__} is not a number")


def symint_of(size: int | sympy.Expr, like: torch.Tensor) -> int | torch.SymInt:
    """A size as a number; comparing a symbolic one adds a guard. `like` is a tensor whose sizes have its symbols."""
    if isinstance(size, int):
        return size
    env = like.fake_mode.shape_env  # type: ignore[attr-defined]
    hint = int(size.subs({s: env.backed_var_to_val[s] for s in size.free_symbols}))  # 2.13
    made: int | torch.SymInt = env.create_symintnode(size, hint=hint)
    return made


def guarded_number(value: object) -> float | None:
    """The number behind a symbol, to which the graph is then bound by a guard; None where only running it tells."""
    if isinstance(value, torch.SymInt | torch.SymFloat) and not value.node.has_hint():  # 2.13
        return None
    if isinstance(value, torch.SymInt):
        return float(int(value))
    return float(value) if isinstance(value, int | float | torch.SymFloat) else None


def statically_known_true(condition: bool | torch.SymBool) -> bool:
    """Whether `condition` holds for every input that the guards let in. Adds no guard."""
    return _known_true(condition)


def storage_of(value: object) -> int | None:
    """A number that two tensors share exactly when they share a storage; None for anything without a storage."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return int(value.untyped_storage()._cdata)  # 2.13


def new_unbacked_symbols(node: fx.Node) -> bool:
    """Whether a node makes a size or number that only running the graph tells, as `nonzero` does."""
    known = {s for given in node.all_input_nodes for s in free_unbacked_symbols(_values(given))}
    return bool(set(free_unbacked_symbols(_values(node))) - known)


def _values(node: fx.Node) -> list[Any]:
    wanted = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return [v for v in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(v, wanted)]  # 2.13


def symbolic_functions() -> frozenset[Callable[..., Any]]:
    """torch's functions of sizes: `torch.sym_max` and the like; the ones that `math` is traced into are private."""
    names = [name for name in dir(torch) if name.startswith(("sym_", "_sym_"))]  # 2.13
    return frozenset(getattr(torch, name) for name in names if "constrain" not in name and "fresh" not in name)


class WeightStates:
    """How some tensors looked at one time: addresses, and the writes that autograd counted.

    Shapes, strides, dtypes and devices are guarded by Dynamo, for parameters as for other tensors. An address alone
    proves nothing: `model.half().float()` frees the storage and may be given it again.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._addresses = list(map(torch.Tensor.data_ptr, tensors))
        self._versions = None if any(t.is_inference() for t in tensors) else list(map(_VERSION, tensors))
        weak: Any = StorageWeakRef
        self._storages = [weak(t.untyped_storage()) for t in tensors]
        self._handles = [ref.cdata for ref in self._storages]  # 2.13

    def still_hold(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether nobody wrote to or replaced a tensor since. Tensors made in inference mode never tell: False."""
        if self._versions is None or list(map(torch.Tensor.data_ptr, tensors)) != self._addresses:
            return False
        try:
            same = list(map(_VERSION, tensors)) == self._versions
        except RuntimeError:  # an inference tensor, which counts no writes
            return False
        return same and not any(map(torch.UntypedStorage._expired, self._handles))  # 2.13


_VERSION = operator.attrgetter("_version")  # 2.13


def trace_pre_dispatch(
    function: Callable[..., Any],
    fakes: Sequence[object],
    mode: FakeTensorMode | None = None,
    decompositions: Mapping[OpOverload, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """`function` as a graph of pre-dispatch ATen: composite operators such as linear and attention stay whole.

    `mode` is taken from `fakes` when it is not given. Symbols that data-dependent operators make during the trace are
    forgotten: whoever compiles the graph traces it again and makes its own.
    """
    found = (v.fake_mode for v in fakes if isinstance(v, FakeTensor))
    mode = mode or next(found, None) or fake_mode_for(fakes)
    env = mode.shape_env
    with contextlib.ExitStack() as stack:
        stack.enter_context(_restored_globals())
        stack.enter_context(mode)
        stack.enter_context(fx.traceback.preserve_node_meta())
        if env is not None:
            stack.enter_context(env.ignore_fresh_unbacked_symbols())  # 2.13
        traced: fx.GraphModule = make_fx(
            function,
            decomposition_table=dict(decompositions or {}),
            tracing_mode="real",  # the inputs are fake already
            pre_dispatch=True,
            _allow_non_fake_inputs=True,  # 2.13: tensor constants of the graph are real
        )(*fakes)
    return traced


@contextlib.contextmanager
def real_tensors_allowed(values: Sequence[object]) -> Iterator[None]:
    """A trace of fakes may meet real tensors: a function that is no part of the model closes over them."""
    mode: Any = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    before = mode is not None and mode.allow_non_fake_inputs
    if mode is not None:
        mode.allow_non_fake_inputs = True  # 2.13
    try:
        yield
    finally:
        if mode is not None:
            mode.allow_non_fake_inputs = before


def trace_below_dispatch(
    function: Callable[..., Any], fakes: Sequence[object], mode: FakeTensorMode | None
) -> fx.GraphModule:
    """`function` as a graph of ATen below autograd and vmap, where batch dimensions are written out."""
    with _restored_globals(), mode or contextlib.nullcontext():
        traced: fx.GraphModule = make_fx(
            function,
            tracing_mode="real",
            _allow_non_fake_inputs=True,  # 2.13
        )(*fakes)
    return traced


def vmap_depth(target: object) -> int:
    """1 for the call that pushes a vmap level, -1 for the one that pops it, 0 for everything else."""
    module = getattr(target, "__module__", "") or ""
    if "functorch" not in module:  # 2.13: torch._functorch.predispatch
        return 0
    return {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}.get(getattr(target, "__name__", ""), 0)


def differentiates(target: object) -> bool:
    """Whether a node pushes the level of a derivative that `torch.func` takes within the graph."""
    module = getattr(target, "__module__", "") or ""
    names = ("_grad_increment_nesting", "_jvp_increment_nesting")  # 2.13: torch._C._functorch, torch._functorch
    return "functorch" in module and getattr(target, "__name__", "") in names


@contextlib.contextmanager
def _restored_globals() -> Iterator[None]:
    """Grad mode, autocast and the levels of `torch.func` as they were: a trace that fails half way leaves none."""
    levels: Any = torch._C._functorch  # 2.13
    hooks: Any = torch._C._autograd  # 2.13
    depth, in_place = levels.get_dynamic_layer_stack_depth(), levels.get_inplace_requires_grad_allowed()
    hooked = hooks._saved_tensors_hooks_is_enabled()
    devices = ("cpu", "cuda")
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        levels.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        levels.set_inplace_requires_grad_allowed(in_place)
        if hooked and not hooks._saved_tensors_hooks_is_enabled():
            hooks._saved_tensors_hooks_enable()
        torch.set_grad_enabled(grad)
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def autocast_switch(target: object) -> bool | None:
    """True for the node target that enters an autocast region, False for the one that leaves it, else None."""
    enter, leave = autocast_switches()
    return True if target is enter else False if target is leave else None


def autocast_switches() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The node targets that enter an autocast region, given what `torch.autocast` is given, and leave it."""
    return torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast  # 2.13


def switches_mode(target: object) -> bool:
    """Whether a node switches grad mode or autocast for the nodes behind it."""
    return target is torch._C._set_grad_enabled or autocast_switch(target) is not None  # 2.13


def reads_data(target: object) -> bool:
    """Whether a node reads `tensor.data`: a view without history, which a pre-dispatch trace does not record."""
    autograd: Any = torch._C._autograd
    return target is autograd._get_data_attr  # 2.13


def checkpoint_body(target: object, body: object) -> fx.GraphModule | None:
    """The graph of an activation checkpoint when it lacks the policy that a second trace asks it for, else None."""
    if target is not torch.ops.higher_order.tag_activation_checkpoint or not isinstance(body, fx.GraphModule):
        return None
    return None if _CHECKPOINT_POLICY in body.meta else body


def set_checkpoint_policy(body: fx.GraphModule) -> None:
    """Note on the graph of an activation checkpoint what torch does without a note: recompute everything."""
    from torch._higher_order_ops.wrap import _always_prefer_recompute  # 2.13
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    contexts = functools.partial(create_selective_checkpoint_contexts, _always_prefer_recompute)
    body.meta[_CHECKPOINT_POLICY] = contexts


_CHECKPOINT_POLICY = "_checkpoint_context_fn"  # 2.13


def inference_switch(target: object) -> bool | None:
    """True for the node target that enters inference mode, False for the one that leaves it, else None."""
    if target is torch.autograd.grad_mode._enter_inference_mode:  # 2.13
        return True
    return False if target is torch.autograd.grad_mode._exit_inference_mode else None  # 2.13


# ** what Dynamo notes on a graph **


_IN_DICT = re.compile(r"\.__dict__\['(_modules|_parameters|_buffers)'\]")
"""2.13: how a module is read that sets attributes while it runs."""


def source_name(placeholder: fx.Node) -> str:
    """Where an input comes from in the user's program, as `L['self']._parameters['weight']`; "" when unknown."""
    source = getattr(placeholder, "_dynamo_source", None)  # 2.13
    if source is None:
        return ""
    return _IN_DICT.sub(r".\1", str(source.name))


def copy_placeholder_facts(old: fx.Node, new: fx.Node) -> None:
    """Meta and source of an input, without "grapharg", through which Dynamo would find its own node again."""
    new._rename(old.name)  # 2.13: the tracer calls every input arg0_1
    new.target = new.name
    traced = {key: new.meta[key] for key in ("val", "tensor_meta") if key in new.meta}
    new.meta.update({key: value for key, value in old.meta.items() if key != "grapharg"} | traced)
    new._dynamo_source = getattr(old, "_dynamo_source", None)  # 2.13: AOTAutograd asserts it


def copy_module_facts(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Module meta and the sources of parameters, as copies."""
    new.meta = dict(old.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):  # 2.13
        if hasattr(old, name):
            vars(new)[name] = dict(getattr(old, name) or {})


def adopt_constants(gm: fx.GraphModule) -> None:
    """Make every tensor that the graph reads from its module a buffer with a source, in place.

    AOTAutograd fakes parameters and buffers only, and asks a source of each. Prefill with a fresh DynamicCache needs
    it: it holds `torch.tensor([])`.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        owner_name, _, leaf = str(node.target).rpartition(".")
        owner = gm.get_submodule(owner_name)
        value = getattr(owner, leaf)
        if isinstance(value, torch.Tensor) and leaf not in owner._parameters and leaf not in owner._buffers:
            delattr(owner, leaf)
            owner.register_buffer(leaf, value)
    if "dynamo_compile_id" not in gm.meta:  # 2.13: only graphs of Dynamo are asked for sources
        return
    known: dict[str, Source] = dict(getattr(gm, "_param_name_to_source", None) or {})  # 2.13
    tensors = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    adopted: dict[str, Source] = {n: ConstantSource(n) for n, _ in tensors if n not in known}
    vars(gm)["_param_name_to_source"] = known | adopted


def add_input(gm: fx.GraphModule, name: str, value: torch.Tensor, after: fx.Node | None) -> fx.Node:
    """A new input behind the placeholder `after` (None: before everything); append `value` to the inputs likewise.

    It is marked static, as weights are: its address stays the same from call to call.
    """
    mode = fake_mode_of(gm) or fake_mode_for(())
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(after) if after is not None else gm.graph.inserting_before(first):
        node = gm.graph.placeholder(name)
    fake = mode.from_tensor(value.detach(), static_shapes=True)
    if (tracing := TracingContext.try_get()) is not None:
        # else AOTAutograd's own fake has symbols as sizes, which Dynamo can not guard: it has no source for them
        tracing.tensor_to_context[value] = StatefulSymbolicContext(  # 2.13
            dynamic_sizes=[DimDynamic.STATIC] * value.dim(),
            tensor_source=ConstantSource(name),
            shape_env_to_source_to_symbol_cache={},
        )
    node.meta = {"example_value": fake, "val": fake, "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}  # 2.13
    node._dynamo_source = None  # 2.13: None is "no source", absence is an error
    return node


def mark_static_address(tensor: torch.Tensor) -> None:
    """Promise Dynamo that a tensor keeps its address from call to call."""
    torch._dynamo.mark_static_address(tensor)  # 2.13


def reset_with_dynamo(backend: Any) -> None:
    """Let the next `torch._dynamo.reset()` call `backend.reset`, also where code that it dropped was compiled again."""
    torch._dynamo.eval_frame.cached_backends.setdefault(id(backend), backend)  # 2.13


def is_static_input(placeholder: fx.Node) -> bool:
    """Whether Dynamo promises that the input keeps its address: parameters, buffers and static caches."""
    return bool((placeholder.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))  # 2.13


def fqn_of(gm: fx.GraphModule) -> dict[str, str]:
    """Placeholder name -> the fully qualified name of the parameter or buffer it is, `model.layers.0.mlp.up.weight`.

    Dynamo's own table, `meta["dynamo_flat_name_to_original_fqn"]`, has keys that are no placeholder's name.
    """
    from .provenance import attribute_path

    names = {node.name: source_name(node) for node in gm.graph.find_nodes(op="placeholder")}
    return {
        name: attribute_path(source)
        for name, source in names.items()
        if "._parameters[" in source or "._buffers[" in source
    }


# ** hand-off **


def hand_to_inductor(
    gm: fx.GraphModule, inputs: Sequence[object], patches: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile with inductor, which takes ownership of `gm`. May raise DYNAMO_CONTROL_FLOW."""
    from torch._inductor.compile_fx import compile_fx  # 2.13

    given: list[Any] = list(inputs)
    compiled: Any = compile_fx(gm, given, config_patches=dict(patches or {}) or None)
    return compiled  # type: ignore[no-any-return]


@contextlib.contextmanager
def cache_tag(tag: str) -> Iterator[None]:
    """Within the block, torch's caches on disk keep what is compiled apart from what has another tag."""
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=config.cache_key_tag + tag):
        yield


def is_opened_while_compiling(target: object, gradients: bool) -> bool:
    """Whether AOTAutograd traces the body, or with gradients the backward, of an operator that somebody else made."""
    if not isinstance(target, OpOverload) or target.namespace in ("aten", "prims", "latent"):
        return False
    keys = ["CompositeImplicitAutograd", *(["Autograd"] if gradients else [])]
    name: str = target.name()
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)  # 2.13


def hand_to_aot(
    gm: fx.GraphModule,
    inputs: Sequence[object],
    compiler: Callable[[fx.GraphModule, Sequence[object]], Callable[..., Any]],
    decompositions: Mapping[OpOverload, Callable[..., Any]],
) -> Callable[..., Any]:
    """`gm` in functional ATen without gradients, given to `compiler`. Takes ownership of `gm`."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]  # 2.13
    from torch._dynamo.backends.common import aot_autograd  # 2.13

    def forward(graph: fx.GraphModule, examples: Sequence[object]) -> Any:
        return make_boxed_func(compiler(graph, examples))

    compiled: Any = aot_autograd(fw_compiler=forward, decompositions=dict(decompositions))(gm, list(inputs))
    return compiled  # type: ignore[no-any-return]


def list_mode_options(mode: str | None) -> dict[str, Any]:
    """The inductor options that a mode of torch.compile stands for. Raises RuntimeError for an unknown mode."""
    return dict(torch._inductor.list_mode_options(mode)) if mode else {}  # 2.13


def inductor_modes() -> tuple[str, ...]:
    """The modes that torch.compile knows for inductor."""
    return tuple(torch._inductor.list_mode_options())  # 2.13


def inductor_options() -> tuple[str, ...]:
    """The names of inductor's options."""
    return tuple(torch._inductor.list_options())  # 2.13


def random_ops_kept() -> bool:
    """Whether inductor is asked to draw random numbers as eager does, dead draws included."""
    from torch._inductor import config  # 2.13

    return bool(config.fallback_random)


def emit_trace_artifact(name: str, text: str) -> None:
    """Add a text to torch's structured trace log (TORCH_TRACE), where `tlparse` shows it."""
    from torch._logging._internal import trace_structured  # 2.13

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


def trace_enabled() -> bool:
    """Whether torch writes a structured trace: its handler opens the file at the first entry, before a backend runs."""
    from torch._logging._internal import LazyTraceHandler, trace_log  # 2.13

    return any(isinstance(h, LazyTraceHandler) and h.stream is not None for h in trace_log.handlers)


def debug_folder() -> Path | None:
    """A folder of our own beside Dynamo's and inductor's under TORCH_COMPILE_DEBUG=1; None without it."""
    from torch._dynamo.utils import get_debug_dir  # 2.13

    return Path(get_debug_dir()) / "latent" if os.environ.get("TORCH_COMPILE_DEBUG") == "1" else None


# ** symbols **


def compile_id() -> str:
    """The compilation that is going on, as in torch's logs: "0/0"; "" outside of one."""
    current = torch._guards.CompileContext.current_compile_id()  # 2.13
    return "" if current is None else str(current)


def recompile_reason() -> str:
    """Which guard sent the call to the compilation that is going on, and from where; "" for a first one."""
    known = torch._dynamo.utils.get_metrics_context()._metrics  # 2.13: None where Dynamo compiles for the first time
    return str(known.get("recompile_reason") or "")


def size_hints(nodes: Iterable[fx.Node]) -> dict[sympy.Symbol, int]:
    """Example values of the symbols in the sizes of tensors."""
    hints: dict[sympy.Symbol, int] = {}
    for node in nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                known = size.node.shape_env.backed_var_to_val  # 2.13
                hints.update({s: int(known.get(s, 2)) for s in size.node.expr.free_symbols})
    return hints


# ** the processor **


def tiles_permitted() -> bool:
    """Whether this process may use matrix tiles (AMX), which the kernel of the system grants on request."""
    return bool(torch.cpu._init_amx())  # 2.13
