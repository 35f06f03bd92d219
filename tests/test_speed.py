"""Time spent inside latent: a small part of compilation, and linear in depth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

import latent
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

LARGEST_SHARE = 0.15
LARGEST_GROWTH = 2.2
TOKENS = 16


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def smollm2(attn: str) -> LlamaForCausalLM:
    """The architecture of SmolLM2-135M with random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        attn_implementation=attn,
    )
    return LlamaForCausalLM(config).eval()


def narrow(layers: int, attn: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation=attn,
    )
    return LlamaForCausalLM(config).eval()


def latent_seconds() -> float:
    return sum(sum(graph.seconds.values()) for graph in latent.reports().graphs)


def first_call(model: LlamaForCausalLM, **options: object) -> float:
    """Seconds of the first call of the compiled model, less the seconds of the second."""
    ids = torch.arange(TOKENS)[None] + 1
    compiled = torch.compile(model, backend="latent", options={"strict": True, **options})
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            compiled(input_ids=ids, use_cache=False)
            seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_share_of_compilation(attn: str) -> None:
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        whole = first_call(smollm2(attn))
    inside = latent_seconds()
    stages = ", ".join(f"{k} {v:.2f}" for graph in latent.reports().graphs for k, v in graph.seconds.items())
    print(f"\n{attn}: latent {inside:.1f} s of {whole:.1f} s, {inside / whole:.1%} ({stages})")
    assert len(latent.reports().sites) == 30
    assert inside <= LARGEST_SHARE * whole


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_linear_in_depth(attn: str) -> None:
    medians = {}
    for layers in (30, 60):
        seconds = []
        for _ in range(3):
            torch._dynamo.reset()
            first_call(narrow(layers, attn), inner="eager")
            assert len(latent.reports().sites) == layers
            seconds.append(latent_seconds())
        medians[layers] = statistics.median(seconds)
    growth = medians[60] / medians[30]
    print(f"\n{attn}: {medians[30]:.2f} s for 30 layers, {medians[60]:.2f} s for 60, {growth:.2f} times")
    assert growth <= LARGEST_GROWTH
