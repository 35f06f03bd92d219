"""What the rules cannot know: one model type a row, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NARROW = {"head_dim": 8}


@dataclass(frozen=True)
class Override:
    """Attributes of the tiny configuration that no rule gives; a part of a configuration has its own mapping."""

    reason: str
    changes: Mapping[str, Any]


OVERRIDES: dict[str, Override] = {
    "bamba": Override("the default has no attention layer", {"attn_layer_indices": [1]}),
    "blt": Override(
        "the rotary width of every part is hidden / heads",
        {name: _NARROW for name in ("patcher_config", "encoder_config", "decoder_config", "global_config")},
    ),
    "cohere_compass_text": Override(
        "rope parameters are read per layer kind and the default has none",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    ),
    "dbrx": Override(
        "the attention part reads a rope base its class does not declare, and always clips",
        {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    ),
    "deepseek_v4": Override(
        "blocks of 128 keys are never full in a short sequence",
        {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 6}},
    ),
    "dots3_note_text": Override(
        "the head width of a sliding layer is the sum of its own two parts",
        {
            "head_dim": 28,
            "per_layer_config": {
                2: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 22, "qk_nope_head_dim": 20}
            },
        },
    ),
    "gemma3n_text": Override(
        "the last layers reuse the keys of earlier ones of the same kind",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [56] * 4,
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
            "num_kv_shared_layers": 2,
        },
    ),
    "granitemoehybrid": Override("the default has no attention layer", {"layer_types": ["mamba", "attention"]}),
    "helium": Override("the output projection is hidden x hidden", _NARROW),
    "hrm_text": Override(
        "two stacks of two layers are executed in turns, and the number of layers is derived from the turns",
        {"num_hidden_layers": 2, "num_layers_per_stack": None, "H_cycles": 1, "L_cycles": 2},
    ),
    "jamba": Override(
        "attention and experts come at a period; both kinds of both must fit into two layers",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    ),
    "laguna": Override(
        "the default has one kind of layer, the model two with different numbers of heads",
        {"layer_types": ["full_attention", "sliding_attention"], "num_attention_heads_per_layer": [4, 6]},
    ),
    "lfm2_moe": Override("the default has no layer kinds", {"layer_types": ["conv", "full_attention"]}),
    "qwen4_exp_text": Override(
        "the default has no indexer sizes",
        {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        },
    ),
    "recurrent_gemma": Override(
        "kinds of layers come at a period of three", {"block_types": ["recurrent", "attention"]}
    ),
    "reformer": Override(
        "position axes and chunks must fit a short sequence, and hashing must repeat itself",
        {
            "axial_pos_shape": [8, 16],
            "axial_pos_embds_dim": [12, 20],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
            "hash_seed": 0,
        },
    ),
    "xmod": Override("adapters are chosen by language", {"default_language": "en_XX"}),
    "zamba": Override(
        "weights are shared between hybrid layers, so there must be two",
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    ),
}
for _name in ("dots3_note", "qwen4_exp"):
    OVERRIDES[_name] = Override("as its text part", {"text_config": OVERRIDES[f"{_name}_text"].changes})
