"""Chosen heads made louder, or silent: `python examples/heads_scale.py`.

Reinforcing the heads that look at the image (VHR) multiplies their outputs by more than one; masking retrieval heads,
to see what a model does without them, multiplies by zero. Both are lossy and run only when named.
"""

import latent
import torch
import torch.nn.functional as F
from torch import nn

GAIN = torch.tensor([1.0, 1.5, 1.0, 2.0])
KEEP = torch.tensor([0.0, 1.0, 1.0, 0.0])


def attention(q, k, v, mask, scale):
    scores = scale * (q @ k.transpose(-1, -2))
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def reinforced(q, k, v, mask, scale):
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale) * GAIN.view(-1, 1, 1)


def masked(q, k, v, mask, scale):
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale) * KEEP.view(-1, 1, 1)


example = dict(q="B H S D", k="B H T D", v="B H T E", mask="B H S T | None", scale=0.1)
for name, edited, layer in (("reinforce_heads", reinforced, "layers.0"), ("mask_heads", masked, "layers.1")):
    latent.replace(
        name,
        attention,
        edited,
        example=example,
        sizes={"H": 4},
        where=lambda at, layer=layer: at.module.endswith(layer),
        exact=False,
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, gain=1.0):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True) * gain  # the gain is the reference, by hand
        return x + self.out(heads.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x, gains=(1.0, 1.0)):
        for layer, gain in zip(self.layers, gains, strict=True):
            x = layer(x, gain)
        return x


def main() -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 10, 32)
    names = ["reinforce_heads", "mask_heads"]
    by_hand = (GAIN.view(-1, 1, 1), KEEP.view(-1, 1, 1))
    with torch.no_grad():
        print(latent.explain(model, rewrites=names)(x))
        edited = torch.compile(model, backend="latent", options={"rewrites": names})(x)
        print(f"\nfrom the model as it is:    {(edited - model(x)).abs().max().item():.1e}")
        print(f"from the edit made by hand: {(edited - model(x, by_hand)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
