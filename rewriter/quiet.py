"""Run Dynamo and leave no trace: what torch keeps about a compilation is put back when the block ends.

Beside `compat` the only file that reads what torch does not publish; every such line names the release it was written
for.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo import convert_frame, external_utils, pgo, utils  # 2.13
from torch._dynamo.guards import DeletedGuardManagerWrapper  # 2.13

from .provenance import SourceLine

Backend = Callable[..., Any]


@contextlib.contextmanager
def quiet_compiler(backend: Backend, dynamic: bool | None) -> Iterator[Callable[[Callable[..., Any]], Any]]:
    """Gives a `torch.compile` whose compilations live in this block only, and are numbered from [0/0]."""
    regions: list[int] = []

    def compile_here(function: Callable[..., Any]) -> Any:
        compiler: Any = torch.compile  # 2.13: its overloads for type checkers lack `isolate_recompiles`
        compiled = compiler(function, backend=backend, dynamic=dynamic, isolate_recompiles=True)
        regions.append(compiled._isolate_recompiles_id)  # 2.13
        return compiled

    with _dynamo_state_kept():
        try:
            yield compile_here
        finally:
            for region in regions:
                _forget_region(region)


def call_of(module: nn.Module) -> Callable[..., Any]:
    """What to compile for a module: its call, in a frame that Dynamo looks at where torch.nn defines `forward`."""
    if torch._dynamo.trace_rules.check(module.forward):  # 2.13: as `OptimizedModule` does
        wrapped: Callable[..., Any] = external_utils.wrap_inline(module._call_impl)  # 2.13
        return wrapped
    return module._call_impl


def graph_breaks() -> tuple[tuple[str, SourceLine | None], ...]:
    """The graph breaks of this block: the reason in one line, and the user's line. Read it inside the block."""
    return tuple((_headline(entry.reason), _innermost(entry.user_stack)) for entry in utils.graph_break_reasons)  # 2.13


@contextlib.contextmanager
def _dynamo_state_kept() -> Iterator[None]:
    """Dynamo's counters, break reasons, frame numbers and record of dynamic sizes: fresh inside, as before after."""
    counters = copy.deepcopy(utils.counters)  # 2.13, as all names below
    breaks, numbers = list(utils.graph_break_reasons), dict(convert_frame.FRAME_COMPILE_COUNTER)
    frame, sizes = convert_frame.FRAME_COUNTER, pgo._CODE_STATE
    utils.graph_break_reasons.clear()
    convert_frame.FRAME_COMPILE_COUNTER.clear()
    convert_frame.FRAME_COUNTER = 0
    pgo._CODE_STATE = defaultdict(pgo.CodeState)
    try:
        with torch._dynamo.config.patch(automatic_dynamic_local_pgo=False, automatic_dynamic_remote_pgo=False):
            yield
    finally:
        pgo._CODE_STATE = sizes
        convert_frame.FRAME_COUNTER = frame
        convert_frame.FRAME_COMPILE_COUNTER.clear()
        convert_frame.FRAME_COMPILE_COUNTER.update(numbers)
        utils.graph_break_reasons[:] = breaks
        utils.counters.clear()
        utils.counters.update(counters)


def _forget_region(region: int) -> None:
    """Drop the code compiled in one isolated region; what other regions compiled for the same functions stays.

    A function that only this region compiled is as before. Elsewhere an empty entry stays, which never matches.
    """
    frames = torch._C._dynamo.eval_frame  # 2.13, as all names below
    for reference in list(convert_frame.input_codes.seen):
        code = reference()
        entries = frames._get_cache_entries_for_region(code, region) if code is not None else []
        if code is None or not entries:
            continue
        if len(entries) == frames._get_total_cache_entry_count(code):
            frames.reset_code(code)
            continue
        for entry in entries:
            manager: Any = entry.guard_manager
            manager.extra_state.invalidate(entry, DeletedGuardManagerWrapper("latent.explain is done"))


def _headline(reason: str) -> str:
    lines = [line.strip() for line in reason.strip().splitlines() if line.strip()]
    explanation = next((line for line in lines if line.startswith("Explanation:")), "")
    text = lines[0] if lines else "no reason given"
    return f"{text}: {explanation.removeprefix('Explanation:').strip()}" if explanation else text


def _innermost(stack: Any) -> SourceLine | None:
    """The last frame of a user's stack."""
    for frame in reversed(list(stack or ())):
        return SourceLine(frame.filename, frame.lineno or 0, (frame.line or "").strip())
    return None
