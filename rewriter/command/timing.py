"""How long calls take side by side in one process, and how much memory one takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Call", "Times", "first_call", "peak_bytes", "take_turns"]


@dataclass(frozen=True)
class Call:
    """Something to time: `prepare` puts back what `run` changes, and is not timed."""

    run: Callable[[], Any]
    prepare: Callable[[], object] = lambda: None

    def __call__(self) -> Any:
        self.prepare()
        return self.run()


@dataclass(frozen=True)
class Times:
    """Seconds of the rounds, in their order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def most(self) -> float:
        return max(self.seconds)


def take_turns(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    warm: int = 1,
    turn: float = 0.1,
    budget: float = float("inf"),
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Time the calls in turn, so that whatever slows the machine down slows all of them.

    A turn is at least `turn` seconds of calls, one after the other as a program makes them; its median counts. The
    order moves on by one each round: nobody always runs behind the same other. No round begins after `budget` seconds,
    except for the first three.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    began = time.perf_counter()
    for number in range(-warm, rounds):
        if number >= 3 and time.perf_counter() - began > budget:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = _turn(calls[name], turn)
            if number >= 0:
                seconds[name].append(taken)
                tick()
    return {name: Times(tuple(taken)) for name, taken in seconds.items()}


def _turn(call: Call, least: float) -> float:
    """The median of as many calls as fit into `least` seconds, without the first, which finds others' caches."""
    taken = [_timed(call)]
    while sum(taken) < least:
        taken.append(_timed(call))
    return statistics.median(taken[1:] or taken)


def first_call(call: Call) -> tuple[Any, float]:
    """The result of a call and its seconds: for a compiled function, compilation included."""
    call.prepare()
    start = time.perf_counter()
    result = call.run()
    _wait()
    return result, time.perf_counter() - start


def peak_bytes(call: Call) -> int:
    """The most memory that a call holds at a time, beyond what was held before it.

    On a GPU the allocator counts. On a CPU torch's profiler reports every allocation and release of torch's allocator,
    and their running sum is followed. Unlike the process's resident set this is the same in every run, is not hidden by
    memory that the process holds already, and tells calls of one process apart; a library's private scratch memory is
    not in it. tracemalloc sees no tensor at all.
    """
    import torch

    call.prepare()
    if torch.cuda.is_available():
        _wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.run()
        _wait()
        on_gpu = torch.cuda.max_memory_allocated() - before
        if on_gpu > 0:
            return on_gpu
        call.prepare()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call.run()  # held until the profile ends
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    del result
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _timed(call: Call) -> float:
    call.prepare()
    _wait()
    start = time.perf_counter()
    call.run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
