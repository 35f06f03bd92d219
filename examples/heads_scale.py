"""Chosen heads reinforced, and retrieval heads masked: `python examples/heads_scale.py`.

Reinforcing the heads that look at the image (VHR) multiplies their outputs by more than one. Masking retrieval heads,
to see what a model does without them, multiplies by zero. Both are lossy and run only when named.
"""

import latent
import torch
import torch.nn.functional as F
from torch import nn

REINFORCED = torch.tensor([1.0, 1.5, 1.0, 2.0]).view(-1, 1, 1)  # heads 1 and 3
WITHOUT_RETRIEVAL = torch.tensor([0.0, 1.0, 1.0, 0.0]).view(-1, 1, 1)  # heads 0 and 3 retrieve


def attention(q, k, v, mask, scale):
    scores = scale * (q @ k.transpose(-1, -2))
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def times(factors):
    return lambda q, k, v, mask, scale: F.scaled_dot_product_attention(q, k, v, mask, scale=scale) * factors


example = dict(q="B H S D", k="B H T D", v="B H T E", mask="B H S T | None", scale=0.1)
how = dict(example=example, sizes={"H": 4}, exact=False)
latent.replace("reinforce_heads", attention, times(REINFORCED), where=lambda at: at.module == "0", **how)
latent.replace("mask_retrieval_heads", attention, times(WITHOUT_RETRIEVAL), where=lambda at: at.module == "1", **how)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.factors = 1.0  # the reference: the edit made by hand

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True) * self.factors
        return x + self.out(heads.transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(), Attention()).eval(), torch.randn(2, 10, 32)
    names = ["reinforce_heads", "mask_retrieval_heads"]
    with torch.no_grad():
        print(latent.explain(model, rewrites=names)(x))
        edited, plain = torch.compile(model, backend="latent", options={"rewrites": names})(x), model(x)
        model[0].factors, model[1].factors = REINFORCED, WITHOUT_RETRIEVAL
        print(f"\nfrom the model as it is:    {(edited - plain).abs().max().item():.1e}")
        print(f"from the edit made by hand: {(edited - model(x)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
