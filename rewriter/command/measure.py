"""What a rewrite is worth on this machine: its region before and after, compiled as they would be, timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..units import plural
from .console import counted, err
from .timing import Call, take_turns

if TYPE_CHECKING:
    import torch
    from torch import fx

    from ..regions import Regions
    from ..rules import Timing

__all__ = ["measure"]

ROUNDS = 7


def measure(regions: Mapping[str, Regions]) -> dict[str, Timing]:
    """Time every region; one that cannot be compiled is named on stderr and left out."""
    timings: dict[str, Timing] = {}
    with counted("timing what was replaced and what replaces it", len(regions)) as tick:
        for name, each in regions.items():
            try:
                timings[name] = _timing(each)
            except Exception as error:  # the report is worth having without it
                first = f"{type(error).__name__}: {error}".splitlines()[0]
                err().print(f"{name.partition(' ')[0]} is not measured: {first}", style="latent.miss", markup=False)
            tick()
    return timings


def _timing(regions: Regions) -> Timing:
    import torch

    from ...kernels.machine import device_name
    from ..rules import Timing

    with torch.no_grad():
        sides = {"before": regions.before, "after": regions.after}
        calls = {name: Call(_compiled(gm, regions.inputs)) for name, gm in sides.items()}
        for call in calls.values():
            call()  # builds kernels
        times = take_turns(calls, ROUNDS)
    device = regions.inputs[0].device
    threads = f", {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    return Timing(times["before"].median, times["after"].median, device_name(device) + threads)


def _compiled(gm: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    """As the backend compiles it: lowered, without the work on weights alone, by inductor."""
    from ..backend import compile_transformed
    from ..lower import lower
    from ..options import Options

    lower(gm)
    run = compile_transformed(gm, inputs, Options(), {})
    return lambda: run(*inputs)
