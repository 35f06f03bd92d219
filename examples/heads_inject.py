"""Task embeddings mixed into the outputs of heads, by a learned number for each: `python examples/heads_inject.py`.

Soft injection: out_h' = (1 - a_h) out_h + a_h t_h, where t_h is what head h gave at the end of prompts that show a
task. The numbers a_h are trained through the compiled model, which is not edited. Lossy; runs only when named.
"""

import latent
import torch
import torch.nn.functional as F
from torch import nn

MIX = nn.Parameter(torch.zeros(4))
TASK = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def attention(q, k, v, mask, scale):
    scores = scale * (q @ k.transpose(-1, -2))
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def injected(q, k, v, mask, scale):
    a = MIX.sigmoid().view(-1, 1, 1)
    return (1 - a) * F.scaled_dot_product_attention(q, k, v, mask, scale=scale) + a * TASK.unsqueeze(1)


latent.replace(
    "inject_task",
    attention,
    injected,
    example=dict(q="B H S D", k="B H T D", v="B H T E", mask="B H S T | None", scale=0.1),
    sizes={"H": 4, "E": 8},
    exact=False,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, by_hand=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if by_hand:  # the reference
            heads = torch.lerp(heads, TASK.unsqueeze(1).expand_as(heads), MIX.sigmoid().view(-1, 1, 1))
        return x + self.out(heads.transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model, x = Attention().eval().requires_grad_(False), torch.randn(2, 10, 32)
    print(latent.explain(model, rewrites="inject_task")(x))
    edited = torch.compile(model, backend="latent", options={"rewrites": "inject_task"})(x)
    by_hand = model(x, by_hand=True)
    print(f"\nfrom the model as it is:    {(edited - model(x)).abs().max().item():.1e}")
    print(f"from the edit made by hand: {(edited - by_hand).abs().max().item():.1e}")
    one, other = (torch.autograd.grad(result.square().sum(), MIX)[0] for result in (edited, by_hand))
    print(f"gradients of the mixing:    {(one - other).abs().max().item():.1e} apart, of {one.abs().max().item():.1e}")


if __name__ == "__main__":
    main()
