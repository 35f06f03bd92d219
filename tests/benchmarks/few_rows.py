"""`python tests/benchmarks/few_rows.py`: products of few rows with the weights of a model, beside ATen's.

A step of decoding without its attention: every weight once. Both take turns in an order drawn anew each time, so that
neither always finds what the other left in the caches; medians, and the bandwidth at which weights were read.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from latent.kernels.gemv import gemv

SHAPES = {
    "135M": ([((576, 192, 192), 576), ((576,), 576), ((1536, 1536), 576), ((576,), 1536)], 30, 49152),
    "1B": ([((2048, 512, 512), 2048), ((2048,), 2048), ((8192, 8192), 2048), ((2048,), 8192)], 4, 16384),
}
"""Outputs of the products of the same rows, and the rows' width, for each layer; layers; vocabulary."""


def take_turns(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each form."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name in random.sample(list(forms), len(forms)):
            start = time.perf_counter()
            forms[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def weight(outputs: int, inputs: int, dtype: torch.dtype, by_columns: bool) -> torch.Tensor:
    made = torch.randn((inputs, outputs) if by_columns else (outputs, inputs)).to(dtype)
    return made.t() if by_columns else made


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", choices=SHAPES, action="append", default=[])
    options.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), action="append", default=[])
    options.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--by-columns", action="store_true", help="weights [in, out], as GPT-2 has them")
    options.add_argument("--rounds", type=int, default=21)
    given = options.parse_args()
    for model in given.model or SHAPES:
        layer, layers, vocabulary = SHAPES[model]
        shapes = [*layer * layers, ((vocabulary,), layer[0][1])]
        for dtype in given.dtype or ("float32", "bfloat16", "float16"):
            calls = [
                ([weight(n, k, getattr(torch, dtype), given.by_columns) for n in outputs], k) for outputs, k in shapes
            ]
            read = sum(weight.nbytes for weights, _ in calls for weight in weights)
            for rows in given.rows:
                x = {k: torch.randn(rows, k).to(calls[0][0][0]) for _, k in calls}
                forms: dict[str, Callable[[], object]] = {
                    "ATen": lambda calls=calls, x=x: [
                        F.linear(x[k], weight) for weights, k in calls for weight in weights
                    ],
                    "latent": lambda calls=calls, x=x: [
                        gemv(x[k], weights, [None] * len(weights)) for weights, k in calls
                    ],
                }
                seconds = take_turns(forms, given.rounds)
                figures = "   ".join(
                    f"{name} {s * 1e3:6.2f} ms {read / s / 1e9:5.1f} GB/s" for name, s in seconds.items()
                )
                print(
                    f"{model:5} {dtype:9} {rows} rows   {figures}   {seconds['ATen'] / seconds['latent']:.2f} ×",
                    flush=True,
                )


if __name__ == "__main__":
    main()
