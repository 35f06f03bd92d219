"""`python tests/benchmarks/crossover.py`: from how many query tokens on the expanded form is faster, and what was said.

Both forms of latent::latent_attention run side by side over more and more query tokens against one set of latents. The
measured crossover lies where the ratio of their medians passes 1, on a straight line between the two nearest sizes.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from latent.kernels.crossover import NEVER, Widths, crossover, threshold
from latent.kernels.latent_attention import LatentCall, absorbed_by_kernel, expanded_in_blocks
from latent.kernels.machine import device_name, measure
from latent.rewriter.command.timing import Call, take_turns

SHAPES = {
    "DeepSeek-V2-Lite": (16, Widths(512, 128, 128, 64)),
    "MiniCPM3": (40, Widths(256, 64, 64, 32)),
    "SmolLM2 as MLA": (9, Widths(192, 64, 64, 64)),
}


def arguments(heads: int, widths: Widths, tokens: int, queries: int, dtype: torch.dtype) -> LatentCall:
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return LatentCall(
        query=tensor(1, heads, queries, widths.key),
        query_rope=tensor(1, heads, queries, widths.rope),
        latent=tensor(1, 1, tokens, widths.latent),
        key_rope=tensor(1, 1, tokens, widths.rope),
        value_latent=None,
        up_key=tensor(heads, widths.key, widths.latent) * widths.latent**-0.5,
        up_value=tensor(heads, widths.value, widths.latent) * widths.latent**-0.5,
        value_bias=None,
        mask=None,
        sinks=None,
        scale=(widths.key + widths.rope) ** -0.5,
        cap=0.0,
        causal=False,
        window=0,
    )


def ratios(
    heads: int, widths: Widths, tokens: int, sizes: list[int], dtype: torch.dtype, rounds: int
) -> dict[int, float]:
    """Query tokens -> median seconds absorbed / expanded."""
    found = {}
    for queries in sizes:
        call = arguments(heads, widths, tokens, queries, dtype)
        calls = {
            "absorbed": Call(lambda c=call: absorbed_by_kernel(*c)),
            "expanded": Call(lambda c=call: expanded_in_blocks(c)),
        }
        times = take_turns(calls, rounds, budget=10.0)
        found[queries] = times["absorbed"].median / times["expanded"].median
    return found


def passes(found: dict[int, float]) -> str:
    """Where the ratio passes 1 for good."""
    points = sorted(found.items())
    if points[0][1] > 1:
        return f"< {points[0][0]}"
    for (low, below), (high, above) in reversed(list(itertools.pairwise(points))):
        if below <= 1 < above:
            return f"{low + (high - low) * (1 - below) / (above - below):.0f}"
    return f"> {points[-1][0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 96, 128, 192, 256])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    with torch.no_grad():
        machine = measure("cpu", dtype)
        print(f"{device_name('cpu')}, {torch.get_num_threads()} threads, {given.dtype}: {machine}")
        print(f"{given.tokens} latents; query tokens from which the expanded form is faster\n")
        print(f"{'':<18}{'S*':>6}{'by time':>10}{'measured':>10}   absorbed / expanded at S query tokens")
        for name, (heads, widths) in SHAPES.items():
            found = ratios(heads, widths, given.tokens, given.sizes, dtype, given.repeat)
            least = threshold(widths, heads, given.tokens, machine, dtype.itemsize)
            row = "  ".join(f"{queries}: {ratio:.2f}" for queries, ratio in found.items())
            said = "never" if least == NEVER else str(least)
            print(f"{name:<18}{crossover(widths, given.tokens):>6.0f}{said:>10}{passes(found):>10}   {row}", flush=True)


if __name__ == "__main__":
    main()
