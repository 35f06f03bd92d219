"""`python tests/benchmarks/eager_spelling.py`: attention spelled out, with latent, against sdpa.

A llama of 4 layers in SmolLM2's widths with random weights, one prefill without a cache. All variants are timed in
turn in one process; medians and ratios are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VARIANTS = {
    "eager spelling, inductor": ("eager", "inductor"),
    "sdpa spelling, inductor": ("sdpa", "inductor"),
    "eager spelling, latent": ("eager", "latent"),
    "sdpa spelling, latent": ("sdpa", "latent"),
}


def model(attn: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        num_hidden_layers=4,
        attn_implementation=attn,
    )
    return LlamaForCausalLM(config).eval()


def compiled(variant: str, ids: torch.Tensor) -> Callable[[], Any]:
    attn, backend = VARIANTS[variant]
    forward = torch.compile(model(attn), backend=backend, dynamic=False)

    def run() -> Any:
        with torch.no_grad():
            return forward(ids, use_cache=False).logits

    run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=9)
    given = parser.parse_args()
    ids = torch.randint(0, 2048, (1, given.tokens))
    runs = {variant: compiled(variant, ids) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(given.repeat):
        for variant, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[variant].append(time.perf_counter() - start)
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    base = medians["sdpa spelling, inductor"]
    print(f"{given.tokens} tokens, {torch.get_num_threads()} threads, median of {given.repeat} (min to max)")
    for variant, times in seconds.items():
        spread = f"{min(times) * 1e3:6.1f} to {max(times) * 1e3:6.1f}"
        ratio = medians[variant] / base
        print(f"{variant:<26} {medians[variant] * 1e3:7.1f} ms ({spread})  {ratio:5.2f} × sdpa, inductor")


if __name__ == "__main__":
    main()
