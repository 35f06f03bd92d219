"""What `latent bench` shows: a table, and bars."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ...kernels.machine import Machine
from ..units import error_text, plural, size_text
from .bench import Bench, PhaseResult
from .console import aligned
from .targets import TargetError

__all__ = ["import_matplotlib", "plot", "render"]


def render(result: Bench) -> str:
    """The table."""
    head = f"{result.target} · {result.dtype} · {result.device} · {plural(result.threads, 'thread')}"
    lines = [head, *(f"  {note}" for note in result.notes)]
    lines.append(f"  the device reaches {result.machine}")
    for phase in result.phases:
        lines += ["", *_phase(phase, result.machine)]
    return "\n".join(lines)


def _phase(phase: PhaseResult, machine: Machine) -> list[str]:
    bound = phase.least.seconds(machine) if phase.least else None
    heads = ("", "median", "min – max", f"vs {phase.results[0].name}", "roofline", "compile", "peak", "differs")
    rows = [heads]
    base = phase.results[0].times.median
    for r in phase.results:
        spread = f"{_ms(r.times.least)} – {_ms(r.times.most)}"
        compiling = "–" if r.compile_seconds is None else f"{r.compile_seconds:.1f} s"
        differs = "–" if r is phase.results[0] else error_text(r.error)
        share = "–" if bound is None else f"{100 * bound / r.times.median:.0f} %"
        faster = f"{base / r.times.median:.2f}×"
        rows.append(
            (r.name, f"{_ms(r.times.median)} ms", spread, faster, share, compiling, size_text(r.peak_bytes), differs)
        )
    title = phase.title
    if phase.least and bound is not None:
        title += f" · at least {size_text(phase.least.bytes)} and {phase.least.flops / 1e9:.3g} GFLOP: {_ms(bound)} ms"
    lines = [title, "─" * len(title)]
    lines += aligned(rows)
    caches = {r.cache_bytes_per_token for r in phase.results} - {None}
    if caches:
        sizes = ", ".join(f"{value:,.0f}".replace(",", " ") for value in sorted(c for c in caches if c is not None))
        lines.append(f"  the cache holds {sizes} bytes per token")
    return lines


def plot(result: Bench, path: Path) -> None:
    """A bar per contestant and phase, with its range and the roofline's time. Raises TargetError."""
    plt = import_matplotlib()
    figure, panels = plt.subplots(1, len(result.phases), figsize=(4.2 * len(result.phases), 3.4), squeeze=False)
    colours = {"eager": "#9aa0a6", "inductor": "#5b8def", "latent": "#1e9e6a"}
    for panel, phase in zip(panels[0], result.phases, strict=True):
        for r in phase.results:
            below, above = r.times.median - r.times.least, r.times.most - r.times.median
            panel.bar(
                r.name,
                1e3 * r.times.median,
                yerr=[[1e3 * below], [1e3 * above]],
                color=colours.get(r.name, "#888888"),
                capsize=4,
            )
        if phase.least:
            bound = 1e3 * phase.least.seconds(result.machine)
            panel.axhline(bound, color="black", linewidth=1, linestyle="--", label="roofline")
            panel.legend(frameon=False)
        panel.set_title(" ".join(phase.title.split()), fontsize=9)
        panel.set_ylabel("ms, median and range")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result.target} · {result.dtype} · {plural(result.threads, 'thread')}", fontsize=10)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise TargetError(
            f"--plot {path}: {error}", "Name a .png, .svg or .pdf file in a folder that exists."
        ) from error
    finally:
        plt.close(figure)


def import_matplotlib(option: str = "--plot") -> Any:
    """pyplot without a window, or a TargetError that names what to install."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise TargetError(
            f"{option} needs matplotlib, which cannot be imported: {error}.",
            'Install it with: pip install "torch-latent[report]"',
        ) from error


def _ms(seconds: float) -> str:
    """Milliseconds with three digits or all before the point."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
