"""The inputs of one forward: two rows of twelve tokens, the first row padded on the left."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

BATCH = 2
TOKENS = 12
PADDED = 3
ENCODED = 7
FIRST_TOKEN, LAST_TOKEN = 12, 30


CROSS_ATTENTION = re.compile(r"encoder_attn|crossattention|cross_attn")


def text_inputs(model: Any, *, seed: int = 0, use_cache: bool = False) -> dict[str, Any]:
    """Token ids clear of every special token, a mask where the model takes one."""
    generator = torch.Generator().manual_seed(seed)
    names = inspect.signature(model.forward).parameters
    config: Any = model.config.get_text_config(decoder=True)
    input_ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, (BATCH, TOKENS), generator=generator)
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if "attention_mask" in names:
        mask = torch.ones_like(input_ids)
        mask[0, :PADDED] = 0
        inputs["attention_mask"] = mask
        pad = getattr(config, "pad_token_id", None)
        if isinstance(pad, int) and pad >= 0:
            input_ids[0, :PADDED] = pad
    if config.model_type.startswith("musicgen"):
        # a row of tokens per codebook, the rows of one sample together
        size = (BATCH * config.num_codebooks, TOKENS)
        inputs["input_ids"] = torch.randint(FIRST_TOKEN, LAST_TOKEN, size, generator=generator)
    inputs |= _encoder_inputs(model, config, set(names), generator)
    if "use_cache" in names:
        inputs["use_cache"] = use_cache
    return inputs


def _encoder_inputs(model: Any, config: Any, names: set[str], generator: torch.Generator) -> dict[str, Any]:
    """What a model attends to besides its tokens, where it has attention for that."""
    named = [name for name in ("cross_attention_states", "encoder_hidden_states", "encoder_outputs") if name in names]
    width = getattr(config, "cross_attention_hidden_size", None) or getattr(config, "hidden_size", None)
    if not named or not width or not any(CROSS_ATTENTION.search(path) for path, _ in model.named_modules()):
        return {}
    states = torch.randn(BATCH, ENCODED, width, generator=generator).to(model.dtype)
    inputs: dict[str, Any] = {named[0]: (states,) if named[0] == "encoder_outputs" else states}
    if "encoder_attention_mask" in names:
        inputs["encoder_attention_mask"] = torch.ones(BATCH, ENCODED, dtype=torch.long)
        inputs["encoder_attention_mask"][1, -2:] = 0
    return inputs
