"""Dynamo's graph becomes pre-dispatch ATen with the same inputs, results, writes and origins."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from latent.rewriter.capture import CaptureError, capture, untouched_copy
from latent.rewriter.compat import DYNAMO_CONTROL_FLOW, add_input, hand_to_inductor, is_static_input, source_name
from latent.rewriter.mutations import visible_writes
from latent.rewriter.normal_form import Contract, check_normal_form, normalise
from latent.rewriter.provenance import module_path, source_line
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
aten = torch.ops.aten
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    **TINY,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}


def make(name: str, attention: str = "sdpa") -> Any:
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    elif name == "llama":
        config = transformers.LlamaConfig(**TINY)
    else:
        config = transformers.DeepseekV3Config(**LATENT)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Backend:
    """Captures and normalises, checks what must hold of every capture, and runs or compiles the result."""

    def __init__(self, inner: str = "eager") -> None:
        self.inner = inner
        self.graphs: list[fx.GraphModule] = []
        self.given: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = str(gm.graph), [dict(node.meta) for node in gm.graph.nodes]
        new = capture(gm, inputs)
        assert (str(gm.graph), [dict(node.meta) for node in gm.graph.nodes]) == before, "the given graph was edited"
        same_inputs(gm, new)
        contract = Contract.of(new)
        check_normal_form(normalise(new), contract)
        self.given.append(gm)
        self.graphs.append(new)
        return hand_to_inductor(new, inputs) if self.inner == "inductor" else new.forward


def same_inputs(gm: fx.GraphModule, new: fx.GraphModule) -> None:
    old, mine = (graph.graph.find_nodes(op="placeholder") for graph in (gm, new))
    assert [n.name for n in old] == [n.name for n in mine]
    assert [source_name(n) for n in old] == [source_name(n) for n in mine]
    for a, b in zip(old, mine, strict=True):
        assert set(b.meta) >= set(a.meta) - {"grapharg"}
        assert "grapharg" not in b.meta
    assert new.meta == gm.meta


def agree(function: Callable[..., Any], *args: Any, inner: str = "eager", **options: Any) -> Backend:
    """Run `function` compiled and plain, each on copies of the arguments; results and arguments must agree."""
    backend = Backend(inner)
    copies = [pytree.tree_map(_copy, args) for _ in range(2)]
    got = torch.compile(function, backend=backend, **options)(*copies[0])
    torch.testing.assert_close(got, function(*copies[1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(copies[0], copies[1], atol=1e-4, rtol=1e-4)
    for one, other in zip(pytree.tree_leaves(got), pytree.tree_leaves(function(*copies[1])), strict=True):
        assert not isinstance(one, torch.Tensor) or one.requires_grad == other.requires_grad
    return backend


def _copy(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


# ** transformers **

SCENES = [
    ("llama", "sdpa", "static", False, torch.float32),
    ("llama", "eager", "dynamic", True, torch.float32),
    ("llama", "sdpa", "prefill", False, torch.bfloat16),
    ("gpt2", "eager", "prefill", None, torch.float32),
    ("deepseek_v3", "sdpa", "static", None, torch.float32),
    ("deepseek_v3", "sdpa", "dynamic", True, torch.float32),
]


@pytest.mark.parametrize(("name", "attention", "cache", "dynamic", "dtype"), SCENES)
@torch.no_grad()
def test_models(name: str, attention: str, cache: str, dynamic: bool | None, dtype: torch.dtype) -> None:
    model = make(name, attention).to(dtype)
    prompt, token = torch.randint(3, 64, (2, 6)), torch.randint(3, 64, (2, 1))

    def inputs() -> dict[str, Any]:
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=16)
        else:
            past = transformers.DynamicCache(config=model.config)
        if cache != "prefill":
            model(input_ids=prompt, past_key_values=past)
        return {"input_ids": prompt if cache == "prefill" else token, "past_key_values": past}

    backend = Backend()
    plain, compiled = inputs(), inputs()
    got = torch.compile(model, backend=backend, dynamic=dynamic)(**compiled).logits
    want = model(**plain).logits
    torch.testing.assert_close(got, want, atol=1e-2 if dtype == torch.bfloat16 else 1e-4, rtol=1e-3)
    for mine, theirs in zip(compiled["past_key_values"].layers, plain["past_key_values"].layers, strict=True):
        torch.testing.assert_close((mine.keys, mine.values), (theirs.keys, theirs.values), atol=1e-2, rtol=1e-2)
    graph = backend.graphs[-1].graph
    products = [n for n in graph.nodes if n.target in (aten.linear.default, aten.addmm.default)]
    assert products and all(isinstance(model.get_submodule(module_path(n)), nn.Module) for n in products)
    assert all("modeling_" in str(source_line(n)) or "pytorch_utils" in str(source_line(n)) for n in products)
    if cache == "static":
        operators = [operator for operator, _ in visible_writes(graph)]
        assert operators == ["aten.add_.Tensor", "aten.index_copy_.default", "aten.index_copy_.default"]
        statics = [n for n in graph.find_nodes(op="placeholder") if source_name(n).endswith(".keys")]
        assert all(is_static_input(n) for n in statics) and statics
    if name == "deepseek_v3":
        assert not any("empty" in str(n.target) for n in graph.nodes), "the keys are a cat"


def test_training() -> None:
    model, ids = make("llama").train(), torch.randint(3, 64, (2, 6))
    backend = Backend()
    torch.compile(model, backend=backend)(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.testing.assert_close(got, {name: p.grad for name, p in model.named_parameters()}, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention() -> None:
    """Transformers builds its block mask under vmap in the traced code."""
    model, ids = make("llama", "flex_attention"), torch.randint(3, 64, (2, 6))
    backend = Backend()
    got = torch.compile(model, backend=backend)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, model(input_ids=ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert any("flex_attention" in str(n.target) for gm in backend.graphs for n in gm.graph.nodes)


class Dropping(nn.Module):
    rate = 0.25

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, self.rate, False) * 2


def test_dynamo_starts_over_when_inductor_pins_a_float() -> None:
    graphs = agree(Dropping(), torch.randn(3, 4), inner="inductor", dynamic=True).graphs
    assert len(graphs) == 2
    assert len(graphs[0].graph.find_nodes(op="placeholder")) > len(graphs[1].graph.find_nodes(op="placeholder"))


# ** modes, constants, mutations, symbols **

W = nn.Linear(4, 4)


def _autocast(x: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nn.functional.linear(x, W.weight)
        z = y * 2
    return z, x @ W.weight


def _inference(x: torch.Tensor) -> Any:
    y = W(x)
    with torch.inference_mode():
        z = W(x) * 2
    return y, z


def _no_grad(x: torch.Tensor) -> Any:
    with torch.no_grad():
        z = W(x) * 2
    return W(x), z


def _mutation(x: torch.Tensor) -> Any:
    x = x.clone()
    x[0].add_(1)
    x[:, 1:3] = 2
    nn.functional.relu(x, True)
    return x * 2


def _checkpoint(x: torch.Tensor) -> Any:
    return checkpoint(lambda y: W(y).sin(), x, use_reentrant=False)


def _constants(x: torch.Tensor) -> Any:
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.tensor(3.0), torch.tensor([])


def _cond(x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x * 3, (x,))


def _data(x: torch.Tensor) -> Any:
    y = W(x)
    return x @ W.weight.data, (x * 2).data, x.data, y + (y.round() - y).data


def _data_in_bodies(x: torch.Tensor) -> Any:
    y = torch.cond(x.sum() > 0, lambda x: x @ W.weight.data, lambda x: x @ W.weight, (x,))
    return checkpoint(lambda y: y.data.sin() * W(y), y, use_reentrant=False)


PROGRAMS = [_autocast, _inference, _no_grad, _mutation, _checkpoint, _constants, _cond, _data, _data_in_bodies]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program: Callable[[torch.Tensor], Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    agree(program, torch.randn(3, 4))


@pytest.mark.parametrize("program", [_autocast, _inference, _checkpoint, _constants, _data])
def test_programs_through_inductor(program: Callable[[torch.Tensor], Any]) -> None:
    agree(program, torch.randn(3, 4), inner="inductor")


def test_values_inside_autocast_have_its_dtype() -> None:
    graph = agree(_autocast, torch.randn(3, 4)).graphs[0].graph
    values = {n.name: n.meta["val"].dtype for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    assert values["linear"] == values["mul"] == torch.bfloat16
    assert values["matmul"] == torch.float32


@pytest.mark.parametrize("program", [_data, _data_in_bodies])
@torch.no_grad()
def test_data_without_gradients(program: Callable[[torch.Tensor], Any]) -> None:
    backend = agree(program, torch.randn(3, 4))
    assert not any("detach" in str(n.target) and len(n.users) == 0 for n in backend.graphs[0].graph.nodes)


def _write_input(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> Any:
    x.data[1].mul_(2)
    return x @ weight


def _write_before(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> Any:
    weight.data.mul_(1.5)
    return x @ weight


def _write_after(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> Any:
    y = x @ weight
    weight.data.mul_(0.9).add_(y.detach().mean())
    return y


def _write_graded(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> Any:
    buffer.data.copy_(buffer.data * 0.5 + (x @ weight).mean())
    return x @ buffer


def _set(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> Any:
    buffer.data = buffer.data * 0.5
    return x @ buffer


WRITES = [_write_input, _write_before, _write_after, _write_graded, _set]


@pytest.mark.parametrize("program", WRITES)
def test_writes_through_data_reach_the_tensor(program: Callable[..., Any]) -> None:
    with torch.no_grad():
        agree(program, torch.randn(3, 4), torch.randn(4, 4), torch.randn(4, 4))


@pytest.mark.parametrize("program", WRITES)
def test_writes_that_autograd_shall_not_see_are_refused(program: Callable[..., Any]) -> None:
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with pytest.raises(CaptureError, match=r"written to through `\.data` where gradients are on"):
            capture(gm, inputs)
        return gm.forward

    weight = torch.randn(4, 4, requires_grad=True)
    torch.compile(program, backend=backend)(torch.randn(3, 4), weight, torch.randn(4, 4))


def test_a_detached_tensor_keeps_the_history_of_a_write_to_itself() -> None:
    def run(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        buffer.detach().copy_(buffer * 0.5 + x.mean())
        return x.detach() @ buffer

    agree(run, torch.randn(3, 4, requires_grad=True), torch.randn(4, 4))


def test_symbols_floats_and_none() -> None:
    def run(x: torch.Tensor, n: int, scale: float, nothing: None) -> Any:
        return x.sum(0) * n + x.shape[0] * scale, nothing, n + 1

    backend = agree(run, torch.randn(3, 4), 7, 0.5, None, dynamic=True)
    symbols = [
        n for n in backend.graphs[0].graph.find_nodes(op="placeholder") if "int" in str(type(n.meta["val"])).lower()
    ]
    assert symbols


def test_integers_only_and_no_inputs() -> None:
    agree(lambda n: (n + 1, n.cumsum(0)), torch.arange(5))
    agree(lambda: torch.arange(5) + 1)


def test_a_data_dependent_size() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        agree(lambda x: x[x > 0].sum() + x.nonzero().shape[0], torch.randn(9))


def test_aliased_inputs() -> None:
    whole = torch.zeros(3, 4)

    def run(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        row.add_(1)
        return x * 2

    backend = Backend()
    got = torch.compile(run, backend=backend)(whole, whole[1])
    torch.testing.assert_close(got[1], torch.full((4,), 2.0))
    torch.testing.assert_close(whole[1], torch.ones(4))


def test_constants_are_buffers_with_a_source() -> None:
    gm = agree(_constants, torch.randn(3, 4)).graphs[0]
    names = [name for name, _ in gm.named_buffers()]
    assert len(names) == 3 and set(names) <= set(gm._param_name_to_source)
    assert not any(isinstance(value, FakeTensor) for _, value in gm.named_buffers())


# ** decompositions, graphs of other origin, failures **


def test_decompositions_open_operators() -> None:
    def open_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        product = x @ weight.t()
        return product if bias is None else product + bias

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        new = capture(gm, inputs, {aten.linear.default: open_linear})
        names = [n.target._opname for n in new.graph.nodes if n.op == "call_function"]
        assert names == ["t", "matmul", "add"]
        assert all(source_line(n) for n in new.graph.nodes if n.op == "call_function")
        return new.forward

    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(lambda x: W(x), backend=backend)(x), W(x))


def test_a_graph_that_is_not_dynamos() -> None:
    gm = fx.symbolic_trace(lambda x, y: torch.softmax(x @ y, -1))
    x, y = torch.randn(2, 3), torch.randn(3, 4)
    new = capture(gm, [x, y])
    assert [n.target for n in new.graph.nodes if n.op == "call_function"] == [aten.matmul.default, aten.softmax.int]
    torch.testing.assert_close(new(x, y), gm(x, y))


def test_failures_name_their_stage_and_leave_no_mode_switched() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such luck\nsecond line")

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch._C._set_grad_enabled, (False,))
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, False))
    graph.output(graph.call_function(broken, (x,)))
    gm = fx.GraphModule({}, graph)
    with pytest.raises(CaptureError, match="trace: ValueError: no such luck") as caught:
        capture(gm, [torch.ones(2)])
    assert caught.value.stage == "trace" and "second" not in caught.value.reason
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    with pytest.raises(CaptureError, match="inputs: 1 placeholders, 2 example inputs"):
        capture(gm, [torch.ones(2), torch.ones(2)])


def test_a_value_that_no_node_makes_is_refused() -> None:
    def lost(x: torch.Tensor) -> torch.Tensor:
        return x.data

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, graph.call_function(lost, (x,)))))
    with pytest.raises(CaptureError, match=r"trace: _tensor_constant0 \(2,\) was made by something"):
        capture(fx.GraphModule({}, graph), [torch.ones(2)])


def test_control_flow_of_dynamo_passes() -> None:
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    def restart(x: torch.Tensor) -> torch.Tensor:
        raise TensorifyScalarRestartAnalysis(restart_reason="a test")

    graph = fx.Graph()
    graph.output(graph.call_function(restart, (graph.placeholder("x"),)))
    with pytest.raises(DYNAMO_CONTROL_FLOW):
        capture(fx.GraphModule({}, graph), [torch.ones(2)])


# ** copies and new inputs **


@pytest.mark.parametrize("grad", [False, True])
def test_an_untouched_copy_compiles_for_itself(grad: bool) -> None:
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        copy = untouched_copy(gm)
        same_inputs(gm, copy)
        assert copy.code == gm.code and copy.graph is not gm.graph
        return hand_to_inductor(copy, inputs)

    x = torch.randn(3, 4)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.compile(_constants, backend=backend)(x), _constants(x))


@pytest.mark.parametrize("grad", [False, True])
def test_a_new_input_reaches_inductor(grad: bool) -> None:
    extra = torch.full((4,), 10.0)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        new = capture(gm, inputs)
        node = add_input(new, "extra", extra, new.graph.find_nodes(op="placeholder")[-1])
        output = new.graph.output_node()
        (result,) = output.args[0]
        with new.graph.inserting_before(output):
            plus = new.graph.call_function(aten.add.Tensor, (result, node))
        output.args = ((plus,),)
        new.recompile()
        compiled = hand_to_inductor(new, [*inputs, extra])
        return lambda *args: compiled(*args, extra)

    x = torch.randn(3, 4)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.compile(W, backend=backend)(x), W(x) + 10)


def test_a_new_input_may_stand_first() -> None:
    gm = fx.symbolic_trace(lambda x: x + 1)
    add_input(gm, "extra", torch.ones(2), None)
    gm.recompile()
    assert [n.name for n in gm.graph.find_nodes(op="placeholder")] == ["extra", "x"]
