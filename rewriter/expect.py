"""The match-count contract: `expect={"attention": 30}`."""

from __future__ import annotations

from collections.abc import Mapping

from .options import ExpectationFailed
from .report import GraphReport, render


def check_expectations(report: GraphReport, expect: Mapping[str, int]) -> None:
    """Raise ExpectationFailed when a graph with attention or near misses counts less than expected."""
    if not (report.sites or report.near_misses or report.failure):
        return
    short = [
        f"{name}: expected {count}, found {report.count(name)}"
        for name, count in expect.items()
        if report.count(name) < count
    ]
    if short:
        raise ExpectationFailed("; ".join(short) + "\n\n" + render(report))
