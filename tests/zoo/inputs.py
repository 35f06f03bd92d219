"""The inputs of one forward: two rows of twelve tokens, the first row padded on the left."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

BATCH = 2
TOKENS = 12
PADDED = 3
FIRST_TOKEN, LAST_TOKEN = 12, 30


def text_inputs(model: nn.Module, *, seed: int = 0, use_cache: bool = False) -> dict[str, Any]:
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
    if "use_cache" in names:
        inputs["use_cache"] = use_cache
    return inputs
