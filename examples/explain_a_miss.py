"""Two softmaxes that look like attention, and what latent says about each: `python examples/explain_a_miss.py`.

The first normalises over the queries instead of the keys, a slip that runs without an error. The second is attention
whose weights are read a second time, so a fused operator, which never stores them, cannot stand in for it.
"""

import latent
import torch


def wrong_axis(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.transpose(-1, -2)).softmax(dim=-2)
    return weights @ v


def weights_are_returned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = (q @ k.transpose(-1, -2)).softmax(dim=-1)
    return weights @ v, weights


def main() -> None:
    q, k, v = (torch.randn(2, 4, n, 16) for n in (6, 8, 8))
    print("1. no attention: a near miss\n")
    print(latent.explain(wrong_axis)(q, k[:, :, :6], v[:, :, :6]))
    print("\n2. attention that no rewrite takes\n")
    print(latent.explain(weights_are_returned)(q, k, v))


if __name__ == "__main__":
    main()
