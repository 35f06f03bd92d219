"""Nodes are named by the module and the line of the user's program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latent.rewriter.capture import capture
from latent.rewriter.compat import fqn_of, source_name
from latent.rewriter.provenance import SourceLine, attribute_path, is_learned, module_path, source_line, user_frames
from torch import fx, nn

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']", ""),
        ("G['model']", ""),
        ("L['self'].model.layers.3.self_attn", "model.layers.3.self_attn"),
        ("L['self']._modules['layers']._modules['3']._parameters['weight']", "layers.3.weight"),
        ("L['s']._modules['blocks']._modules['a b']._buffers['state']", "blocks.a b.state"),
        ("L['s'].heads[0]._parameters['weight']", "heads.0.weight"),
        ("L['s'].heads['left'].weight", "heads.left.weight"),
        ("L['fn'].__closure__[0].cell_contents._modules['norm']", "norm"),
        ("L['fn'].__self__._modules['norm']", "norm"),
        ("model.norm", "model.norm"),
    ],
)
def test_paths_lose_the_decoration(source: str, path: str) -> None:
    assert attribute_path(source) == path


def frame(file: str, line: int, code: str) -> str:
    return f'  File "{file}", line {line}, in forward\n    {code}\n'


TORCH = str(Path(torch.__file__).parent)
MODEL = "/anywhere/site-packages/transformers/models/llama/modeling_llama.py"
CACHE = "/anywhere/site-packages/transformers/cache_utils.py"


def node_with(trace: str) -> fx.Node:
    node = fx.Graph().call_function(aten.add.Tensor)
    node.meta["stack_trace"] = trace
    return node


def test_the_innermost_line_of_the_user_counts() -> None:
    node = node_with(
        frame("/home/me/run.py", 3, "model(x)")
        + frame(f"{TORCH}/nn/modules/module.py", 9, "return forward_call()")
        + frame("/home/me/model.py", 41, "y = F.softmax(x, -1)")
        + frame(f"{TORCH}/nn/functional.py", 2100, "ret = input.softmax(dim)")
    )
    line = source_line(node)
    assert line == SourceLine("/home/me/model.py", 41, "y = F.softmax(x, -1)")
    assert str(line) == line.short() == "model.py:41"


def test_a_models_code_counts_before_the_library_it_calls() -> None:
    call = frame(MODEL, 251, "past_key_values.update(k, v)")
    inside = frame(CACHE, 486, "self.keys.index_copy_(2, position, k)")
    assert str(source_line(node_with(call + inside))) == "modeling_llama.py:251"
    assert str(source_line(node_with(inside))) == "cache_utils.py:486", "better than nothing"


def test_lines_without_code_and_traces_without_a_user() -> None:
    assert source_line(node_with("")) is None
    assert source_line(node_with(frame(f"{TORCH}/nn/functional.py", 1, "x"))) is None
    assert source_line(node_with('  File "<eval_with_key>.3", line 7, in forward\n    y = x\n')) is None
    two = '  File "/a/b.py", line 1, in f\n  File "<stdin>", line 2, in g\n'
    assert user_frames(two) == (SourceLine("/a/b.py", 1), SourceLine("<stdin>", 2))


def test_a_node_without_a_module() -> None:
    node = fx.Graph().call_function(aten.add.Tensor)
    assert module_path(node) == ""
    assert source_line(node) is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).softmax(-1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.heads = nn.ModuleDict({"left": Block()})
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.heads["left"](x) * self.scale


def captured(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    kept: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        kept.append(capture(gm, inputs))
        return kept[-1].forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*args)
    return kept[-1]


@pytest.mark.parametrize("compiled", ["module", "function", "method"])
def test_paths_are_those_of_the_model_however_it_is_compiled(compiled: str) -> None:
    model = Model()
    function = {"module": model, "method": model.forward, "function": lambda x: model(x)}[compiled]
    gm = captured(function, torch.randn(2, 4))
    softmaxes = [n for n in gm.graph.nodes if n.target is aten.softmax.int]
    assert [module_path(n) for n in softmaxes] == ["layers.0", "layers.1", "heads.left"]
    assert all(isinstance(model.get_submodule(module_path(n)), Block) for n in softmaxes)
    linears = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    assert module_path(linears[1]) == "layers.1.proj"
    line = source_line(softmaxes[0])
    assert line is not None and line.file == __file__ and "softmax" in line.code
    assert [str(source_line(n)) for n in linears] == [str(line)] * 3

    names = fqn_of(gm)
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert set(names.values()) == own
    assert set(names) <= {n.name for n in gm.graph.find_nodes(op="placeholder")}


def test_inputs_of_the_call_have_a_source_and_no_name_in_the_model() -> None:
    gm = captured(Model(), torch.randn(2, 4))
    (x,) = [n for n in gm.graph.find_nodes(op="placeholder") if n.name not in fqn_of(gm)]
    assert source_name(x) == "L['x']"


def test_buffers_of_a_module_that_changes_while_it_runs_are_named_and_learned() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.register_buffer("table", torch.arange(8.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.rows = x.shape[0]
            return self.linear(x) + self.table[: self.rows, None]

    found: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> object:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(torch.nn.Sequential(Counting()), backend=keep)(torch.randn(3, 4))
    inputs = found[0].graph.find_nodes(op="placeholder")
    learned = {attribute_path(source_name(node)) for node in inputs if is_learned(node)}
    assert learned == {"0.linear.weight", "0.linear.bias", "0.table"}
