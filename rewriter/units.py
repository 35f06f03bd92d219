"""Numbers for readers."""

from __future__ import annotations

__all__ = ["error_text", "flops_text", "less", "number_text", "plural", "seconds_text", "size_text", "times_text"]


def size_text(value: float) -> str:
    """Bytes with three digits: 14.2 kB."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def flops_text(value: float) -> str:
    """Operations: 1.23 GFLOP."""
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def seconds_text(value: float) -> str:
    """Seconds with three digits: 81.2 µs."""
    for unit in ("ns", "µs", "ms"):
        if value * 1e9 < 999.5:
            return f"{value * 1e9:.3g} {unit}"
        value /= 1000
    return f"{value * 1e9:.3g} s"


def times_text(ratio: float) -> str:
    """How much faster: 1.4 × as fast."""
    return f"{ratio:.1f} × as fast" if ratio < 10 else f"{ratio:.0f} × as fast"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {units[-1]}"


def error_text(value: float) -> str:
    """A relative error: 2e-16, or 0."""
    return f"{value:.0e}" if value else "0"


def less(before: float, after: float) -> str:
    """The change in words of a table: −61 %."""
    if before == 0 or before == after:
        return "±0 %"
    change = round(100 * (after / before - 1))
    return f"{'+' if change > 0 else '−'}{abs(change)} %"


def plural(value: int, noun: str) -> str:
    """1 graph, 2 graphs."""
    return f"{value} {noun}" if value == 1 else f"{value} {noun}s"


def number_text(value: int) -> str:
    """With thin spaces between thousands."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
