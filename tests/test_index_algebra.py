"""Elements of traced tensors, compared with the tensors themselves at every index."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from latent.rewriter.masks.index_algebra import IndexReader
from latent.rewriter.masks.index_values import And, Bool, Compare, Const, Not, Or, Truth, Value, Where
from mask_tools import trace
from torch import fx

T = torch.tensor


def result(gm: fx.GraphModule) -> fx.Node:
    node = gm.graph.output_node().args[0]
    assert isinstance(node, fx.Node)
    return node


def read(node: fx.Node) -> tuple[IndexReader, tuple[sympy.Symbol, ...], Value]:
    reader = IndexReader(node.graph)
    indices = tuple(reader.ranges.index(f"k{d}", sympy.Integer(size)) for d, size in enumerate(node.meta["val"].shape))
    return reader, indices, reader.element(node, indices)


def number(value: Value, at: dict[sympy.Symbol, int]) -> float:
    if isinstance(value, Where):
        return number(value.then if truth(value.condition, at) else value.other, at)
    if isinstance(value, sympy.Expr):
        return float(value.xreplace({symbol: sympy.Integer(place) for symbol, place in at.items()}))
    return float(truth(value, at))


def truth(term: Bool, at: dict[sympy.Symbol, int]) -> bool:
    match term:
        case Const(value):
            return value
        case Not(inner):
            return not truth(inner, at)
        case And(terms):
            return all(truth(part, at) for part in terms)
        case Or(terms):
            return any(truth(part, at) for part in terms)
        case Compare(op, difference):
            left = number(difference, at)
            return {"ge": left >= 0, "gt": left > 0, "eq": left == 0, "ne": left != 0}[op]
        case Truth():
            raise AssertionError("a load has no value")


def assigned(m: torch.Tensor) -> torch.Tensor:
    m[:, 2:4] = -1.0
    m[1] = 5.0
    return m


def refilled(m: torch.Tensor) -> torch.Tensor:
    m.masked_fill_(m == 0, -7.0)
    m[m == 1] = 3.0
    return m * 2


i5, j7 = (lambda: torch.arange(5)), (lambda: torch.arange(7))

READ = {
    "view merges": lambda: torch.arange(24).view(4, 6).view(24) * 2,
    "view splits": lambda: torch.arange(24).view(2, 3, 4),
    "view regroups": lambda: (torch.arange(24).view(4, 6).t() + 0).reshape(8, 3),
    "flatten": lambda: (i5()[:, None] - j7()).flatten(),
    "squeeze": lambda: i5()[None, :, None].squeeze(0).squeeze(-1),
    "permute": lambda: torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
    "transpose": lambda: torch.arange(6).view(2, 3).transpose(0, 1),
    "slices": lambda: torch.arange(20).view(4, 5)[1:, 1::2],
    "negative slices": lambda: torch.arange(20).view(4, 5)[-2:, -3:-1],
    "select": lambda: torch.arange(20).view(4, 5)[:, -1],
    "narrow": lambda: j7().narrow(0, 2, 3),
    "expand": lambda: i5()[:, None].expand(-1, 3),
    "repeat": lambda: i5().repeat(2, 3),
    "flip": lambda: (i5()[:, None] * 10 + j7()).flip(0),
    "cat": lambda: torch.cat([i5(), j7() * 10, torch.ones(2, dtype=torch.long)]),
    "stack": lambda: torch.stack([i5(), i5() * 2], 1),
    "pad": lambda: torch.nn.functional.pad(i5(), (2, 1), value=9),
    "pad crops": lambda: torch.nn.functional.pad(i5(), (-2, 1), value=9),
    "split": lambda: torch.arange(20).view(4, 5).split(2, 1)[1],
    "chunk": lambda: torch.arange(20).view(4, 5).chunk(2, 0)[1],
    "unbind": lambda: torch.arange(20).view(4, 5).unbind(1)[3],
    "meshgrid": lambda: torch.meshgrid(i5(), j7(), indexing="ij")[1],
    "meshgrid xy": lambda: torch.meshgrid(i5(), j7(), indexing="xy")[0],
    "index": lambda: torch.arange(35).view(5, 7)[i5()[:, None], j7()[None, 2:] - 2],
    "index wraps": lambda: j7()[i5() - 5],
    "index apart": lambda: torch.arange(30).view(2, 3, 5)[torch.arange(2), :, torch.arange(2) + 1],
    "index_select": lambda: torch.arange(35).view(5, 7).index_select(1, torch.arange(3) + 2),
    "gather": lambda: torch.arange(35).view(5, 7).gather(1, (torch.arange(2) + 3).expand(5, 2)),
    "diff": lambda: torch.diff(j7() * 3, prepend=T([5])),
    "diff alone": lambda: torch.diff(j7() * 3),
    "cumsum": lambda: torch.full((2, 5), 2).cumsum(1),
    "arithmetic": lambda: 2 * i5()[:, None] - j7() + 3 - torch.rsub(i5(), 1, alpha=2)[:, None],
    "floor": lambda: (i5()[:, None] - 2 * j7()) // 3,
    "floor mode": lambda: torch.div(i5(), 2, rounding_mode="floor"),
    "remainder": lambda: (j7() * 2 - 3) % 4,
    "half": lambda: j7() / 2,
    "min and max": lambda: torch.minimum(i5()[:, None], j7()) + torch.maximum(i5()[:, None], T(2)),
    "clamp": lambda: (i5()[:, None] - j7()).clamp(-1, 2),
    "abs": lambda: (i5()[:, None] - j7()).abs(),
    "tril": lambda: torch.tril(torch.full((4, 6), 3.0), 1),
    "triu": lambda: torch.triu(torch.ones(4, 6, dtype=torch.bool), -1),
    "eye": lambda: torch.eye(4) * 2,
    "where": lambda: torch.where(i5()[:, None] > j7(), i5()[:, None], -1),
    "fills": lambda: torch.zeros(3, 4).masked_fill(torch.tril(torch.ones(3, 4)) == 0, float("-inf")),
    "logic": lambda: ~(i5()[:, None] > j7()) & ((j7() < 3) | (j7() == 5)) ^ (i5() >= 2)[:, None],
    "bools as numbers": lambda: (i5()[:, None] > j7()) * 2.5 + (j7() > 2).float(),
    "bools multiplied": lambda: (i5()[:, None] > j7()) * (j7() > 2),
    "bools compared": lambda: (i5()[:, None] > j7()) == (j7() > 2),
    "rounding": lambda: torch.full((2,), -1e30).to(torch.float16),
    "literal": lambda: j7() * T(3),
    "slices assigned": lambda: assigned(torch.zeros(3, 5)),
    "masks assigned": lambda: refilled(torch.tril(torch.ones(3, 4))),
}


@pytest.mark.parametrize("name", READ)
def test_every_element_is_what_the_tensor_holds(name: str) -> None:
    node, want = result(trace(READ[name])), READ[name]()
    reader, indices, value = read(node)
    assert not reader.loads, [load.reason for load in reader.loads.values()]
    for places in itertools.product(*map(range, want.shape)):
        assert number(value, dict(zip(indices, places, strict=True))) == float(want[places]), places


def loaded(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[str, int]:
    """The node and the epoch that the one element of the result is loaded from."""
    reader, _, value = read(result(trace(function, *inputs)))
    if isinstance(value, Truth):
        return value.load.node.name, value.load.epoch
    (load,) = (reader.loads[symbol] for symbol in value.free_symbols & reader.loads.keys())
    return load.node.name, load.epoch


def test_inputs_and_unknown_operators_stay_loads() -> None:
    x = torch.ones(5, dtype=torch.long)
    assert loaded(lambda x: x[2:] + 1, x) == ("x_1", 0)
    assert loaded(lambda x: x.cumsum(0) * 2, x) == ("cumsum", 0)
    assert loaded(lambda x: x.sort()[0], x)[0] == "getitem"
    assert loaded(lambda x: torch.arange(5)[x], x)[0] == "index"  # may wrap around
    assert loaded(lambda x: x * 0.1, x)[0] == "mul"  # rounds
    assert loaded(lambda x: torch.arange(5) * 0.1, x)[0] == "mul"
    assert loaded(lambda x: torch.arange(300).to(torch.bfloat16) + 0, x)[0] == "to"


def test_running_sums_are_of_equal_numbers_only() -> None:
    assert loaded(lambda: (torch.arange(6) == 5).cumsum(0)[5:] + 0)[0] == "cumsum"
    assert loaded(lambda: (torch.arange(6) < 3).cumsum(0)[4:] + 0)[0] == "cumsum"


def test_loads_count_the_writes_before() -> None:
    def before(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        x.add_(1)
        return y

    def after(x: torch.Tensor) -> torch.Tensor:
        view = x[1:]
        torch.cumsum(x, 0, out=x)
        return view + 1

    def through_view(x: torch.Tensor) -> torch.Tensor:
        x.view(-1).index_copy_(0, torch.tensor([0]), torch.tensor([3]))
        return x + 0

    x = torch.zeros(5, dtype=torch.long)
    assert loaded(before, x) == ("x_1", 0)
    assert loaded(after, x)[1] == 1
    assert loaded(through_view, x)[1] == 1


def test_an_input_that_grows_is_read_as_it_was() -> None:
    def grows(x: torch.Tensor) -> torch.Tensor:
        x.add_(3)
        y = torch.arange(4) + x
        x.add_(4)
        return y

    reader, (k,), value = read(result(trace(grows, torch.tensor(2))))
    ((symbol, load),) = reader.loads.items()
    assert value == k + symbol + 3
    assert load.epoch == 0


def test_memory_that_may_be_shared_is_not_guessed() -> None:
    def shared(x: torch.Tensor) -> torch.Tensor:
        same = x.reshape(-1)
        x.fill_(1.0)
        return same + 0

    assert loaded(shared, torch.zeros(3, 2).t())[0] == "reshape"


def test_reading_is_linear_in_shared_nodes() -> None:
    def doubled() -> torch.Tensor:
        x = torch.arange(8)
        for _ in range(40):
            x = x + x - x
        return x

    _, (k,), value = read(result(trace(doubled)))
    assert value == k


def test_arguments_out_of_the_ordinary_are_loads() -> None:
    gm = trace(lambda: torch.arange(6).view(2, 3))
    node = result(gm)
    node.args = ("nothing", [2, 3])
    reader, _, _ = read(node)
    ((_, load),) = reader.loads.items()
    assert load.reason == "could not be read as view: AttributeError"
