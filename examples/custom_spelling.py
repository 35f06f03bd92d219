"""A spelling that latent does not know, what it says about it, and the pattern that teaches it:
`python examples/custom_spelling.py`.

The soft cap hides in an operator of one's own. Recognition cannot look inside, so the scores seem to come from nowhere.
A pattern says what the operator does to the scores it reads, and every built-in rewrite applies.
"""

import latent
import torch
from latent.rewriter.authoring import Scale, Tanh, args_of, read_scalar
from torch import Tensor


@torch.library.custom_op("mine::soft_clip", mutates_args=())
def soft_clip(scores: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(scores / cap)


soft_clip.register_fake(lambda scores, cap: torch.empty_like(scores))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = soft_clip(0.25 * q @ k.transpose(-1, -2), 30.0)
    return torch.softmax(scores, dim=-1) @ v


def read_soft_clip(node, scores):
    """soft_clip(scores, cap) = cap · tanh(scores / cap)."""
    if node.target is not torch.ops.mine.soft_clip.default:
        return None
    cap = read_scalar(args_of(node)[1])
    return None if cap is None else (Scale(node, 1 / cap), Tanh(node), Scale(node, cap))


def main() -> None:
    q, k, v = (torch.randn(2, 4, n, 16) for n in (6, 9, 9))
    print("before\n")
    print(latent.explain(attend)(q, k, v))
    latent.pattern("score_step")(read_soft_clip)
    print("\nwith the pattern\n")
    print(latent.explain(attend)(q, k, v))
    with torch.no_grad():
        compiled = torch.compile(attend, backend="latent", options={"expect": {"fuse_attention": 1}, "inner": "eager"})
        print(f"\nlargest difference from eager: {(compiled(q, k, v) - attend(q, k, v)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
