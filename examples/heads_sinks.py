"""Attention taken from sink tokens and given to image tokens: `python examples/heads_sinks.py`.

Visual attention redistribution (VAR): in heads that look at the image, a share of what every query spends on sink
tokens is spread over the image's tokens, in proportion to the attention they have. Lossy; runs only when named.
"""

import latent
import torch
import torch.nn.functional as F
from torch import nn

TOKENS, SHARE = 12, 0.6
HEADS = torch.tensor([False, True, True, False]).view(-1, 1, 1)
SINKS = (torch.arange(TOKENS) < 1).float()
IMAGE = ((torch.arange(TOKENS) >= 2) & (torch.arange(TOKENS) < 8)).float()


def redistribute(weights):
    freed, image = SHARE * weights * SINKS, weights * IMAGE
    given = image / image.sum(-1, keepdim=True).clamp(min=1e-9) * freed.sum(-1, keepdim=True)
    sees_image = image.sum(-1, keepdim=True) > 0
    return torch.where(HEADS & sees_image, weights - freed + given, weights)


def attention(q, k, v, mask, scale):
    return torch.softmax(scale * (q @ k.transpose(-1, -2)) + mask, -1) @ v


def redistributed(q, k, v, mask, scale):
    return redistribute(torch.softmax(scale * (q @ k.transpose(-1, -2)) + mask, -1)) @ v


latent.replace(
    "redistribute_sinks",
    attention,
    redistributed,
    example=dict(q="B H S D", k="B H S D", v="B H S E", mask="B H S S", scale=0.1),
    sizes={"H": 4, "S": TOKENS},
    where=lambda at: at.S == TOKENS,
    exact=False,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, by_hand=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        if by_hand:  # the reference
            causal = torch.ones(TOKENS, TOKENS).tril().log()
            heads = redistribute((q @ k.mT / 8**0.5 + causal).softmax(-1)) @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(heads.transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, TOKENS, 32)
    with torch.no_grad():
        print(latent.explain(model, rewrites="redistribute_sinks")(x))
        edited = torch.compile(model, backend="latent", options={"rewrites": "redistribute_sinks"})(x)
        print(f"\nfrom the model as it is:    {(edited - model(x)).abs().max().item():.1e}")
        print(f"from the edit made by hand: {(edited - model(x, by_hand=True)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
