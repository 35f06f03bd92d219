"""A rewrite of one's own in fifteen lines: `python examples/custom_rewrite.py` (needs transformers).

Two functions of plain PyTorch with the same arguments: what the attention computes, and what shall stand in its place.
The pattern is compared by what its axes mean, so that it also matches other layouts, other spellings of the products,
repeated heads, and a scale on the query. `cap` and `scale` are found at each site.
"""

import latent
import torch


def soft_capped(q, k, v, mask, cap, scale):
    """softmax(cap · tanh(scale · q kᵀ / cap) + mask) v  ->  latent::attention(q, k, v, mask, scale, cap)."""
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * scale / cap)
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def fused(q, k, v, mask, cap, scale):
    return torch.ops.latent.attention(q, k, v, mask, None, scale, cap, False, 0, False)


example = dict(q="B H S D", k="B H T D", v="B H T E", mask="B 1 S T | None", cap=50.0, scale=0.1)
latent.replace("my_soft_cap", soft_capped, fused, example=example, where=lambda dims: dims.D <= 256)


def other_layout(q, k, v):
    """The same with tokens before heads, in einsums, the scale on the query."""
    scores = torch.einsum("bihd,bjhd->bhij", 0.25 * q, k)
    return torch.einsum("bhij,bjhe->bihe", (torch.tanh(scores / 30) * 30).softmax(-1), v)


def main() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, attn_implementation="eager")).eval()
    tokens = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        print(latent.explain(model, rewrites="my_soft_cap")(tokens))
        print(latent.explain(other_layout, rewrites="my_soft_cap")(*(torch.randn(2, n, 4, 16) for n in (6, 9, 9))))
        compiled = torch.compile(model, backend="latent", options={"expect": {"my_soft_cap": 2}, "inner": "eager"})
        difference = (compiled(tokens).logits - model(tokens).logits).abs().max().item()
    print(f"\nlargest difference from eager: {difference:.1e}\n")
    print(latent.testing.check_rewrite("my_soft_cap"))


if __name__ == "__main__":
    main()
