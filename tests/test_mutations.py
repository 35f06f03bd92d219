"""Writes keep their order, dead code goes without them, and reads know how many came before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from latent.rewriter.compat import trace_pre_dispatch
from latent.rewriter.mutations import base_of, mutations, visible_writes, writes
from latent.rewriter.normal_form import normalise, remove_dead_code
from latent.rewriter.purity import is_pure
from torch import fx
from torch._subclasses import FakeTensorMode

aten = torch.ops.aten


def trace(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.GraphModule:
    mode = FakeTensorMode()
    with mode:
        fakes = [torch.empty(shape) for shape in shapes]
    return trace_pre_dispatch(function, fakes)


def nodes(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function" and str(n.target).startswith(f"aten.{name}.")]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def test_writes_are_read_from_the_schema() -> None:
    gm = trace(lambda a, b: (a.add_(b), torch.mul(a, b, out=b), a + b), (2, 3), (2, 3))
    a, b = gm.graph.find_nodes(op="placeholder")
    assert [writes(n) for n in gm.graph.nodes if n.op == "call_function"] == [(a,), (b,), ()]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1:],
        lambda x: x.view(-1, 2).t()[0],
        lambda x: x.split(1)[1],
        lambda x: x.unbind(1)[0],
        lambda x: torch.einsum("ij->ji", x),
        lambda x: torch.view_as_complex(x.view(4, 3, 2)),
        lambda x: x.contiguous(),
        lambda x: x.reshape(6, 4),
        lambda x: x.to(torch.float32),
        lambda x: torch.nn.functional.dropout(x, 0.1, False),
        lambda x: torch.broadcast_tensors(x, x)[1],
        lambda x: x.diagonal(),
        lambda x: x.view(torch.int32),
        lambda x: x.relu_(),
    ],
)
def test_a_view_lies_in_its_base(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gm = trace(view, (4, 6))
    (result,) = gm.graph.output_node().all_input_nodes
    assert base_of(result).op == "placeholder"


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x.t().contiguous(),
        lambda x: x.t().reshape(-1),
        lambda x: x.to(torch.float64),
        lambda x: x.clone(),
        lambda x: x + 1,
        lambda x: x.topk(2)[0],
    ],
)
def test_a_copy_does_not(copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gm = trace(copy, (4, 6))
    (result,) = gm.graph.output_node().all_input_nodes
    assert base_of(result).op == "call_function"


def test_inputs_that_share_a_storage_are_one() -> None:
    def run(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        row.add_(1)
        return x * 2

    whole = torch.empty(3, 4)
    mode = FakeTensorMode()
    gm = trace_pre_dispatch(run, [mode.from_tensor(whole), mode.from_tensor(whole[1])])
    x, row = gm.graph.find_nodes(op="placeholder")
    assert base_of(row) is base_of(x) is x
    assert mutations(gm.graph).epoch(nodes(gm, "mul")[0], x) == 1


def test_epochs_count_the_writes_before_a_read() -> None:
    def run(cache: torch.Tensor, x: torch.Tensor) -> Any:
        before = cache + 1
        cache[:, :2].copy_(x)
        view = cache[0]
        between = cache + 2
        cache[:, 2:].mul_(2)
        return before, between, view * 2

    gm = trace(run, (3, 4), (3, 2))
    cache, x = gm.graph.find_nodes(op="placeholder")
    found = mutations(gm.graph)
    before, between = nodes(gm, "add")
    (product,) = nodes(gm, "mul")
    assert [found.epoch(n, cache) for n in (before, between, product)] == [0, 1, 2]
    assert found.epoch(product, x) == 0
    assert found.epoch(product) == 0, "its own storage is fresh"
    assert [str(n.target) for n in found.writes[cache]] == ["aten.copy_.default", "aten.mul_.Tensor"]
    assert found.write_between(cache, before, between) is found.writes[cache][0]
    assert found.write_between(x, before, product) is None


def test_dead_code_goes_and_writes_stay_in_order() -> None:
    def run(keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        unused = x.exp().sum()
        _ = unused * 2
        at = position.long()
        values.index_copy_(0, at, x)
        keys.index_copy_(0, at, x)
        position.add_(1)
        torch.nn.functional.relu(keys, True)
        return x + 1

    gm = trace(run, (8, 3), (8, 3), (1,), (1, 3))
    expected = visible_writes(gm.graph)
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    assert remove_dead_code(gm) == 3
    assert visible_writes(gm.graph) == expected
    assert [(operator.split(".")[1], names.index(where)) for operator, where in expected] == [
        ("index_copy_", 1),
        ("index_copy_", 0),
        ("add_", 2),
        ("relu_", 0),
    ]
    tensors = [torch.randn(8, 3), torch.randn(8, 3), torch.zeros(1), torch.randn(1, 3)]
    copies = [t.clone() for t in tensors]
    torch.testing.assert_close(gm(*tensors), run(*copies))
    torch.testing.assert_close(tensors, copies)


def test_what_is_pure() -> None:
    def run(x: torch.Tensor) -> Any:
        torch.nn.functional.dropout(x, 0.5, True)
        torch.nn.functional.dropout(x, 0.5, False)
        x.nonzero()
        return x + 1

    mode = FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv())
    with mode:
        fake = torch.empty(4)
    gm = trace_pre_dispatch(run, [fake])
    training, evaluation = nodes(gm, "dropout")
    (sizes,) = nodes(gm, "nonzero")
    assert not is_pure(sizes), "its result has a size that others may use"
    assert is_pure(training) and is_pure(evaluation)
    with torch._inductor.config.patch(fallback_random=True):
        assert not is_pure(training)
        assert is_pure(evaluation)


def test_a_higher_order_operator_may_write_to_its_tensors() -> None:
    class Run(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    kept: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        from latent.rewriter.capture import capture

        kept.append(normalise(capture(gm, inputs)))
        return kept[0].forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Run(), backend=backend)(torch.ones(3))
    gm = kept[0]
    (cond,) = [n for n in gm.graph.nodes if "cond" in str(n.target)]
    x = gm.graph.find_nodes(op="placeholder")[0]
    assert x in writes(cond)
    assert not is_pure(cond)
    assert visible_writes(gm.graph) == ()
