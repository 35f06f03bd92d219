"""Work on weights runs once, and again whenever a weight changed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from latent.rewriter.capture import capture
from latent.rewriter.compat import WeightStates, hand_to_inductor
from latent.rewriter.normal_form import normalise, remove_dead_code
from latent.rewriter.prologue import Hoisted, hoist, invalidate
from torch import fx, nn

aten = torch.ops.aten


class Chain(nn.Module):
    """b(a(x)), which one product of the two weights can do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 3, bias=False), nn.Linear(3, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + 1


def merge_linears(gm: fx.GraphModule) -> None:
    """linear(linear(x, A), B) -> linear(x, B @ A)."""
    for node in list(gm.graph.nodes):
        if node.target is not aten.linear.default or node.args[0].target is not aten.linear.default:
            continue
        inner, graph = node.args[0], gm.graph
        with graph.inserting_before(node):
            merged = graph.call_function(aten.matmul.default, (node.args[1], inner.args[1]))
            merged.meta = dict(node.meta) | {"val": node.args[1].meta["val"] @ inner.args[1].meta["val"]}
            new = graph.call_function(aten.linear.default, (inner.args[0], merged))
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new, propagate_meta=False)
    remove_dead_code(gm)


class Backend:
    """Captures, merges, hoists; remembers what it made."""

    def __init__(self, inner: str = "eager", rewrite: Callable[[fx.GraphModule], None] = merge_linears) -> None:
        self.inner, self.rewrite, self.hoisted = inner, rewrite, []
        self.hoisted: list[Hoisted]

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graph = normalise(capture(gm, inputs))
        self.rewrite(graph)
        done = hoist(graph, inputs)
        self.hoisted.append(done)
        compiled = hand_to_inductor(done.gm, [*inputs, *done.extra_inputs]) if self.inner == "inductor" else graph
        return done.wrap(compiled)

    @property
    def runs(self) -> int:
        return sum(done.prologue.runs for done in self.hoisted if done.prologue)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled_chain(inner: str = "eager") -> tuple[Chain, Callable[..., Any], Backend, torch.Tensor]:
    model, backend = Chain(), Backend(inner)
    return model, torch.compile(model, backend=backend), backend, torch.randn(4, 6)


def right(model: nn.Module, run: Callable[..., Any], x: torch.Tensor) -> bool:
    return bool(torch.allclose(run(x), model(x), atol=1e-5))


# ** every row of the table of updates **


def _sgd(model: Chain) -> None:
    _step(model, torch.optim.SGD(model.parameters(), lr=0.5))


def _adamw(model: Chain, **options: Any) -> None:
    _step(model, torch.optim.AdamW(model.parameters(), lr=0.5, **options))


def _step(model: Chain, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _load(model: Chain) -> None:
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})


def _new_parameter(model: Chain) -> None:
    model.a.weight = nn.Parameter(torch.randn(3, 6))


def _data(model: Chain) -> None:
    model.a.weight.data = torch.randn(3, 6)


def _data_twice(model: Chain) -> None:
    """The second tensor may be given the address that the first assignment freed."""
    for _ in range(2):
        model.a.weight.data = torch.randn(3, 6)


SEEN: dict[str, Callable[[Chain], object]] = {
    "mul_": lambda m: m.a.weight.mul_(2),
    "copy_": lambda m: m.b.weight.copy_(torch.randn(5, 3)),
    "load_state_dict": _load,
    "detach().copy_": lambda m: m.a.weight.detach().copy_(torch.randn(3, 6)),
    "SGD": _sgd,
    "AdamW": _adamw,
    "AdamW foreach": lambda m: _adamw(m, foreach=True),
    "p.data = t": _data,
    "p.data = t, twice": _data_twice,
    "half().float()": lambda m: m.half().float(),
    "p.set_(t)": lambda m: m.a.weight.set_(torch.randn(3, 6)),
    "a new Parameter": _new_parameter,
}
UNSEEN: dict[str, Callable[[Chain], object]] = {
    "p.data.copy_": lambda m: m.a.weight.data.copy_(torch.randn(3, 6)),
    "p.data.mul_": lambda m: m.a.weight.data.mul_(3),
    "numpy": lambda m: m.a.weight.detach().numpy().fill(0.25),
    "AdamW fused": lambda m: _adamw(m, fused=True),
}


@pytest.mark.parametrize("update", SEEN)
@torch.no_grad()
def test_an_update_is_seen(update: str) -> None:
    model, run, backend, x = compiled_chain()
    assert right(model, run, x) and right(model, run, x)
    assert backend.runs == 1
    before = model(x)
    SEEN[update](model)
    assert not torch.allclose(before, model(x), atol=1e-6)
    assert right(model, run, x) and right(model, run, x)
    assert backend.runs == 2


@pytest.mark.parametrize("update", UNSEEN)
@torch.no_grad()
def test_an_unseen_update_is_healed_by_invalidate(update: str) -> None:
    model, run, backend, x = compiled_chain()
    assert right(model, run, x)
    UNSEEN[update](model)
    assert not right(model, run, x), "this hole has closed: move the update to SEEN"
    assert invalidate(model) == 1
    assert right(model, run, x)
    assert backend.runs == 2


@torch.no_grad()
def test_an_unseen_update_is_healed_by_a_later_visible_one() -> None:
    model, run, _, x = compiled_chain()
    run(x)
    model.a.weight.data.mul_(3)
    model.b.weight.mul_(1)
    assert right(model, run, x)


def test_inference_tensors_are_left_in_the_graph() -> None:
    with torch.inference_mode():
        model = Chain()
        backend = Backend()
        run, x = torch.compile(model, backend=backend), torch.randn(4, 6)
        assert right(model, run, x)
        model.a.weight.mul_(2)
        assert right(model, run, x)
    assert backend.runs == 0


def test_a_weight_that_becomes_an_inference_tensor_is_read_at_every_call() -> None:
    model, run, backend, x = compiled_chain()
    with torch.inference_mode():
        assert right(model, run, x)
        model.a.weight.mul_(2)
        assert right(model, run, x)
        assert backend.runs == 2
        states = WeightStates([torch.ones(2)])
    assert not states.still_hold([torch.ones(2)])


@torch.no_grad()
def test_a_change_of_form_makes_a_new_graph() -> None:
    model, run, backend, x = compiled_chain()
    assert right(model, run, x)
    model.a.weight.data, model.b.weight.data = torch.randn(2, 6), torch.randn(5, 2)
    assert right(model, run, x)
    assert len(backend.hoisted) == 2


# ** invalidate, addresses, lifetimes **


@torch.no_grad()
def test_invalidate_finds_only_the_models_own_graphs() -> None:
    (one, run_one, backend_one, x), (_, run_other, backend_other, _) = compiled_chain(), compiled_chain()
    run_one(x)
    run_other(x)
    assert invalidate(one) == 1
    assert invalidate(nn.Linear(2, 2)) == 0
    run_one(x)
    run_other(x)
    assert (backend_one.runs, backend_other.runs) == (2, 1)


@torch.no_grad()
def test_results_keep_their_address() -> None:
    model, run, backend, x = compiled_chain()
    run(x)
    prologue = backend.hoisted[0].prologue
    assert prologue is not None
    address = prologue.derived[0].data_ptr()
    model.a.weight.mul_(2)
    assert right(model, run, x)
    assert prologue.derived[0].data_ptr() == address
    run_again = backend.hoisted[0].wrap(backend.hoisted[0].gm)
    run_again.invalidate()
    model.a.weight.data.mul_(2)
    assert right(model, run, x)


@torch.no_grad()
def test_a_dropped_graph_is_forgotten() -> None:
    model, run, backend, x = compiled_chain()
    run(x)
    del run
    backend.hoisted.clear()
    torch._dynamo.reset()
    gc.collect()
    assert invalidate(model) == 0


# ** gradients **


def test_gradients_pass_and_nothing_moves() -> None:
    model, run, backend, x = compiled_chain("inductor")
    run(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-4, rtol=1e-4)
    assert backend.hoisted[0].prologue is None


def test_a_region_with_gradients_keeps_its_work() -> None:
    model = Chain()

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return model(x)

    backend = Backend()
    with torch.no_grad():
        assert torch.compile(run, backend=backend)(torch.randn(4, 6)).requires_grad
    assert backend.hoisted[0].prologue is None


def test_gradients_on_and_off_get_their_own_graphs() -> None:
    model, run, backend, x = compiled_chain()
    with torch.no_grad():
        assert right(model, run, x)
    run(x).sum().backward()
    assert model.a.weight.grad is not None
    _sgd(model)
    with torch.no_grad():
        assert right(model, run, x)
    assert backend.runs == 2


class HalfAngles(nn.Module):
    """Reads half of the angles that positions and a weight's copy make."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0, 1, 8, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = self.frequencies.float()[None, :] * positions[:, None]
        return x + torch.cat([angles, angles], -1)[:, :8].sum()


def test_results_have_fixed_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is no input that Dynamo knows, so it could not guard a symbol for its size."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what is cached makes no guards
    model = HalfAngles()
    compiled = torch.compile(model, backend=Backend("inductor", lambda _: None))
    with torch.no_grad():
        for count in (3, 4):
            x, positions = torch.randn(count, 4), torch.arange(count)
            torch.testing.assert_close(compiled(x, positions), model(x, positions))


@torch.no_grad()
def test_inductor_runs_the_hoisted_graph() -> None:
    model, run, backend, x = compiled_chain("inductor")
    assert right(model, run, x)
    _load(model)
    assert right(model, run, x)
    assert backend.runs == 2


# ** what moves **


class Owner(nn.Module):
    def __init__(self, body: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.register_buffer("state", torch.ones(4, 4))
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


def _autocast(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (m.w @ m.v).float() + x


def _written_buffer(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.state.add_(1)
    return x @ (m.state * m.state)


def _written_data(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.w.data.mul_(1.5)
    return x @ (m.w @ m.v)


def _data_written_elsewhere(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.w.data[0].mul_(1.5)
    torch._dynamo.graph_break()
    return x @ (m.w.data @ m.v)


STAYS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "a view": lambda m, x: x @ m.w.t()[:, :3],
    "random numbers": lambda m, x: x @ torch.rand_like(m.w),
    "dropout": lambda m, x: x @ nn.functional.dropout(m.w, 0.5, True),
    "growth": lambda m, x: x @ m.w.repeat(1, 3),
    "a returned result": lambda m, x: (x, m.w @ m.v),
    "a view of a returned result": lambda m, x: (x + (p := m.w @ m.v), p.t()),
    "a written buffer": _written_buffer,
    "a weight written through .data": _written_data,
    "a result that is written": lambda m, x: (m.w @ m.v).mul_(2).add_(x),
    "a work in a region of autocast": _autocast,
    "work on an input": lambda m, x: (x @ x) @ m.w,
}
MOVES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "a product": lambda m, x: x @ (m.w @ m.v),
    "a product behind a view": lambda m, x: x @ (m.w.t() @ m.v)[:, :2],
    "a product of data": lambda m, x: x @ (m.w.data @ m.v),
    "a chain": lambda m, x: x @ ((m.w + 1) @ (m.v * 2)).relu(),
    "a buffer": lambda m, x: x @ (m.state * 2),
    "constants of the program": lambda m, x: x + m.w * torch.full((4, 4), 2.0),
    "a broadcast result": lambda m, x: x + m.w.sum(0).expand(4, 4),
    "members of a list": lambda m, x: x[:, :2] + sum((m.w + 1).split(2, 1)),
    "what grows after it moved": lambda m, x: x @ (m.w + 1).repeat(1, 3),
}


@pytest.mark.parametrize("case", STAYS)
@torch.no_grad()
def test_stays(case: str) -> None:
    model, backend, x = Owner(STAYS[case]), Backend(rewrite=lambda gm: None), torch.randn(4, 4)
    got = torch.compile(model, backend=backend)(x)
    assert backend.hoisted[0].prologue is None
    if case not in ("random numbers", "dropout", "a written buffer", "a weight written through .data"):
        torch.testing.assert_close(got, model(x), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("case", MOVES)
@torch.no_grad()
def test_moves(case: str) -> None:
    model, backend, x = Owner(MOVES[case]), Backend(rewrite=lambda gm: None), torch.randn(4, 4)
    run = torch.compile(model, backend=backend)
    torch.testing.assert_close(run(x), model(x))
    assert len(backend.hoisted[0].extra_inputs) == 1
    for tensor in (model.w, model.v, model.state):
        tensor.mul_(1.5)
    torch.testing.assert_close(run(x), model(x))
    assert backend.runs == 2


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("body", [_written_data, _data_written_elsewhere])
@torch.no_grad()
def test_writes_of_graphs_through_data_are_followed(body: Callable[..., Any], inner: str) -> None:
    ours, theirs = Owner(body), Owner(body)
    theirs.load_state_dict(ours.state_dict())
    run = torch.compile(ours, backend=Backend(inner, rewrite=lambda gm: None))
    for x in torch.randn(4, 4, 4):
        torch.testing.assert_close(run(x), theirs(x))
    torch.testing.assert_close(ours.w, theirs.w)


def test_the_check_is_cheap() -> None:
    """Tens of microseconds for 200 weights; the bound leaves room for a busy machine."""
    import time

    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(200)]
    states = WeightStates(weights)
    best = 1.0
    for _ in range(50):
        start = time.perf_counter()
        assert states.still_hold(weights)
        best = min(best, time.perf_counter() - start)
    assert best < 200e-6
