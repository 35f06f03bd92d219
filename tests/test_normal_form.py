"""Each spelling that normal form resolves, each reason to leave it, and each rule with a graph that breaks it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from latent.rewriter.capture import capture
from latent.rewriter.compat import trace_pre_dispatch
from latent.rewriter.normal_form import (
    Contract,
    NormalFormError,
    check_normal_form,
    normalise,
    read_scalar,
    remove_dead_code,
)
from torch import fx
from torch._subclasses import FakeTensorMode

aten = torch.ops.aten


def trace(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    mode = FakeTensorMode()
    return trace_pre_dispatch(function, [mode.from_tensor(value) for value in inputs])


def count(gm: fx.GraphModule, target: object) -> int:
    return sum(node.target is target for node in gm.graph.nodes)


def calls(gm: fx.GraphModule) -> list[str]:
    return [str(node.target).split(".")[1] for node in gm.graph.nodes if node.op == "call_function"]


# ** buffers that are filled piece by piece **

X, Y = torch.randn(3, 4), torch.randn(3, 2)


def _two_slices(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = x.new_empty(3, 6)
    buffer[:, :4] = x
    buffer[:, 4:] = y
    return buffer * 2


def _back_to_front(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(3, 6)
    buffer[..., -2:].copy_(y)
    buffer.narrow(1, 0, 4).copy_(x)
    return buffer * 2


def _select(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.empty(3, 4)
    for row in range(3):
        buffer[row] = x[row]
    return buffer * 2


def _broadcast_and_cast(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.empty(3, 6, dtype=torch.float64)
    buffer[:, :4] = x
    buffer[:, 4:] = y[0]
    return buffer * 2


def _slice_of_slice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = x.new_empty(3, 6)
    front = buffer[:, :4]
    front[:, :2] = y
    front[:, 2:] = y + 1
    buffer[:, 4:] = y
    return buffer * 2


def _read_through_a_later_slice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """As a prefill with a static cache reads its keys."""
    buffer = x.new_empty(3, 6)
    buffer[:, :4] = x
    buffer[:, 4:] = y
    return buffer[:2] * 2


FILLED = [_read_through_a_later_slice, _two_slices, _back_to_front, _select, _broadcast_and_cast, _slice_of_slice]


@pytest.mark.parametrize("program", FILLED)
def test_a_filled_buffer_is_a_cat(program: Callable[..., torch.Tensor]) -> None:
    gm = trace(program, X, Y)
    contract = Contract.of(gm)
    normalise(gm)
    check_normal_form(gm, contract)
    assert count(gm, aten.cat.default) == 1
    assert not {"copy_", "empty", "new_empty", "zeros"} & set(calls(gm))
    torch.testing.assert_close(gm(X, Y), program(X, Y))


def _gap(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(3, 7)
    buffer[:, :4] = x
    buffer[:, 5:] = y
    return buffer * 2


def _overlap(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(3, 5)
    buffer[:, :4] = x
    buffer[:, 3:] = y
    return buffer * 2


def _read_in_between(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(3, 6)
    buffer[:, :4] = x
    early = buffer.sum()
    buffer[:, 4:] = y
    return buffer * early


def _read_through_the_slice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(3, 6)
    front = buffer[:, :4]
    front.copy_(x)
    buffer[:, 4:] = y
    return buffer * front.sum()


def _read_through_an_earlier_slice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(3, 6)
    rows = buffer[:2]
    buffer[:, :4] = x
    buffer[:, 4:] = y
    return buffer.sum() * rows


def _source_changes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    source = x.clone()
    buffer = torch.zeros(3, 6)
    buffer[:, :4] = source
    source.add_(1)
    buffer[:, 4:] = y
    return buffer * 2


def _two_dimensions(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(3, 6)
    buffer[:1, :4] = x[:1]
    buffer[1:, 4:] = y[1:]
    return buffer * 2


def _step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(6, 4)
    buffer[0::2] = x
    buffer[1::2] = x + 1
    return buffer * 2


def _from_itself(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(3, 6)
    buffer[:, :3] = buffer[:, 3:] + 1
    buffer[:, 3:] = x[:, :3]
    return buffer * 2


LEFT = [
    _gap,
    _overlap,
    _read_in_between,
    _read_through_the_slice,
    _read_through_an_earlier_slice,
    _source_changes,
    _two_dimensions,
    _step,
    _from_itself,
]


@pytest.mark.parametrize("program", LEFT)
def test_a_buffer_that_is_no_cat_stays(program: Callable[..., torch.Tensor]) -> None:
    gm = trace(program, X, Y)
    contract = Contract.of(gm)
    normalise(gm)
    check_normal_form(gm, contract)
    assert count(gm, aten.cat.default) == 0
    torch.testing.assert_close(gm(X, Y), program(X, Y))


def test_gradients_pass_the_cat() -> None:
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    gm = normalise(trace(_two_slices, x, y))
    assert count(gm, aten.cat.default) == 1
    gm(x, y).square().sum().backward()
    got = x.grad, y.grad
    x.grad = y.grad = None
    _two_slices(x, y).square().sum().backward()
    torch.testing.assert_close(got, (x.grad, y.grad))


def test_a_later_write_goes_to_the_cat() -> None:
    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        buffer = torch.zeros(3, 6)
        buffer[:, :4] = x
        buffer[:, 4:] = y
        buffer.add_(1)
        return buffer * 2

    gm = normalise(trace(program, X, Y))
    assert count(gm, aten.cat.default) == 1
    torch.testing.assert_close(gm(X, Y), program(X, Y))


# ** identities, dead code, literals **


@torch.no_grad()
def test_identities_are_gone_and_results_keep_theirs() -> None:
    def program(x: torch.Tensor) -> Any:
        return aten.alias(x)[:, :].detach() * 2, aten.alias(x)

    gm = normalise(trace(program, X))
    assert calls(gm) == ["mul", "alias"], "the caller can tell an alias from its input"


def test_detach_stays_where_it_stops_a_gradient() -> None:
    weight = X.clone().requires_grad_()
    for stop in (torch.Tensor.detach, lambda t: (t * 2).detach_()):
        gm = captured(lambda x, stop=stop: stop(x * 3) * x, weight)
        assert {"detach", "detach_"} & set(calls(gm))
        (gradient,) = torch.autograd.grad(gm(weight)[0].sum(), weight)
        torch.testing.assert_close(gradient, stop(weight * 3))
    assert "detach" not in calls(captured(lambda x: x.detach() * x, X))
    with torch.no_grad():
        assert "detach" not in calls(captured(lambda x: x.detach() * x, weight))


def test_an_alias_stays_before_a_change_of_shape() -> None:
    gm = normalise(trace(lambda x: (aten.alias(x).t_(), x * 2)[1], X))
    assert "alias" in calls(gm)


def captured(function: Callable[..., Any], *args: Any, **options: Any) -> fx.GraphModule:
    """The graph of `function` in normal form, checked, as a backend gets it."""
    kept: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graph = capture(gm, inputs)
        contract = Contract.of(graph)
        check_normal_form(normalise(graph), contract)
        kept.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, **options)(*args)
    return kept[-1]


class Scaled(torch.nn.Module):
    scale = 0.375

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.transpose(-1, -2)) * self.scale


class ScaledCall(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, scale=self.scale) * self.scale


def test_an_unguarded_float_is_no_number() -> None:
    gm = captured(Scaled(), torch.randn(1, 2, 5, 8), dynamic=True)
    (product,) = [n for n in gm.graph.nodes if n.target is aten.mul.Tensor]
    assert product.args[1].target is aten.item.default
    assert read_scalar(product.args[1]) is None
    gm = captured(Scaled(), torch.randn(1, 2, 5, 8), dynamic=False)
    (product,) = [n for n in gm.graph.nodes if n.target is aten.mul.Tensor]
    assert read_scalar(product.args[1]) == 0.375


def test_a_float_that_an_operator_pinned_is_a_literal_everywhere() -> None:
    gm = captured(ScaledCall(), torch.randn(1, 2, 5, 8), dynamic=True)
    (attention,) = [n for n in gm.graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    (product,) = [n for n in gm.graph.nodes if n.target is aten.mul.Tensor]
    assert attention.kwargs["scale"] == 0.375
    assert product.args[1] == 0.375
    assert count(gm, aten.item.default) == 0


def test_scalars_of_the_program_are_read() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return x * torch.full((), 2.0) + x / torch.tensor(8.0)

    gm = captured(program, X)
    by_name = {str(n.target): n for n in gm.graph.nodes if n.op == "call_function"}
    assert read_scalar(by_name["aten.mul.Tensor"].args[1]) == 2.0
    assert read_scalar(by_name["aten.div.Tensor"].args[1]) == 8.0
    assert read_scalar(by_name["aten.mul.Tensor"].args[0]) is None


def test_a_scalar_that_is_written_is_no_number() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        factor = torch.tensor([2.0])
        factor[0] = 5.0
        return x * factor

    gm = captured(program, X)
    (product,) = [n for n in gm.graph.nodes if n.target is aten.mul.Tensor]
    assert read_scalar(product.args[1]) is None


# ** rules **


def _graph() -> fx.GraphModule:
    """keys.add_(1), values.mul_(2); x * y + 1."""

    def program(keys: torch.Tensor, x: torch.Tensor, y: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        keys.add_(1)
        values.mul_(2)
        return x * y + 1

    return captured(program, *(torch.ones(3) for _ in range(4)))


def _find(gm: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.target is target)


def _late_input(gm: fx.GraphModule) -> None:
    gm.graph.output_node().prepend(_find(gm, aten.mul.Tensor))


def _python_function(gm: fx.GraphModule) -> None:
    _find(gm, aten.mul.Tensor).target = torch.mul


def _method(gm: fx.GraphModule) -> None:
    node = _find(gm, aten.mul.Tensor)
    node.op, node.target = "call_method", "mul"


def _in_place_function(gm: fx.GraphModule) -> None:
    _find(gm, aten.mul.Tensor).target = operator.imul


def _no_value(gm: fx.GraphModule) -> None:
    del _find(gm, aten.mul.Tensor).meta["val"]


def _no_origin(gm: fx.GraphModule) -> None:
    for key in ("stack_trace", "nn_module_stack"):
        _find(gm, aten.mul.Tensor).meta.pop(key, None)


def _dead(gm: fx.GraphModule) -> None:
    node = _find(gm, aten.add.Tensor)
    gm.graph.output_node().args = ((_find(gm, aten.mul.Tensor),),)
    assert not node.users


def _lost_input(gm: fx.GraphModule) -> None:
    x, y = (node for node in _find(gm, aten.mul.Tensor).all_input_nodes)
    y.replace_all_uses_with(x)
    gm.graph.erase_node(y)


def _swapped_inputs(gm: fx.GraphModule) -> None:
    first, second, *_ = gm.graph.find_nodes(op="placeholder")
    second.append(first)


def _lost_write(gm: fx.GraphModule) -> None:
    node = _find(gm, aten.mul_.Tensor)
    gm.graph.erase_node(node)


def _swapped_writes(gm: fx.GraphModule) -> None:
    _find(gm, aten.mul_.Tensor).append(_find(gm, aten.add_.Tensor))


BREAKS = {
    "ordered": [_late_input],
    "only_operators": [_python_function, _method, _in_place_function],
    "described": [_no_value],
    "located": [_no_origin],
    "alive": [_dead],
    "same_inputs": [_lost_input, _swapped_inputs],
    "same_writes": [_lost_write, _swapped_writes],
}


@pytest.mark.parametrize(("rule", "change"), [(rule, change) for rule in BREAKS for change in BREAKS[rule]])
def test_a_rule_is_broken(rule: str, change: Callable[[fx.GraphModule], None]) -> None:
    gm = _graph()
    contract = Contract.of(gm)
    check_normal_form(gm, contract)
    change(gm)
    with pytest.raises(NormalFormError) as caught:
        check_normal_form(gm, contract)
    assert caught.value.rule == rule
    assert "\n-> " in str(caught.value), "the node is shown"
    assert len(str(caught.value).splitlines()) > 3, "and what stands around it"


def test_every_rule_is_tested_and_documented() -> None:
    from latent.rewriter.invariants import RULES

    assert {rule.__name__ for rule in RULES} == set(BREAKS)
    assert all(rule.__doc__ and "\n" not in rule.__doc__ for rule in RULES)


def test_the_captured_graph_itself_may_be_given() -> None:
    first, second = _graph(), _graph()
    check_normal_form(second, first)
    _lost_write(second)
    with pytest.raises(NormalFormError, match=r"same_writes: write 1 was .*mul_"):
        check_normal_form(second, first)


def test_dead_code_is_counted() -> None:
    gm = _graph()
    assert remove_dead_code(gm) == 0
    _dead(gm)
    assert remove_dead_code(gm) == 1
