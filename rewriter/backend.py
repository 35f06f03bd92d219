"""The way of a graph: capture, normal form, recognise, rewrite (with certificates), lower, hoist, inductor.

`torch.compile(model, backend="latent")` calls `latent`. Whatever fails on the way costs one warning that names the
stage, and the untouched graph goes to inductor.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx

from . import history
from .cache_key import is_cacheable, own_tag
from .capture import capture, untouched_copy
from .compat import (
    DYNAMO_CONTROL_FLOW,
    cache_tag,
    compile_id,
    hand_to_inductor,
    list_mode_options,
    recompile_reason,
    reset_with_dynamo,
    size_hints,
)
from .dump import Recorded, recorded_of, trace_artifacts, wants_stages, write_recorded
from .expect import check_expectations
from .head_pictures import known_buffers
from .lower import lower
from .mutations import Mutations
from .normal_form import Contract, check_normal_form, normalise, remove_dead_code
from .opening import decompositions
from .options import ExpectationFailed, OptionError, Options, read_options
from .prologue import hoist
from .recognise import recognise
from .regions import Regions
from .report import GraphReport, report_miss, report_site, why_again
from .rewrite import rewrite_graph
from .stages.record import Recorder

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
STAGES = ("capture", "normal form", "recognise", "rewrite", "lower", "hoist", "inductor")
NOT_OURS: tuple[type[BaseException], ...] = (*DYNAMO_CONTROL_FLOW, ExpectationFailed, OptionError)
"""What passes through: Dynamo's control flow, and errors that are the user's to read."""

_numbers = itertools.count()


class StageFailed(RuntimeError):
    """A stage raised; `__cause__` is what it raised."""

    def __init__(self, stage: str, error: BaseException) -> None:
        super().__init__(f"stage {stage!r} failed: {type(error).__name__}: {error}")
        self.stage = stage


def latent(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend. Raises OptionError for a bad option and ExpectationFailed for a broken contract, else nothing."""
    chosen = read_options(options, mode)
    reset_with_dynamo(latent)
    spare = gm
    try:
        spare = untouched_copy(gm)
        return compile_graph(gm, example_inputs, chosen)
    except NOT_OURS:
        raise
    except Exception as error:
        if chosen.strict:
            raise
        log.warning("latent: %s; the graph is compiled untouched by inductor", error)
        failed = GraphReport(_name(), len(spare.graph.nodes), (), (), (), failure=failure_text(error))
        history.remember(failed)
        check_expectations(failed, chosen.expect)
        return finish(spare, example_inputs, chosen)


latent.reset = history.forget  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Compiled:
    """All stages in order. Raises StageFailed."""
    seconds: dict[str, float] = {}
    graph_module, report = transform(gm, example_inputs, options, seconds)
    check_expectations(report, options.expect)
    compiled = compile_transformed(graph_module, example_inputs, options, seconds)
    history.remember(report)
    return compiled


def compile_transformed(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, seconds: dict[str, float]
) -> Compiled:
    """What comes after the rewrites: work on weights is hoisted, the rest compiled. Raises StageFailed."""
    with stage("hoist", seconds):
        hoisted = hoist(gm, example_inputs)
    with stage("inductor", {}):
        return hoisted.wrap(finish(hoisted.gm, [*example_inputs, *hoisted.extra_inputs], options))


def transform(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    seconds: dict[str, float],
    keep: Callable[[Recorded], None] | None = None,
    bodies: bool = False,
    regions: dict[str, Regions] | None = None,
) -> tuple[fx.GraphModule, GraphReport]:
    """From Dynamo's graph to plain ATen with every rewrite applied, and the report about it. Raises StageFailed.

    `keep` is given all stages. With `bodies` the operators that rewrites put in become their own definitions and no
    kernels. `regions` receives what is replaced and by what, by the certificate's name.
    """
    name = _name()
    recorder = None
    with beside(options):
        recorder = Recorder(name, example_inputs) if keep or wants_stages(options) else None

    def record(stage: str, gm: fx.GraphModule) -> None:
        if recorder is not None:
            with beside(options):
                recorder.add(stage, gm)

    with stage("capture", seconds):
        captured = capture(gm, example_inputs, decompositions())
        contract = Contract.of(captured)
    record("captured", captured)
    with stage("normal form", seconds):
        normal = normalise(captured)
        check_normal_form(normal, contract)
    record("normal_form", normal)
    with stage("recognise", seconds):
        found = recognise(normal.graph)
        writes = Mutations.of(normal.graph)
        hints = size_hints(normal.graph.nodes)
        buffers = known_buffers(normal.graph, example_inputs, writes)
        sites = tuple(report_site(i, site, writes, hints, buffers) for i, site in enumerate(found.sites))
        misses = tuple(report_miss(miss) for miss in found.misses)
    with stage("rewrite", seconds):
        done = rewrite_graph(normal.graph, found.sites, options, hints, regions)
        remove_dead_code(normal)
        check_normal_form(normal, contract)
    record("rewritten", normal)
    with stage("lower", seconds):
        lowered = lower(normal, bodies)
        remove_dead_code(normal)
    record("lowered", normal)
    report = GraphReport(
        name,
        len(gm.graph.nodes),
        sites,
        done.verdicts,
        misses,
        tuple(f"{entry.operator} → {entry.reason}" for entry in lowered),
        len(done.certificates),
        seconds,
        done.seconds,
        again=why_again(recompile_reason()),
    )
    with beside(options):
        trace_artifacts(report)
        if recorder is not None:
            recorded = recorded_of(recorder, normal, report, done, options)
            keep(recorded) if keep else write_recorded(recorded, options)
    return normal, report


def finish(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Compiled:
    """Hand a graph to inductor, or run it as it is."""
    if options.inner == "eager":
        return gm.forward
    patches = {**list_mode_options(options.mode), **options.inductor}
    if not is_cacheable(gm):
        patches["fx_graph_cache"] = False
    with cache_tag(own_tag()):
        return hand_to_inductor(gm, example_inputs, patches)


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Time a stage and give its name to what it raises."""
    start = time.perf_counter()
    try:
        yield
    except NOT_OURS:
        raise
    except Exception as error:
        raise StageFailed(name, error) from error
    finally:
        seconds[name] = time.perf_counter() - start
        log.debug("%s: %.3f s", name, seconds[name])


@contextmanager
def beside(options: Options) -> Iterator[None]:
    """What is written for eyes and tools must not cost the rewrite: a failure is one warning."""
    try:
        yield
    except Exception as error:
        if options.strict:
            raise
        log.warning("latent: the dump could not be written: %s: %s", type(error).__name__, error)


def failure_text(error: Exception) -> str:
    """The stage and what it raised, for a report."""
    if isinstance(error, StageFailed):
        return f"{error.stage}: {type(error.__cause__).__name__}: {error.__cause__}"
    return f"backend: {type(error).__name__}: {error}"


def _name() -> str:
    """The compile id where torch has one ("0_0"), made unique."""
    return f"graph {next(_numbers)} [{compile_id() or '-'}]"
