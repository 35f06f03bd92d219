"""What `explain` and `report` show: one call of a model, or what a dump's folder says of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .common import HFChoices, import_torch, load
from .console import progress
from .measure import measure as timings_of
from .targets import TargetError

if TYPE_CHECKING:
    from ..options import Verify
    from ..page.reading import Material
    from ..regions import Regions

__all__ = ["looked_at", "read"]


def looked_at(
    target: str,
    *,
    rewrites: Sequence[str] | None,
    verify: Verify = "fast",
    dynamic: bool,
    measure: bool,
    choices: HFChoices,
    stages: bool,
) -> Material:
    """Look at a model or read a dump; with `stages`, every stage of every graph is kept. Raises TargetError."""
    if (material := read(target)) is not None:
        if measure or dynamic or rewrites or not choices.is_plain:
            raise TargetError(
                f"{target}: a dump is of a call that is over; options that choose another do not apply to it.",
                f"Give the model itself: {material.run.target}",
            )
        return material
    found = load(target, choices)
    import torch

    from ..environment import Run, environment
    from ..explain import record
    from ..page.reading import of_recorded

    regions: dict[str, Regions] | None = {} if measure else None
    with progress("tracing and rewriting"), torch.no_grad():
        look = record(
            found.model, rewrites=rewrites, verify=verify, dynamic=dynamic or None, stages=stages, regions=regions
        )
        report, graphs = look(*found.args, **found.kwargs)
    notes = found.notes
    if regions:
        timings = timings_of(regions)
        devices = dict.fromkeys(timing.device for timing in timings.values())
        report, notes = report.timed(timings), (*notes, *(f"timed on {device}, random inputs" for device in devices))
    return of_recorded(report, graphs, Run(target, notes, environment()))


def read(target: str) -> Material | None:
    """What the folder of a dump says; None for any other target. Raises TargetError."""
    import_torch()
    from ..page.reading import is_dump, read_dump

    if not is_dump(Path(target)):
        return None
    try:
        with progress(f"reading {target}"):
            return read_dump(Path(target))
    except (ValueError, OSError) as error:
        raise TargetError(f"{target} cannot be read: {error}.", "Write it again: `latent dump --out DIR`.") from error
