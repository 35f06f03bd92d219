"""What an attribute of a configuration means, and the small number it becomes.

Widths differ wherever a model allows it, so that two swapped axes cannot agree by accident: hidden 32, heads 4,
head width 16 (8 where it must be hidden / heads), feed-forward 56, latent ranks 26 and 18, sequence 12, batch 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

HIDDEN = 32
HEADS = 4
KEY_HEADS = 2
HEAD_WIDTH = 16
VOCABULARY = 131
POSITIONS = 128
WINDOW = 5

Attributes = Mapping[str, Any]
Rule = int | Callable[[Any, Attributes], Any]

_QUERY_HEADS = ("num_attention_heads", "num_heads", "n_heads", "swa_num_attention_heads", "n_head")


# What an attribute becomes when the default leaves it out and the models need it.
ABSENT = {
    "head_dim": HEAD_WIDTH,
    "num_key_value_heads": KEY_HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
}


def _key_heads(value: int, attributes: Attributes) -> int:
    """Grouped stays grouped, one head stays one head, and one key head per query head stays so."""
    queries = next((attributes[name] for name in _QUERY_HEADS if isinstance(attributes.get(name), int)), None)
    return value if value <= 1 else HEADS if value == queries else KEY_HEADS


def _head_width(value: int, attributes: Attributes) -> int:
    """Latent attention calls the rotated part of a head `head_dim`; it must agree with `qk_rope_head_dim`."""
    return 8 if "qk_nope_head_dim" in attributes else HEAD_WIDTH


# The first pattern that matches a whole name decides. A number never grows: 8 experts become 6, 1 group stays 1.
RULES: tuple[tuple[str, Rule], ...] = (
    # ** left alone: derived from others, or not a size **
    (r"qk_head_dim|seed|alibi_bias_max|query_pre_attn_scalar|original_max_position_embeddings", lambda value, _: value),
    # ** vocabulary and positions **
    (r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCABULARY),
    (r"ngram_vocab_size_base|encoder_hash_byte_group_vocab", 67),
    (r"make_ngram_vocab_size_divisible_by|split_ngram_parts", 4),
    (r"codebook_size", 32),
    (r".*_vocab_size", 37),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|context_length", POSITIONS),
    (r"model_max_length|num_position_embeddings|rel_extent|mem_len", POSITIONS),
    # ** heads **
    (r"num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads|num_query_groups", _key_heads),
    (r"(conf_)?num_attention_heads(_per_layer)?|num_heads|n_heads?|attention_heads|swa_num_attention_heads", HEADS),
    (r"(encoder|decoder)_attention_heads|num_(encoder|decoder)_attention_heads", HEADS),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"index_n_heads", 3),
    (r"qk_nope_head_dim", 14),
    (r"qk_rope_head_dim", 8),
    (r"v_head_dim", 10),
    (r"q_lora_rank", 26),
    (r"kv_lora_rank", 18),
    (r"o_lora_rank|gated_norm_rank|laurel_rank|adapter_rank|hc_lowrank", 6),
    (r"o_groups", 2),
    (r"index_head_dim", 24),
    (r"index_topk", 5),
    (r"linear_key_head_dim|linear_head_dim", 8),
    (r"linear_value_head_dim", 10),
    (r"head_dim|dim_head|d_kv|attention_head_size|swa_head_dim|kv_channels", _head_width),
    (r"d_head", HIDDEN // HEADS),
    (r"rotary_dim", 4),
    # ** widths **
    (r"(moe_)?(shared_)?experts?_intermediate_size|moe_shared_expert_intermediate_size", 20),
    (r"moe_intermediate_size|expert_ffn_hidden_size", 24),
    (r"shared_intermediate_size", 40),
    (r"(.*_)?intermediate_size(_mlp)?|(encoder|decoder)?_?ffn_dim|ffn_hidden_size|n_inner|d_ff|dff|dim_ff", 56),
    (r"d_inner|mlp_dim|feed_forward_size", 56),
    (r"hidden_size_per_layer_input", 12),
    (r"router_hidden_size", 22),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|dim_model_base|lru_width|word_embed_proj_dim", HIDDEN),
    (r"hidden_size_global|backbone_hidden_size|out_hidden_size|ple_embed_dim", HIDDEN),
    (r"embedding_size|input_embedding_size|output_embedding_size|pronunciation_embed_dim|shape_embed_dim", 28),
    (r"projector_(input|output)_dim|vision_output_dim|adapter_(in|out)_dim|adapter_out_dim|adapter_input_size", HIDDEN),
    (r"classifier_proj_size|prompt_mid_dim|downsample_hidden_size|conv_output_size", 30),
    # ** experts **
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts", 6),
    (r"zero_expert_num", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts", 2),
    # ** windows and blocks **
    (r"sliding_window(_size)?|attention_chunk_size|attention_window_size|local_attention_window_len", WINDOW),
    (r"keep_window_size", WINDOW),
    (r"window_size|block_size", WINDOW),
    (r"local_attention", 2 * WINDOW),
    (r"block_multiple_of|position_bias_num_buckets", 8),
    # ** state spaces, convolutions, codecs **
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", HEADS),
    (r"mamba_d_head|mamba_headdim|mamba_head_dim", HEAD_WIDTH),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"mamba_d_state|ssm_state_size|state_size", 6),
    (r"(mamba_)?chunk_size", 8),
    (r"mamba_dt_rank|time_step_rank", 3),
    (r"n_groups", 2),
    (r"num_filters|codebook_dim|vector_quantization_hidden_dimension|upsample_groups", 8),
    (r"base_channels|output_channels|latent_channels", 8),
    # ** pictures and sound: never run, only built **
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
    (r"num_mel_bins|num_chroma|input_feat_size|feature_size", 20),
    (r"nemo_conv_channels|.*_out_channel|conv_dim", 16),
    (r"num_centroids", 8),
)
_COMPILED = tuple((re.compile(pattern), rule) for pattern, rule in RULES)


def small(name: str, value: Any, attributes: Attributes) -> Any:
    """The small number that attribute `name` becomes; other types and unknown names come back unchanged."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, rule in _COMPILED:
        if pattern.fullmatch(name):
            return min(value, rule) if isinstance(rule, int) else rule(value, attributes)
    return value
