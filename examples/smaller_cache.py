"""Half of a cache's bytes: convert a model, see what it costs, and generate with what is left.

A tiny model with random weights stands in for yours, so what is printed about quality says nothing.
"""

import tempfile

import latent
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    model = make_model()
    text = torch.randint(3, 128, (16, 64))  # token ids of text like that which the model will read
    small = latent.convert(model, latent.JointLatent(share=0.5), calibrate=text)

    prompt = text[:1, :16]
    cache = latent.LatentCache(small)
    small.generate(prompt, past_key_values=cache, max_new_tokens=16, do_sample=False, pad_token_id=0)
    held = cache.get_seq_length()
    before = 2 * 4 * 3 * 64  # keys and values of 3 layers in float32
    print(f"{held} tokens in the cache, {cache.nbytes / held:.0f} bytes for each; {before} before")

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        small.save_pretrained(folder)
        again = latent.load(folder)
        print("reloaded, largest difference:", float((again(prompt).logits - small(prompt).logits).abs().max()))


if __name__ == "__main__":
    main()
