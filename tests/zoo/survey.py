"""`python -m zoo.survey [type ...]` prints, for every model type, whether it runs and what it executes."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.utils import logging

from .build import CannotBuild, build, causal_lm_types
from .count import Counts, count


@dataclass(frozen=True)
class Row:
    """What became of one model type."""

    model_type: str
    seconds: float
    parameters: int = 0
    counts: Counts | None = None
    reason: str = ""

    def __str__(self) -> str:
        head = f"{self.model_type:28s} {self.seconds:6.2f}s"
        if self.counts is None:
            return f"{head}  no   {self.reason}"
        spread = min((site.spread for site in self.counts.attentions if not site.fused), default=0.0)
        others = ", ".join(f"{site.module} {list(site.shape)}" for site in self.counts.others)
        return (
            f"{head}  yes {self.parameters:7d} parameters {len(self.counts.attentions):3d} attentions "
            f"{len(self.counts.others):3d} other softmaxes, spread {spread:5.2f}  {others}"
        ).rstrip()


def survey(types: list[str], *, attn: str = "eager", dtype: torch.dtype = torch.float32) -> Iterator[Row]:
    """One row per model type, in order."""
    for model_type in types:
        start = time.perf_counter()
        try:
            built = build(model_type, attn=attn, dtype=dtype)
            counts = count(built.model, built.inputs)
        except CannotBuild as error:
            yield Row(model_type, time.perf_counter() - start, reason=str(error))
            continue
        parameters = sum(parameter.numel() for parameter in built.model.parameters())
        yield Row(model_type, time.perf_counter() - start, parameters, counts)


def main(arguments: list[str]) -> None:
    """`--sdpa` and `--bfloat16` choose the variant, the other arguments are model types."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    types = [argument for argument in arguments if not argument.startswith("--")] or causal_lm_types()
    attn = "sdpa" if "--sdpa" in arguments else "eager"
    dtype = torch.bfloat16 if "--bfloat16" in arguments else torch.float32
    rows = []
    for row in survey(types, attn=attn, dtype=dtype):
        print(row, flush=True)
        rows.append(row)
    built = sum(row.counts is not None for row in rows)
    calls = sum(len(row.counts.attentions) for row in rows if row.counts)
    print(f"{built} of {len(rows)} build and run, {calls} attentions")


if __name__ == "__main__":
    main(sys.argv[1:])
