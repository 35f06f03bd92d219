"""`python tests/benchmarks/mla_model.py`: latent attention in the shape of DeepSeek-V2-Lite, spelled by transformers.

Two dense layers with random weights: hidden 2048, 16 heads, latents of width 512 and rotary keys of width 64 in the
cache, keys and values of width 128 made of them by every call. One token against 8192 cached, and a prefill of 2048.
"""

from __future__ import annotations

import torch
from arguments import parser, run
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM


def model(layers: int = 2, attention: str = "sdpa") -> DeepseekV2ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=16384,
        mlp_layer_types=["dense"] * layers,
        first_k_dense_replace=layers,
        attn_implementation=attention,
    )
    return DeepseekV2ForCausalLM(config).eval()


def main() -> None:
    options = parser(__doc__, cached=8192, tokens=2048, repeat=7)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--attention", choices=("eager", "sdpa"), default="sdpa")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", default=[])
    given = options.parse_args()
    for dtype in given.dtype or ("float32", "bfloat16"):
        run(f"DeepSeek-V2-Lite's attention, {given.layers} layers", model(given.layers, given.attention), given, dtype)


if __name__ == "__main__":
    main()
