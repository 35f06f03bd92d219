"""`python tests/benchmarks/triton_budgets.py`: what every generated Triton kernel takes of every target.

Compiled ahead of time, so that no GPU is needed; about a minute with an empty Triton cache.
"""

from __future__ import annotations

import argparse

import torch
from latent.kernels.spec import Call, KernelSpec
from latent.kernels.triton_report import TARGETS, Usage, example_call, usage
from rich.console import Console
from rich.table import Table

BF16 = torch.bfloat16

LATENT = KernelSpec(BF16, 512, 64)
BOOL_MASK = KernelSpec(BF16, 512, 64, mask="bool")
BIAS = KernelSpec(BF16, 512, 64, mask="additive", mask_dtype=BF16)
D64 = KernelSpec(BF16, 64, value_width=64)
D128 = KernelSpec(BF16, 128, value_width=128)

CALLS: dict[str, tuple[KernelSpec, Call]] = {
    "latent 512+64, 16 heads": (LATENT, example_call(LATENT, heads=16, key_heads=1)),
    "latent 512+64, 128 heads": (LATENT, example_call(LATENT, heads=128, key_heads=1)),
    "latent 512+64, bool mask": (BOOL_MASK, example_call(BOOL_MASK, heads=16, key_heads=1)),
    "latent 512+64, additive mask": (BIAS, example_call(BIAS, heads=16, key_heads=1)),
    "gqa D=64, G=3": (D64, example_call(D64, heads=9, key_heads=3)),
    "gqa D=64, G=4": (D64, example_call(D64, heads=32, key_heads=8)),
    "gqa D=128, G=4": (D128, example_call(D128, heads=32, key_heads=8)),
    "gqa D=128, G=8": (D128, example_call(D128, heads=64, key_heads=8)),
    "prefill D=128, G=4": (D128, example_call(D128, heads=32, key_heads=8, queries=4096)),
}


def usages(target: str) -> dict[tuple[str, str], Usage]:
    """What every kernel of CALLS takes of a target, by call and kernel."""
    return {(name, used.kernel): used for name, (spec, call) in CALLS.items() for used in usage(spec, call, target)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    table = Table("call", "kernel", "target", title="bfloat16, compiled ahead of time")
    for column in ("registers", "spilled", "shared", "matrix", "16 B loads", "narrow", "resident"):
        table.add_column(column, justify="right")
    for target in TARGETS:
        combined: set[Usage] = set()
        for (name, kernel), used in usages(target).items():
            if kernel == "combine" and used in combined:
                continue  # the same for every way to the same width
            combined.add(used)
            numbers = (used.registers, used.spilled, used.shared, used.matrix, used.wide_loads, used.narrow_async)
            table.add_row(name, kernel, target, *map(str, numbers), str(used.resident) if used.fits else "0")
        table.add_section()
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


if __name__ == "__main__":
    main()
