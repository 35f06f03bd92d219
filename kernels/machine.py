"""The two sides of the roofline of a device, measured: how fast it moves bytes and how fast it multiplies matrices."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..rewriter.autocast import without_autocast
from . import store
from .spec import digest

__all__ = ["Machine", "device_name", "fast_dtype", "measure", "quick"]

Run = Callable[[], object]


@dataclass(frozen=True)
class Machine:
    """What a device reaches in one dtype with one number of threads."""

    bandwidth_bytes_per_s: float
    flops_per_s: float

    @property
    def ridge(self) -> float:
        """FLOP per byte from which arithmetic is the limit."""
        return self.flops_per_s / self.bandwidth_bytes_per_s

    def __str__(self) -> str:
        gigabytes, gigaflops = self.bandwidth_bytes_per_s / 1e9, self.flops_per_s / 1e9
        return f"{gigabytes:.3g} GB/s, {gigaflops:.3g} GFLOP/s, ridge {self.ridge:.2g} FLOP/byte"


def measure(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    copied: int = 256 << 20,
    width: int = 2048,
    rounds: int = 7,
    budget: float = 4.0,
) -> Machine:
    """Measure now: a copy of `copied` bytes, read and written, and a product of two `width`² matrices.

    The roofline is what the device can reach, so the fastest round counts: a median would also measure whoever shares
    the device. The product has the layout of a linear layer. A side that would take more than half of `budget` seconds
    is measured on less: a bfloat16 product in software is a hundred times slower than one in hardware.
    """
    return _measure(torch.device(device), dtype, copied, width, rounds, budget)[0]


def _measure(
    device: torch.device, dtype: torch.dtype, copied: int, width: int, rounds: int, budget: float
) -> tuple[Machine, bool]:
    """The machine, and whether it was left alone: no side's median is far from its fastest round."""
    with torch.no_grad(), without_autocast(device.type):
        size, copying = _largest(lambda n: _copy(n, dtype, device), copied, 1, device, rounds, budget / 2)
        side, multiplying = _largest(lambda n: _product(n, dtype, device), width, 3, device, rounds, budget / 2)
    # The load counts this process as well. A core that is always taken slows every round alike, and no median tells.
    quiet = device.type != "cpu" or os.getloadavg()[0] < torch.get_num_threads() / 2 + 1
    for times in (copying, multiplying):
        quiet = quiet and len(times) > 2 and statistics.median(times) < 1.3 * min(times)
    return Machine(2 * size / min(copying), 2 * side**3 / min(multiplying)), quiet


@functools.cache
def quick(device: str, dtype: torch.dtype, cache: Path | None = None) -> Machine:
    """A measurement of about 0.3 s, kept on disk by device, dtype, torch and number of threads.

    One that others disturbed is kept in this process only.
    """
    what = (device_name(device), str(dtype), torch.__version__, str(torch.get_num_threads()))
    file = (cache or store.folder("machine")) / f"{digest(chr(10).join(what))}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Machine(kept["bandwidth_bytes_per_s"], kept["flops_per_s"])
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
        copied, width = (128 << 20, 768) if torch.device(device).type == "cpu" else (256 << 20, 4096)
        machine, quiet = _measure(torch.device(device), dtype, copied, width, rounds=15, budget=0.3)
        if quiet:
            store.write(file, json.dumps({"measured": what, **asdict(machine)}))
        return machine


def fast_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where the device's matrix library takes longer for `dtype` (CPUs without such products)."""
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if quick(device, dtype).flops_per_s > quick(device, torch.float32).flops_per_s else torch.float32


def device_name(device: torch.device | str) -> str:
    """The model of a device, as it calls itself."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def _copy(size: int, dtype: torch.dtype, device: torch.device) -> Run:
    source = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(width: int, dtype: torch.dtype, device: torch.device) -> Run:
    generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay as they are
    rows, weight = (torch.randn(width, width, device=device, generator=generator).to(dtype) for _ in range(2))
    return lambda: torch.nn.functional.linear(rows, weight)


def _largest(
    make: Callable[[int], Run], size: int, power: int, device: torch.device, rounds: int, budget: float
) -> tuple[int, list[float]]:
    """The largest of size, size/2, size/4, ... whose rounds fit into `budget` seconds, and their seconds.

    Approached from an eighth of the work or less: a run of twice the size takes 2^power times as long.
    """
    began = time.perf_counter()
    tried = size >> 3
    while True:
        run = make(tried)
        _seconds(run, device)  # memory is mapped, libraries are loaded
        first = _seconds(run, device)
        left = budget - (time.perf_counter() - began)
        if tried >= size or first * 2**power * 6 > left:
            break
        tried *= 2
    times = [first]
    while len(times) < rounds and time.perf_counter() - began < budget:
        times.append(_seconds(run, device))
    return tried, times


def _seconds(run: Run, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
