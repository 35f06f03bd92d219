"""`latent.explain`: what the backend would do with a model, found by one call of it, changing nothing.

    report = latent.explain(model)(*args, **kwargs)
    latent.check(model, expect={"attention": 30})(*args, **kwargs)      # raises ExpectationFailed

Every stage runs as in the backend, on copies; what is executed is the untouched graph, eagerly. Parameters, buffers,
the random state and Dynamo's caches are afterwards what they were before. The call itself is a real one: a cache that
is given to it is written to.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from .backend import StageFailed, failure_text, transform
from .compat import compile_id
from .dump import Recorded
from .options import ExpectationFailed, Options, Verify, read_options
from .quiet import call_of, graph_breaks, quiet_compiler
from .regions import Regions
from .report import Break, GraphReport, Report

__all__ = ["call_through", "check", "explain", "owner_of", "record", "unchanged"]

Explained = Callable[..., Report]


def explain(
    model: Callable[..., Any],
    *,
    rewrites: str | Sequence[str] | None = None,
    verify: Verify = "fast",
    dynamic: bool | None = None,
) -> Explained:
    """Call the result as the model, and get a Report instead of the output.

    `model` is a module, a function, or a method of a module that calls it (`latent.explain(model.generate)`);
    `rewrites` and `verify` are the backend's options, `dynamic` is that of torch.compile. Raises OptionError here, and
    in the call what the model itself raises.
    """
    look = record(model, rewrites=rewrites, verify=verify, dynamic=dynamic, stages=False)
    return lambda *args, **kwargs: look(*args, **kwargs)[0]


def record(
    model: Callable[..., Any],
    *,
    rewrites: str | Sequence[str] | None = None,
    verify: Verify = "fast",
    dynamic: bool | None = None,
    stages: bool = True,
    inputs: bool = False,
    regions: dict[str, Regions] | None = None,
) -> Callable[..., tuple[Report, tuple[Recorded, ...]]]:
    """As `explain`, and gives every stage of every graph with the report; with `inputs`, copies of the inputs too.

    `regions` receives what is replaced and by what, by the names of the certificates.
    """
    options = read_options({"rewrites": rewrites, "verify": verify})

    def run(*args: Any, **kwargs: Any) -> tuple[Report, tuple[Recorded, ...]]:
        collector = _Collector(options, stages, inputs, regions)
        _, breaks = call_through(model, collector, dynamic, args, kwargs)
        return Report(tuple(collector.graphs.values()), breaks), tuple(collector.recorded.values())

    return run


def check(
    model: Callable[..., Any],
    expect: Mapping[str, int],
    *,
    rewrites: str | Sequence[str] | None = None,
    verify: Verify = "fast",
    dynamic: bool | None = None,
) -> Explained:
    """As `explain`, and raises ExpectationFailed with the whole report when there is less than expected.

    `expect` gives least counts: "attention" for sites, else the name of a rewrite. They hold for every compilation of
    the model (prefill as well as decode), summed over the pieces between graph breaks.
    """
    read_options({"expect": expect})
    look = explain(model, rewrites=rewrites, verify=verify, dynamic=dynamic)

    def run(*args: Any, **kwargs: Any) -> Report:
        report = look(*args, **kwargs)
        if short := report.shortfall(expect):
            raise ExpectationFailed("; ".join(short) + f"\n\n{report}")
        return report

    return run


def call_through(
    model: Callable[..., Any],
    backend: Callable[..., Any],
    dynamic: bool | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Any, tuple[Break, ...]]:
    """One call of a model whose graphs go to `backend`, of which nothing stays: its output, and the graph breaks."""
    model = _original(model)
    owner = owner_of(model)
    with quiet_compiler(backend, dynamic) as compiler, unchanged(owner):
        if owner is None:
            output = compiler(model)(*args, **kwargs)
        else:
            with _calls_go_to(owner, compiler(call_of(owner))):
                output = model(*args, **kwargs)
        breaks = tuple(Break(reason, str(line or ""), line.code if line else "") for reason, line in graph_breaks())
    return output, breaks


class _Collector:
    """A backend that keeps a report of each compilation and runs the graph as it is."""

    def __init__(self, options: Options, stages: bool, inputs: bool, regions: dict[str, Regions] | None) -> None:
        self.options, self.stages, self.inputs, self.regions = options, stages, inputs, regions
        self.recorded: dict[str, Recorded] = {}
        self.graphs: dict[str, GraphReport] = {}
        """By compile id: a compilation that Dynamo starts again replaces its first attempt."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        identity = compile_id() or f"-{len(self.graphs)}"
        number = list(self.graphs).index(identity) if identity in self.graphs else len(self.graphs)
        name = f"graph {number} [{identity}]"

        def keep(recorded: Recorded) -> None:
            named = recorded.named(name)
            self.recorded[identity] = named.with_copied_inputs() if self.inputs else named

        try:
            given = keep if self.stages else None
            _, report = transform(gm, example_inputs, self.options, {}, given, regions=self.regions)
        except StageFailed as error:
            failure = failure_text(error)
            report = GraphReport("", len(gm.graph.nodes), (), (), (), failure=failure)
        self.graphs[identity] = dataclasses.replace(report, name=name)
        return gm.forward


# ** whose calls are looked at **


def _original(model: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` was given, when it was given something."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    model = getattr(model, "_torchdynamo_orig_callable", model)
    owner = owner_of(model)
    return owner if owner is not None and getattr(model, "__name__", "") == "forward" else model


def owner_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module whose calls are compiled; None for a plain function."""
    if isinstance(model, nn.Module):
        return model
    owner = getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@contextlib.contextmanager
def _calls_go_to(module: nn.Module, compiled: Callable[..., Any]) -> Iterator[None]:
    """What `module.compile()` does, until the block ends."""
    missing = object()
    before = module.__dict__.get("_compiled_call_impl", missing)
    module.__dict__["_compiled_call_impl"] = compiled
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__["_compiled_call_impl"]
        else:
            module.__dict__["_compiled_call_impl"] = before


@contextlib.contextmanager
def unchanged(module: nn.Module | None) -> Iterator[None]:
    """Buffers of the module and the random state are put back."""
    buffers = list(module.buffers()) if module is not None else []
    kept = [(b, b._version, b.detach().clone()) for b in buffers if not (b.is_inference() or b.is_meta)]
    with torch.random.fork_rng(devices=_accelerators(buffers, module)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, version, value in kept:
                    if buffer._version != version:
                        buffer.copy_(value)


def _accelerators(buffers: Sequence[torch.Tensor], module: nn.Module | None) -> list[int]:
    tensors = [*buffers, *(module.parameters() if module is not None else ())]
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
