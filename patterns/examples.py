"""What the built-in patterns read, an example for each: plain PyTorch, and the dimensions of its arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QKV = {"q": "B H S D", "k": "B H T D", "v": "B H T E"}
HIDDEN = float("-inf")


def _future(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


# ** softmaxes **


def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def of_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).log_softmax(-1).exp() @ v


def less_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return e / e.sum(-1, keepdim=True) @ v


# ** steps of scores **


def in_double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).double().softmax(-1).float() @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (2 * (q @ k.mT / 2).tanh()).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores.masked_fill(_future(scores), HIDDEN).softmax(-1) @ v


def assigned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, _future(scores)] = HIDDEN
    return scores.softmax(-1) @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1] @ v


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.pad(q @ k.mT, (1, 0)).softmax(-1)[..., 1:] @ v


def floored(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias).clamp(min=torch.finfo(q.dtype).min).softmax(-1) @ v


# ** steps of weights **


def weights_in_double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).double() @ v.double()


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.1, True) @ v


def without_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).nan_to_num() @ v


def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return (gate * (q @ k.mT).softmax(-1)) @ v


# ** calls **


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)
