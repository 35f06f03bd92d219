"""`python -m zoo.sweep [type ...]`: every causal language model type through the backend, with a table at the end.

--sdpa --bfloat16 --dynamic    the variant
--rest                         only the rows that are not perfect, after the run
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from latent.rewriter import history
from latent.rewriter.backend import latent
from latent.rewriter.report import Report
from torch import fx
from transformers.utils import logging as transformers_logging

from .build import Built, CannotBuild, build, causal_lm_types, first_tensor
from .count import count

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Row:
    """What became of one model type."""

    model_type: str
    expected: int = 0
    """Attentions that an eager forward executes."""
    found: int = 0
    """Attentions that a compiled forward executes inside recognised sites."""
    fused: int = 0
    error: float = 0.0
    graphs: int = 0
    seconds: float = 0.0
    reasons: tuple[str, ...] = ()
    """Near misses, failures and undone rewrites."""
    refused: tuple[str, ...] = field(default=(), compare=False)
    """Why sites were not fused."""
    skipped: str = ""
    crash: str = ""
    wrong: bool = False

    @property
    def perfect(self) -> bool:
        return not (self.skipped or self.crash or self.wrong) and self.found >= self.expected

    def __str__(self) -> str:
        if self.skipped:
            return f"–  {self.model_type:<28} cannot be built: {self.skipped}"
        if self.crash:
            return f"✗  {self.model_type:<28} {self.crash}"
        mark = "✓" if self.perfect else "✗" if self.wrong else "○"
        text = (
            f"{mark}  {self.model_type:<28} {self.found:>2} of {self.expected:<2} found  {self.fused:>2} fused  "
            f"error {self.error:.0e}  {self.graphs:>2} graphs  {self.seconds:5.1f} s"
        )
        return "\n".join([text, *(f"     {reason}" for reason in self.reasons)])


class Executions:
    """Wraps the backend and counts how many recognised attentions a forward executes.

    A graph that serves several layers (after a graph break) counts once per call, like the layers.
    """

    def __init__(self) -> None:
        self.sites = 0

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = latent(gm, inputs, options={"inner": "eager"})
        sites = len(history.reports().graphs[-1].sites)

        def counted(*args: Any) -> Any:
            self.sites += sites
            return compiled(*args)

        return counted


def sweep(types: Sequence[str], attn: str, dtype: torch.dtype, dynamic: bool | None) -> Iterator[Row]:
    """One row per model type, in order."""
    for model_type in types:
        torch._dynamo.reset()
        history.forget()
        try:
            built = build(model_type, attn=attn, dtype=dtype)
        except CannotBuild as error:
            yield Row(model_type, skipped=" ".join(str(error).split())[:150])
            continue
        try:
            yield compare(model_type, built, dtype, dynamic)
        except Exception as error:
            yield Row(model_type, crash=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def compare(model_type: str, built: Built, dtype: torch.dtype, dynamic: bool | None) -> Row:
    """One eager and one compiled forward, compared."""
    expected = len(count(built.model, built.inputs).attentions)
    eager = first_tensor(built.run())
    executions = Executions()
    start = time.perf_counter()
    compiled = torch.compile(built.model, backend=executions.backend, dynamic=dynamic)
    with torch.no_grad():
        actual = first_tensor(compiled(**built.inputs))
    seconds = time.perf_counter() - start
    # The first row is padded on the left: its first queries see no key, and what they give is not defined.
    row = slice(1, None) if eager.shape[0] == 2 else slice(None)
    difference = (eager[row].double() - actual[row].double()).abs().max()
    error = float(difference / eager[row].double().abs().max().clamp(min=1e-30))
    report = history.reports()
    return Row(
        model_type,
        expected,
        executions.sites,
        report.count("fuse_attention"),
        error,
        len(report.graphs),
        seconds,
        _reasons(report),
        tuple(v.reason for v in report.verdicts if v.rewrite == "fuse_attention" and v.outcome == "refused"),
        wrong=not error <= TOLERANCE[dtype],
    )


def _reasons(report: Report) -> tuple[str, ...]:
    failures = [f"failed: {graph.failure}" for graph in report.graphs if graph.failure]
    misses = [f"{miss.line}: {miss.reason}" for miss in report.near_misses]
    undone = [f"{v.rewrite} {v.outcome}: {v.reason}" for v in report.verdicts if v.outcome in ("undone", "failed")]
    return tuple(f"{text} × {times}" for text, times in Counter(failures + undone + misses).items())


def summary(rows: Sequence[Row]) -> str:
    """The last lines of the table."""
    ran = [row for row in rows if not row.skipped]
    expected = sum(row.expected for row in ran)
    found = sum(min(row.found, row.expected) for row in ran)
    share = found / expected if expected else 1.0
    refused = Counter(reason for row in ran for reason in row.refused)
    lines = [
        f"{len(ran)} of {len(rows)} types run; {found} of {expected} attentions recognised ({share:.1%}), "
        f"{sum(row.wrong for row in ran)} wrong outputs, {sum(bool(row.crash) for row in ran)} crashes",
        *(f"   recognised and not fused, {times:>3}: {reason}" for reason, times in refused.most_common()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m zoo.sweep", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types (default: all)")
    for flag in ("sdpa", "bfloat16", "dynamic", "rest"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("latent").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    types = given.types or causal_lm_types()
    dtype = torch.bfloat16 if given.bfloat16 else torch.float32
    rows = []
    for number, row in enumerate(
        sweep(types, "sdpa" if given.sdpa else "eager", dtype, True if given.dynamic else None), 1
    ):
        rows.append(row)
        if not given.rest or not row.perfect:
            print(f"{number:>3}/{len(types)} {row}", flush=True)
    print(summary(rows))


if __name__ == "__main__":
    main()
