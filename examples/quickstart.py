"""Look at a model, compile it with latent, and compare: `python examples/quickstart.py`.

The attention is written by hand, with a view, a transpose and a softmax: no library call that names it.
"""

import latent
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Model(nn.Module):
    def __init__(self, layers: int = 4, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def make():
    """What the command line takes: `latent explain examples/quickstart.py:make`."""
    torch.manual_seed(0)
    return Model().eval(), (torch.randn(2, 16, 64),), {}


def main() -> None:
    model, (x,), _ = make()
    with torch.no_grad():
        # 1. look: nothing is compiled, nothing is changed
        print(latent.explain(model)(x))

        # 2. compile: exact rewrites, then inductor
        compiled = torch.compile(model, backend="latent")
        difference = (compiled(x) - model(x)).abs().max().item()
        print(f"\nlargest difference from eager: {difference:.1e}")

        # 3. keep it so: in a test, this raises when a change of the model loses an attention
        latent.check(model, expect={"attention": 4, "fuse_attention": 4})(x)


if __name__ == "__main__":
    main()
