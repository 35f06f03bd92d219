"""A spelling that latent does not know, and the pattern that teaches it: `python examples/custom_spelling.py`.

The soft cap hides in an operator of one's own. Recognition cannot look inside, so the attention is a near miss. The
pattern says what the operator does to the scores it reads, and every built-in rewrite applies.
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


@latent.pattern("score_step", examples=((attend, dict(q="B H S D", k="B H T D", v="B H T E")),))
def read_soft_clip(node, scores):
    """soft_clip(scores, cap) = cap · tanh(scores / cap)."""
    if node.target is not torch.ops.mine.soft_clip.default:
        return None
    cap = read_scalar(args_of(node)[1])
    return None if cap is None else (Scale(node, 1 / cap), Tanh(node), Scale(node, cap))


def main() -> None:
    print("what it is worth: the example without the pattern, and with it\n")
    print(latent.testing.check_pattern(read_soft_clip))
    q, k, v = (torch.randn(2, 4, n, 16) for n in (6, 9, 9))
    print("\n" + str(latent.explain(attend)(q, k, v)))
    with torch.no_grad():
        compiled = torch.compile(attend, backend="latent", options={"expect": {"fuse_attention": 1}, "inner": "eager"})
        print(f"\nlargest difference from eager: {(compiled(q, k, v) - attend(q, k, v)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
