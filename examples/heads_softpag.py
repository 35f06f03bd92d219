"""The attention maps of chosen heads, drawn towards identity: `python examples/heads_softpag.py`.

Perturbed-attention guidance wants a worse model beside the model, and SoftPAG says how much worse, head by head:
A' = (1 - s) A + s I. The model is not edited. The rewrite is lossy, so it runs only when it is named.
"""

import latent
import torch
from torch import nn

STRENGTH = torch.tensor([0.0, 0.7, 0.0, 0.4])  # one number for each head


def attention(q, k, v, mask, scale):
    scores = scale * (q @ k.transpose(-1, -2))
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def towards_identity(q, k, v, mask, scale):
    """softmax(..) v  ->  ((1 - s) softmax(..) + s I) v = (1 - s) softmax(..) v + s v."""
    s = STRENGTH.view(-1, 1, 1)
    return (1 - s) * attention(q, k, v, mask, scale) + s * v


latent.replace(
    "softpag",
    attention,
    towards_identity,
    example=dict(q="B H S D", k="B H S D", v="B H S E", mask="B H S S | None", scale=0.1),
    sizes={"H": 4},
    where=lambda at: at.H == 4 and at.module in ("0", "2"),
    exact=False,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.strength = None  # the reference: the edit made by hand

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 8**0.5).softmax(-1)
        if self.strength is not None:
            weights = torch.lerp(weights, torch.eye(x.shape[1]).expand_as(weights), self.strength.view(-1, 1, 1))
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(), Attention(), Attention()).eval(), torch.randn(2, 10, 32)
    with torch.no_grad():
        print(latent.explain(model, rewrites="softpag")(x))
        guided, plain = torch.compile(model, backend="latent", options={"rewrites": "softpag"})(x), model(x)
        model[0].strength = model[2].strength = STRENGTH
        print(f"\nfrom the model as it is:    {(guided - plain).abs().max().item():.1e}")
        print(f"from the edit made by hand: {(guided - model(x)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
