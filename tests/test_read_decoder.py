"""Decoders read as weights: what is found in models of many spellings, and what is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from latent.rewriter.convert.attention import ConvertedAttention
from latent.rewriter.convert.layers import ConversionRefused
from latent.rewriter.convert.read_decoder import read_decoder
from torch import nn
from zoo.build import CannotBuild, build, causal_lm_types

SMALL = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "pad_token_id": 0,
}


def make(name: str, implementation: str = "sdpa", **changed: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**{**SMALL, **changed})
    names = (f"{name}ForCausalLM", name.replace("Text", "") + "ForCausalLM", f"{name}LMHeadModel")
    model = next(getattr(hf, one) for one in names if hasattr(hf, one))
    made = model._from_config(config, attn_implementation=implementation).eval()
    for parameter in made.parameters():  # biases and norms start at zeros and ones, which would hide them
        if parameter.ndim == 1:
            nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    return made


DECODERS = {
    "llama": ("Llama", {}),
    "biases": ("Qwen2", {}),
    "fused": ("Phi3", {}),
    "fused, interleaved, partial rope": ("GPTNeoX", {}),
    "pairs side by side": ("Cohere", {}),
    "pairs side by side, half of the width": ("Glm", {"head_dim": 8}),
    "soft cap": ("Gemma2", {"head_dim": 8, "implementation": "eager"}),
    "no rope, transposed weights": ("GPT2", {"n_embd": 48, "n_head": 6, "n_layer": 2}),
    "multi-query": ("Falcon", {}),
    "window": ("Mistral", {"sliding_window": 8}),
    "norm per head": ("Qwen3", {"head_dim": 8}),
    "norm over all heads": ("Olmo2", {}),
    "two tables of angles": ("Gemma3Text", {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "scale of its own": ("Granite", {"attention_multiplier": 0.3}),
    "eager": ("Llama", {"implementation": "eager"}),
    "sinks": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "implementation": "eager"}),
    "gate per column, norms": ("Afmoe", {"head_dim": 8, "num_local_experts": 4, "num_dense_layers": 2}),
    "softplus per head, norms": (
        "Laguna",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "gating": "per-head"},
    ),
    "gate beside the queries": ("Qwen3_5Text", {"head_dim": 8, "layer_types": ["full_attention"] * 2}),
    "norms of values too": ("Gemma4Text", {"head_dim": 8, "num_kv_shared_layers": 0, "global_head_dim": 16}),
    "norm after rope, turned backwards": ("NanoChat", {}),
    "keys repeated, then cast": ("Flint", {"head_dim": 8, "implementation": "eager"}),
    "angles made inside": (
        "GPTJ",
        {"n_embd": 48, "n_head": 6, "n_layer": 2, "rotary_dim": 4, "implementation": "eager"},
    ),
    "numbers for positions": ("Ministral3", {"head_dim": 8}),
    "norm with a bias": ("Persimmon", {"num_key_value_heads": 6}),
}


@pytest.mark.parametrize("case", DECODERS)
def test_what_was_read_computes_what_the_model_does(case: str) -> None:
    name, changed = DECODERS[case]
    model = make(name, **changed)
    decoder = read_decoder(model)
    assert [layer.call.index for layer in decoder.layers] == [0, 1]
    tokens = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(tokens)
    padding[1, :5] = 0
    with torch.no_grad():
        wanted = model(tokens, attention_mask=padding, use_cache=False).logits
        for layer in decoder.layers:
            owner, _, last = layer.path.rpartition(".")
            setattr(model.get_submodule(owner), last, ConvertedAttention.of(layer))
        found = model(tokens, attention_mask=padding, use_cache=False).logits
    visible = padding.bool()
    torch.testing.assert_close(found[visible], wanted[visible], rtol=1e-4, atol=1e-4)


def test_weights_are_read_exactly() -> None:
    model = make("Llama")
    layer, own = read_decoder(model).layers[1], model.model.layers[1].self_attn
    assert torch.equal(layer.query.flat, own.q_proj.weight)
    assert torch.equal(layer.key.flat, own.k_proj.weight)
    assert torch.equal(layer.value.flat, own.v_proj.weight)
    assert torch.equal(layer.output.weight.flatten(1), own.o_proj.weight)
    assert layer.query.bias is None and layer.cached == 32


def test_repeated_heads_are_read_once() -> None:
    layer = read_decoder(make("Flint", "eager", head_dim=8)).layers[0]
    assert (layer.heads, layer.groups, layer.cached) == (6, 2, 32) and layer.sinks is not None


def test_interleaved_projections_are_told_apart() -> None:
    model = make("GPTNeoX")
    layer, own = read_decoder(model).layers[0], model.gpt_neox.layers[0].attention
    fused = own.query_key_value.weight.view(6, 3, 8, 48)
    for at, read in enumerate((layer.query, layer.key, layer.value)):
        assert torch.equal(read.weight, fused[:, at])
        assert read.bias is not None
        torch.testing.assert_close(read.bias, own.query_key_value.bias.view(6, 3, 8)[:, at])


def test_norms_are_read_as_they_were_written() -> None:
    model = make("Qwen3", head_dim=8, rms_norm_eps=3e-5)
    layer, own = read_decoder(model).layers[0], model.model.layers[0].self_attn
    assert layer.key_norm is not None and layer.key_norm.eps == pytest.approx(3e-5, rel=1e-2)
    torch.testing.assert_close(layer.key_norm.weight, own.k_norm.weight.expand(2, 8), rtol=1e-5, atol=1e-6)


def test_layers_with_other_angles_are_told_apart() -> None:
    decoder = read_decoder(make("Gemma3Text", head_dim=8, layer_types=["sliding_attention", "full_attention"]))
    assert [layer.turns for layer in decoder.layers] == [0, 1]


def test_models_in_half_precision_are_read_exactly() -> None:
    model = make("Llama").bfloat16()
    layer = read_decoder(model).layers[0]
    assert torch.equal(layer.key.flat, model.model.layers[0].self_attn.k_proj.weight)


MLA = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 6,
    "first_k_dense_replace": 2,
}
EAGER = {"implementation": "eager"}
REFUSED = {
    "latents already": ("DeepseekV2", MLA, "made of a latent of 16 numbers already"),
    "positions in the mask": ("Bloom", {"n_head": 6, "n_layer": 2, **EAGER}, "besides|cache|scaled"),
    "two attentions and their difference": ("DiffLlama", EAGER, "what follows|cannot be read"),
    "no module of that name": (
        "CTRL",
        {"n_embd": 48, "n_head": 6, "n_layer": 2, "dff": 32, "n_positions": 64, **EAGER},
        "no module of the model has this name",
    ),
    "one module, several caches": ("HrmText", {"H_cycles": 1, "L_cycles": 2}, "attends . times in one call"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_layer_and_the_reason(case: str) -> None:
    name, changed, reason = REFUSED[case]
    with pytest.raises(ConversionRefused, match=reason) as refused:
        read_decoder(make(name, **changed))
    assert "0" in refused.value.where


def test_training_mode_is_refused() -> None:
    with pytest.raises(ConversionRefused, match=r"training mode.*model\.eval"):
        read_decoder(make("Llama").train())


def test_shared_weights_are_refused() -> None:
    model = make("Llama")
    model.model.layers[1].self_attn.k_proj.weight = model.model.layers[0].self_attn.k_proj.weight
    with pytest.raises(ConversionRefused, match=r"layers\.1\.self_attn.*shares weights with model\.layers\.0"):
        read_decoder(model)


def test_something_besides_is_caught_by_the_check() -> None:
    model = make("Llama")
    attention = model.model.layers[1].self_attn
    attention.register_forward_hook(lambda module, args, output: (output[0] * 1.01, output[1]))
    with pytest.raises(ConversionRefused, match=r"layers\.1\.self_attn.*besides"):
        read_decoder(model)


def test_the_model_is_left_as_it_was() -> None:
    model = make("Llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read_decoder(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_every_decoder_of_transformers_is_read_or_refused_in_words() -> None:
    """Most of the types that can be built are read; no other error comes out."""
    read, refused = [], {}
    for name in causal_lm_types():
        torch._dynamo.reset()
        try:
            model = build(name).model
        except CannotBuild:
            continue
        try:
            read_decoder(model)
            read.append(name)
        except ConversionRefused as reason:
            refused[name] = str(reason)
    print(f"{len(read)} read", *(f"{name}: {reason}" for name, reason in refused.items()), sep="\n")
    assert len(read) >= 115
