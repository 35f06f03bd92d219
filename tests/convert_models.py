"""Tiny random models for the tests of recipes, and what is asked of every converted model."""

from __future__ import annotations

import functools
from typing import Any
from unittest.mock import patch

import latent
import torch
import transformers
from latent.rewriter.convert.layers import AttentionLayer, Decoder
from latent.rewriter.convert.read_decoder import read_decoder
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo.build import randomise

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

HALF_TURNED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-all-heads": ("Llama", {"num_key_value_heads": 4}),
    "llama-one-head": ("Llama", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {}),  # biases of queries, keys and values
    "cohere": ("Cohere", {}),  # interleaved pairs
    "gpt_neox": (
        "GPTNeoX",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3": ("Phi3", {}),  # one projection for all three
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),  # scores are capped
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 8, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),  # sinks
    "gated": ("Llama", {}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48}),  # nothing is turned
}
TURNED = tuple(name for name in CONFIGS if name != "gpt2")


def limit(name: str) -> float:
    """Relative error of what is exact: one turns in float32, one has its softmax in it, whatever the dtype."""
    return 1e-6 if name in ("cohere", "gemma2") else 1e-10


@functools.cache
def tiny(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model in evaluation mode; the same object each time, as nothing may change it."""
    kind, changes = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    attention = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    without_experts(model).eval()
    if name == "gated":
        for layer in model.model.layers:
            layer.self_attn = Gated(config, layer.self_attn.layer_idx)
        model.eval()
    randomise(model, seed=0)
    return model.to(dtype)


def without_experts(model: Any) -> Any:
    """Experts are computed in 32 bits or in several graphs; one dense layer stands for them."""
    for layer in getattr(getattr(model, "model", None), "layers", ()):
        if hasattr(layer.mlp, "experts"):
            layer.mlp = Dense(model.config.hidden_size)
    return model


class Dense(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class Gated(LlamaAttention):
    """A sigmoid for every column of the heads (G1 of arXiv:2505.06708)."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.out, self.o_proj = self.o_proj, nn.Identity()

    def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        heads, _ = super().forward(hidden_states, **given)
        return self.out(heads * torch.sigmoid(self.gate(hidden_states))), None


def text(rows: int = 16, length: int = 24, seed: int = 3) -> Tensor:
    """Token ids to calibrate on."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def decoder(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    """It is read once, as that takes seconds."""
    return read_decoder(tiny(name, dtype))


def layer(name: str) -> AttentionLayer:
    return decoder(name).layers[0]


def convert(name: str, recipe: Any, tokens: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """`latent.convert` of a tiny model."""
    with patch("latent.rewriter.convert.convert.read_decoder", lambda *_: decoder(name, dtype)):
        return latent.convert(tiny(name, dtype), recipe, text() if tokens is None else tokens)


def attention_error(name: str, converted: nn.Module, tokens: Tensor | None = None) -> float:
    """The largest relative error of any converted attention, given what the model's own was given."""
    model = tiny(name)
    tokens = text(2, seed=5) if tokens is None else tokens
    errors: list[float] = []
    handles = []
    for layer in decoder(name).layers:
        other = converted.get_submodule(layer.path)

        def compare(_: Any, args: Any, kwargs: Any, output: Any, other: nn.Module = other) -> None:
            wanted, found = (o[0] if isinstance(o, tuple) else o for o in (output, other(*args, **kwargs)))
            errors.append(float((wanted - found).abs().max() / wanted.abs().max()))

        handles.append(model.get_submodule(layer.path).register_forward_hook(compare, with_kwargs=True))
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    assert errors
    return max(errors)


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())
