"""Real weights: SmolLM2-135M-Instruct gives the tokens that eager gives, with every cache, spelling and shape mode."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import latent
import pytest
import torch

pytest.importorskip("transformers")

from latent.rewriter.command.demo import DemoError, smollm2_folder

NEW_TOKENS = 64
PROMPTS = ("Name three primary colors.", "Write one sentence about the sea and the ships that cross it.")
LAYERS = 30

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return smollm2_folder()
    except DemoError as missing:
        pytest.skip(str(missing))


def generate(model: Any, tokenizer: Any, cache: str) -> torch.Tensor:
    """Greedy tokens for two prompts of different length, the shorter one padded on the left."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.no_grad():
        tokens: torch.Tensor = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation=cache, disable_compile=True
        )
    return tokens


@pytest.mark.parametrize(
    ("attn", "cache", "dynamic"), list(product(("eager", "sdpa"), ("dynamic", "static"), (None, True)))
)
def test_greedy_tokens_are_those_of_eager(folder: Path, attn: str, cache: str, dynamic: bool | None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch._dynamo.reset()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attn)
    expected = generate(model, tokenizer, cache)
    model.compile(backend="latent", dynamic=dynamic, options={"inner": "eager", "strict": True})
    actual = generate(model, tokenizer, cache)
    assert actual.tolist() == expected.tolist()
    graphs = latent.reports().graphs
    assert {graph.count("attention") for graph in graphs} == {LAYERS}
    print(f"{attn}, {cache} cache, dynamic={dynamic}: {actual.shape[1]} tokens equal, {len(graphs)} compilations")
