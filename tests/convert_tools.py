"""Tiny decoders in float64 and what tests of converted models do with them."""

from __future__ import annotations

import functools
import importlib
from typing import Any
from unittest.mock import patch

import latent
import torch
import transformers
from latent.rewriter.convert.read_decoder import read_decoder
from torch import Tensor

VOCABULARY = 61


@functools.cache
def tiny(dtype: torch.dtype = torch.float64, layers: int = 4, positions: int = 512) -> Any:
    """Grouped heads, biases on queries, keys and values, part of each head turned. It computes no step in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.StableLmConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=2,
            partial_rotary_factor=0.5,
            use_qkv_bias=True,
            max_position_embeddings=positions,
            initializer_range=0.25,
        )
        model = transformers.StableLmForCausalLM(config).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@functools.cache
def decoder_of(model: Any) -> Any:
    return read_decoder(model)


def converted(model: Any, recipe: Any, calibrate: Tensor | None = None) -> Any:
    """latent.convert, of a model that is read once."""
    module = importlib.import_module("latent.rewriter.convert.convert")
    with patch.object(module, "read_decoder", lambda model, probe: decoder_of(model)):
        return latent.convert(model, recipe, calibrate=calibrate)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def forward(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens at once."""
    mask = torch.ones_like(ids) if mask is None else mask
    out: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    return out


@torch.no_grad()
def step(model: Any, cache: Any, ids: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """Logits of the last `count` tokens, the others being in the cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    out: Tensor = model(
        input_ids=ids[:, -count:],
        attention_mask=mask,
        position_ids=positions(mask)[:, -count:],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return out


def decode(model: Any, cache: Any, ids: Tensor, prompt: int, mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens: a prompt, two tokens at once, then one by one."""
    ends = [prompt, prompt + 2, *range(prompt + 3, ids.shape[1] + 1)]
    made = []
    for start, end in zip([0, *ends], ends, strict=False):
        made.append(step(model, cache, ids[:, :end], end - start, None if mask is None else mask[:, :end]))
    return torch.cat(made, 1)
