"""Whatever fails inside costs one warning that names the stage, and the model answers as before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import latent
import pytest
import torch
from latent.rewriter import backend
from latent.rewriter.compat import DYNAMO_CONTROL_FLOW, FakeTensorMode, trace_pre_dispatch
from latent.rewriter.registry import patterns
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

STAGES = (
    ("capture", "capture"),
    ("normal form", "normalise"),
    ("recognise", "recognise"),
    ("rewrite", "rewrite_graph"),
    ("lower", "lower"),
    ("hoist", "hoist"),
)
EACH_STAGE = pytest.mark.parametrize(("stage", "function"), STAGES, ids=[stage for stage, _ in STAGES])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    patterns("softmax")  # plug-ins that cannot be imported are reported once, when first asked for
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Two attentions, and a cache that is written between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 24, bias=False)
        self.scale = 0.3
        self.register_buffer("cache", torch.zeros(2, 5, 8))

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        return (query @ key.mT * self.scale).softmax(-1) @ value

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        self.cache.copy_(self.cache * 0.5 + x)
        return self.attend(x + self.cache)


def check(**options: Any) -> None:
    """Two calls give the results and leave the cache of eager."""
    ours, theirs = Model(), Model()
    compiled = torch.compile(ours, backend="latent", options={"inner": "eager", **options})
    with torch.no_grad():
        for seed in range(2):
            x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.cache, theirs.cache, rtol=1e-5, atol=1e-6)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("latent")]


def always(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("injected")


def first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[int] = []

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return always() if len(calls) == 1 else function(*args, **kwargs)

    return fails_once


def after_its_work(function: Callable[..., Any]) -> Callable[..., Any]:
    def fails_late(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        return always()

    return fails_late


# ** a fault in each stage **


def test_without_a_fault_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="latent"):
        check()
    assert warnings(caplog) == []
    assert latent.reports().count("fuse_attention") == 2
    assert [graph.failure for graph in latent.reports().graphs] == [""]


@EACH_STAGE
@pytest.mark.parametrize("late", [False, True], ids=["at once", "after its work"])
def test_fault_costs_one_warning_that_names_the_stage(
    stage: str, function: str, late: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, function, after_its_work(getattr(backend, function)) if late else always)
    with caplog.at_level(logging.WARNING, logger="latent"):
        check()
    (said,) = warnings(caplog)
    assert repr(stage) in said and "ZeroDivisionError: injected" in said
    (graph,) = latent.reports().graphs
    assert graph.failure.startswith(stage) and "injected" in graph.failure
    assert stage in str(latent.reports())


def test_fault_in_inductor_on_the_rewritten_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "hand_to_inductor", first_call(backend.hand_to_inductor))
    with caplog.at_level(logging.WARNING, logger="latent"):
        check(inner="inductor")
    (said,) = warnings(caplog)
    assert "'inductor'" in said and "injected" in said
    assert [bool(graph.failure) for graph in latent.reports().graphs].count(True) == 1


def test_fault_in_inductor_does_not_count_the_graph_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "hand_to_inductor", first_call(lambda gm, inputs, patches: gm.forward))
    check(inner="inductor")
    assert len(latent.reports().graphs) == 1
    assert latent.reports().count("fuse_attention") == 0, "the untouched graph runs"


@pytest.mark.parametrize("function", ["untouched_copy", "trace_artifacts", "wants_stages"])
def test_fault_beside_the_stages(
    function: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, function, always)
    with caplog.at_level(logging.WARNING, logger="latent"):
        check()
    (said,) = warnings(caplog)
    assert "injected" in said
    assert all("injected" in graph.failure for graph in latent.reports().graphs if graph.failure)


def test_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    taken = tmp_path / "a file"
    taken.write_text("not a folder")
    with caplog.at_level(logging.WARNING, logger="latent"):
        check(dump=str(taken))
    assert len(warnings(caplog)) == 1
    assert not any("None" in graph.failure for graph in latent.reports().graphs)


@EACH_STAGE
def test_fault_raises_when_strict(stage: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, function, always)
    with pytest.raises(BackendCompilerFailed, match=f"stage '{stage}' failed: ZeroDivisionError: injected"):
        check(strict=True)


def test_fault_in_inductor_raises_when_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "hand_to_inductor", always)
    with pytest.raises(BackendCompilerFailed, match="stage 'inductor' failed"):
        check(strict=True, inner="inductor")


def test_model_with_gradients_survives_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "lower", after_its_work(backend.lower))
    results = []
    for compile_it in (False, True):
        model, x = Model(), torch.ones(2, 5, 8).cumsum(1) * 0.1
        attend = (
            torch.compile(model.attend, backend="latent", options={"inner": "eager"}) if compile_it else model.attend
        )
        attend(x).square().sum().backward()
        results.append(model.project.weight.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


# ** the contract **


def test_met_expectation_is_silent() -> None:
    check(expect={"attention": 2, "fuse_attention": 2})


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("name", ["attention", "fuse_attention"])
def test_broken_expectation_raises_with_the_report(name: str, strict: bool) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        check(expect={name: 3}, strict=strict)
    text = str(caught.value)
    assert f"{name}: expected 3, found 2" in text
    assert "sites" in text and "softmax_" in text and "test_robustness.py" in text, "the report is in the message"


def test_graph_without_softmax_owes_nothing() -> None:
    compiled = torch.compile(
        lambda x: x.sin(), backend="latent", options={"inner": "eager", "expect": {"attention": 1}}
    )
    torch.testing.assert_close(compiled(torch.ones(3)), torch.ones(3).sin())


def test_expectation_is_not_met_by_a_graph_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "recognise", always)
    with pytest.raises(BackendCompilerFailed, match="attention: expected 2, found 0"):
        check(expect={"attention": 2})


# ** derivatives within the graph **


def _loss(x: Tensor) -> Tensor:
    return x.softmax(-1).square().sum()


DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": lambda x: torch.func.grad(_loss)(x),
    "jvp": lambda x: torch.func.jvp(_loss, (x,), (x,))[1],
    "vjp": lambda x: torch.func.vjp(_loss, x)[1](torch.ones(()))[0],
    "jacrev": lambda x: torch.func.jacrev(_loss)(x),
    "grad of vmap": lambda x: torch.func.grad(lambda y: torch.func.vmap(_loss)(y).sum())(x),
}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("name", DERIVATIVES)
@torch.no_grad()
def test_derivatives_in_a_graph_go_to_inductor_untouched(
    name: str, inner: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, logger="latent"):
        actual = torch.compile(DERIVATIVES[name], backend="latent", options={"inner": inner})(x)
    torch.testing.assert_close(actual, DERIVATIVES[name](x))
    (said,) = warnings(caplog)
    assert "torch.func takes a derivative in the graph" in said


@pytest.mark.parametrize("name", ["vmap of grad", "vmap of jvp"])
def test_derivatives_inside_vmap_are_opened_with_it(name: str, caplog: pytest.LogCaptureFixture) -> None:
    inner = DERIVATIVES[name.removeprefix("vmap of ")]
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, logger="latent"):
        actual = torch.compile(torch.func.vmap(inner), backend="latent", options={"inner": "eager"})(x)
    torch.testing.assert_close(actual, torch.func.vmap(inner)(x))
    assert warnings(caplog) == []


def test_a_trace_that_fails_half_way_leaves_no_level() -> None:
    def broken(x: Tensor) -> Tensor:
        torch._C._functorch._grad_increment_nesting()
        torch._C._functorch.set_inplace_requires_grad_allowed(True)
        torch._C._autograd._saved_tensors_hooks_disable("not within this trace")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trace_pre_dispatch(broken, [FakeTensorMode().from_tensor(torch.ones(2))])
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
    assert not torch._C._functorch.get_inplace_requires_grad_allowed()
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()


# ** Dynamo's control flow **


@pytest.mark.parametrize("signal", DYNAMO_CONTROL_FLOW, ids=lambda signal: signal.__name__)
@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("function", ["capture", "hoist", "hand_to_inductor"])
def test_control_flow_passes_through(
    signal: type[BaseException], function: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Signal(signal):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            Exception.__init__(self, "to Dynamo")

    def send(*args: Any, **kwargs: Any) -> Any:
        raise Signal

    monkeypatch.setattr(backend, function, send)
    graph = fx.symbolic_trace(lambda x: x.softmax(-1))
    with pytest.raises(Signal):
        backend.latent(graph, [torch.ones(2, 3)], options={"strict": strict})


class Scaled(nn.Module):
    """A float attribute: with dynamic=True inductor asks Dynamo to start over."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.37

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * self.scale).softmax(-1) @ value * self.scale


def random_tensors(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(2, 3, tokens, 8, generator=generator) for _ in range(3)]


def test_restart_of_inductor_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    compiled = torch.compile(Scaled(), backend="latent", dynamic=True)
    with caplog.at_level(logging.WARNING, logger="latent"), torch.no_grad():
        for tokens in (5, 9):
            torch.testing.assert_close(compiled(*random_tensors(tokens)), Scaled()(*random_tensors(tokens)))
    assert warnings(caplog) == []
    assert latent.reports().graphs[-1].count("fuse_attention") == 1


def test_float_that_changes_is_followed() -> None:
    model = Scaled()
    compiled = torch.compile(model, backend="latent", dynamic=True, options={"inner": "eager", "strict": True})
    with torch.no_grad():
        for model.scale in (0.37, 1.5, -0.2):
            torch.testing.assert_close(compiled(*random_tensors(5)), model(*random_tensors(5)))


# ** compile caches **


def test_same_results_with_caches_cold_and_warm() -> None:
    from torch._inductor.utils import fresh_cache

    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    results = []
    with fresh_cache(), torch.no_grad():
        for options in ({}, {}, {"rewrites": ()}, {}):
            torch._dynamo.reset()
            results.append(torch.compile(Model(), backend="latent", options={"strict": True, **options})(x))
            assert latent.reports().count("fuse_attention") == (0 if options else 2)
        expected = Model()(x)
    assert all(torch.equal(results[0], warm) for warm in (results[1], results[3]))
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
