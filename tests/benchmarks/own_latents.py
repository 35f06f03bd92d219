"""`python tests/benchmarks/own_latents.py`: a token of a model that caches the keys of all heads, made of a latent.

DeepSeek-V2-Lite's attention (hidden 2048, 16 heads, 512 + 64, 128/128), two layers, random weights, spelled as its
first published code was. In turns: inductor and latent with transformers' static cache, and latent with a LatentCache.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import latent
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

sys.path.insert(0, str(Path(__file__).parent.parent))

from own_latent_models import Expanded

CHUNK = 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cached", type=int, default=8192)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--repeat", type=int, default=21)
    given = options.parse_args()
    model, tokens = build(getattr(torch, given.dtype)), torch.randint(1, 1000, (1, given.cached))
    length = given.cached + 64
    caches = {
        ("inductor", "static cache"): StaticCache(config=model.config, max_cache_len=length),
        ("latent", "static cache"): StaticCache(config=model.config, max_cache_len=length),
        ("latent", "LatentCache"): latent.LatentCache(model, length),
    }
    steps = {name: prefilled(model, cache, name[0], tokens) for name, cache in caches.items()}
    wanted = steps["inductor", "static cache"]()
    errors = {name: float((step() - wanted).abs().max() / wanted.abs().max()) for name, step in steps.items()}
    times: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
    for _ in range(given.repeat):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    base = statistics.median(times["inductor", "static cache"])
    for name, taken in times.items():
        size = sum(x.nbytes for layer in caches[name].layers for x in (layer.keys, layer.values))
        median = statistics.median(taken)
        print(
            f"{' · '.join(name):24} {median:7.1f} ms [{min(taken):.1f}, {max(taken):.1f}]  {base / median:.2f} ×"
            f"   {size / 1e6:6.1f} MB   error {errors[name]:.0e}"
        )


def build(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=1408,
        num_hidden_layers=2,
        num_attention_heads=16,
        head_dim=64,
        max_position_embeddings=16384,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = Expanded(config, index, rank=512, plain=128, turned=64, value=128, query_rank=None)
    return model.to(dtype).eval()


@torch.no_grad()
def prefilled(model: Any, cache: Any, backend: str, tokens: Tensor) -> Any:
    """A step of decoding that always writes to the same place, behind the prompt."""
    count, own = tokens.shape[1], copy.deepcopy(model)
    for start in range(0, count, CHUNK):
        part = tokens[:, start : start + CHUNK]
        own(part, past_key_values=cache, position_ids=torch.arange(start, start + part.shape[1])[None])
    compiled = torch.compile(own, backend=backend)
    token, position = torch.full((1, 1), 7), torch.full((1, 1), count)

    @torch.no_grad()
    def step() -> Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(count)
        made: Tensor = compiled(token, past_key_values=cache, position_ids=position).logits
        return made

    step()
    return step


if __name__ == "__main__":
    main()
