"""`latent bench`: eager, inductor and latent side by side in one run, against what the device could do at best."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...kernels.machine import Machine, device_name, measure
from .console import counted, progress
from .steps import CacheKind, Step, cache_bytes_per_token, decode_step, forward_step, has_cache, prefill_step
from .targets import Target, TargetError
from .timing import Call, Times, first_call, peak_bytes, take_turns

__all__ = ["CONTESTANTS", "Bench", "BenchChoices", "PhaseResult", "Result", "bench", "run_phase"]

CONTESTANTS = ("eager", "inductor", "latent")


@dataclass(frozen=True)
class BenchChoices:
    """What is timed, and how."""

    phases: tuple[str, ...] = ("decode", "prefill")
    contestants: tuple[str, ...] = CONTESTANTS
    tokens: int = 128
    cached: int = 512
    cache: CacheKind = "static"
    dtype: str | None = None
    threads: int | None = None
    repeat: int = 15
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the latent backend."""


@dataclass(frozen=True)
class Result:
    """One contestant in one phase."""

    name: str
    times: Times
    compile_seconds: float | None
    peak_bytes: int
    cache_bytes_per_token: float | None
    error: float
    """Largest difference from the first contestant's output, relative to its largest element."""


@dataclass(frozen=True)
class Least:
    """The least that a step has to do: every weight and every cached number read once, 2 FLOP each time one is used."""

    bytes: float
    flops: float

    def seconds(self, machine: Machine) -> float:
        return max(self.bytes / machine.bandwidth_bytes_per_s, self.flops / machine.flops_per_s)


@dataclass(frozen=True)
class PhaseResult:
    """All contestants in one phase."""

    title: str
    results: tuple[Result, ...]
    least: Least | None


@dataclass(frozen=True)
class Bench:
    """What was measured."""

    target: str
    notes: tuple[str, ...]
    dtype: str
    threads: int
    device: str
    machine: Machine
    phases: tuple[PhaseResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, with the medians and the share of the roofline that the table shows."""
        data = asdict(self)
        for phase, plain in zip(self.phases, data["phases"], strict=True):
            bound = phase.least and phase.least.seconds(self.machine)
            for result, entry in zip(phase.results, plain["results"], strict=True):
                entry["seconds"] = list(entry.pop("times")["seconds"])
                entry["median"] = result.times.median
                entry["roofline_share"] = bound / result.times.median if bound else None
        return data


def bench(name: str, target: Target, choices: BenchChoices) -> Bench:
    """Measure a target. Raises TargetError."""
    import torch

    if choices.threads:
        torch.set_num_threads(choices.threads)
    target = _in_dtype(target, choices.dtype)
    dtype, device = _where(target)
    with torch.no_grad():
        with progress("measuring the device"):
            machine = measure(device, dtype)
        phases = [run_phase(target, step, choices) for step in _steps(target, choices)]
    text = str(dtype).removeprefix("torch.")
    notes = (*target.notes, *_disturbance())
    return Bench(name, notes, text, torch.get_num_threads(), device_name(device), machine, tuple(phases))


def run_phase(target: Target, step: Step, choices: BenchChoices) -> PhaseResult:
    """One phase: compile, compare, count memory, then let the contestants take turns."""
    import torch

    calls: dict[str, Call] = {}
    facts: dict[str, dict[str, Any]] = {}
    first: Any = None
    cache: Any = None
    phase = step.title.split()[0]
    for name in choices.contestants:
        call, cache = step.make(_contestant(name, target.model, choices))
        with progress(f"{phase}: {'first call' if name == 'eager' else 'compiling'}, {name}"):
            output, seconds = first_call(call)
            output = _leading_tensor(output)
            first = output.clone() if first is None and output is not None else first
            call()  # what is made at the second call, as work on weights alone, is no part of the times
            facts[name] = {
                "compile_seconds": None if name == "eager" else seconds,
                "peak_bytes": peak_bytes(call),
                "cache_bytes_per_token": None if cache is None else cache_bytes_per_token(cache),
                "error": _difference(first, output),
            }
        calls[name] = call
    with counted(f"{phase}: {choices.repeat} rounds", choices.repeat * len(calls)) as tick:
        times = take_turns(calls, choices.repeat, tick=tick)
    torch._dynamo.reset()  # the next phase compiles for itself
    results = tuple(Result(name=name, times=times[name], **facts[name]) for name in calls)
    return PhaseResult(step.title, results, _least(target, step, cache))


def _steps(target: Target, choices: BenchChoices) -> list[Step]:
    if not has_cache(target):
        return [forward_step(target)]
    made = {
        "decode": lambda: decode_step(target, choices.cached, choices.cache),
        "prefill": lambda: prefill_step(target, choices.tokens),
    }
    return [made[phase]() for phase in choices.phases]


def _contestant(name: str, model: Any, choices: BenchChoices) -> Any:
    """The model itself, or compiled for these very shapes: one call is repeated."""
    import torch

    if name == "eager":
        return model
    options = dict(choices.options) if name == "latent" and choices.options else None
    return torch.compile(model, backend=name, dynamic=False, options=options)


def _in_dtype(target: Target, dtype: str | None) -> Target:
    import torch

    if dtype is None:
        return target
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise TargetError(
            f"--dtype {dtype}: torch has no such floating-point type.", "Take float32, bfloat16 or float16."
        )
    if not isinstance(target.model, torch.nn.Module):
        raise TargetError(
            f"--dtype {dtype}: the model is a function, whose dtype is its arguments'.",
            "Leave it out, and make the arguments in that dtype.",
        )

    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(wanted) if floating else value

    args = tuple(cast(value) for value in target.args)
    kwargs = {name: cast(value) for name, value in target.kwargs.items()}
    return Target(target.model.to(wanted), args, kwargs, target.notes)


def _disturbance() -> list[str]:
    """A note if more ran in the last minute than this process."""
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    mine, cores = torch.get_num_threads(), os.cpu_count() or 1
    if load < 1.25 * cores or load < 1.5 * mine:
        return []
    return [f"other processes were running (load {load:.1f} on {cores} cores): ratios hold better than times"]


def _where(target: Target) -> tuple[Any, Any]:
    """The dtype and the device of most weights, else of the arguments."""
    import torch

    tensors: list[torch.Tensor] = list(target.model.parameters()) if isinstance(target.model, torch.nn.Module) else []
    values = [*target.args, *target.kwargs.values()]
    tensors = tensors or [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    if not tensors:
        return torch.float32, torch.device("cpu")
    largest = max(tensors, key=lambda t: t.numel())
    return largest.dtype, largest.device


def _leading_tensor(output: Any) -> Any:
    """The first tensor of what a model returns."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    items: Sequence[Any] = ()
    if isinstance(output, Mapping):
        items = tuple(output.values())
    elif isinstance(output, list | tuple):
        items = output
    return next((found for item in items if (found := _leading_tensor(item)) is not None), None)


def _difference(first: Any, output: Any) -> float:
    if first is None or output is None or first.shape != output.shape:
        return float("nan")
    scale = first.abs().max().double().clamp(min=1e-30)
    return float((first.double() - output.double()).abs().max() / scale)


def _least(target: Target, step: Step, cache: Any) -> Least | None:
    """The least work of a step of a dense language model; None for others, of which less is known."""
    config = getattr(target.model, "config", None)
    if not step.queries or config is None:
        return None
    text = config.get_text_config()
    if any("experts" in name for name, _ in target.model.named_parameters()):
        return None  # a router decides which weights are read
    used = {id(p): p for p in target.model.parameters()}
    looked_up = target.model.get_input_embeddings().weight
    head = target.model.get_output_embeddings()
    if head is None or head.weight is not looked_up:
        used.pop(id(looked_up), None)
    on_head = head.weight.numel() if head is not None else 0
    weights = sum(p.numel() for p in used.values())
    read = sum(p.nbytes for p in used.values())
    flops = 2.0 * (step.queries * (weights - on_head) + on_head)
    if cache is not None:
        for layer in cache.layers:
            numbers = layer.keys[0].numel() + layer.values[0].numel()
            sharing = text.num_attention_heads / layer.keys.shape[1]
            flops += 2.0 * step.queries * sharing * numbers
            read += numbers * layer.keys.element_size()
    return Least(read, flops)
