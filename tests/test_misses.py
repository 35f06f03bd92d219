"""Broken attention: the report names the user's line and the one condition that failed, in at most ten lines.

Every function is attention but for one line, which is marked. Whether it is a near miss, a site that no rewrite takes,
or a graph break between its halves, what is said about it has that line in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import latent
import pytest
import torch
import torch.nn.functional as F
from latent.rewriter.report import Report
from torch import Tensor

VISIBLE = torch.ones(6, 6, dtype=torch.bool).tril()
GATE = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    reason: str

    @property
    def line(self) -> str:
        """file:line of the marked line."""
        lines, first = inspect.getsourcelines(self.function)
        (number,) = (n for n, text in enumerate(lines) if text.rstrip().endswith("# here"))
        return f"test_misses.py:{first + number}"


CASES: list[Case] = []


def broken(reason: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        CASES.append(Case(function, reason))
        return function

    return register


# ** the softmax **


@broken("normalises axis -2 of the scores, but the values are summed over axis -1")
def softmax_over_queries(q, k, v):
    weights = (q @ k.mT / 2).softmax(-2)
    return weights @ v  # here


@broken("runs over an axis (size 3) that queries and keys share, like heads")
def softmax_over_heads(q, k, v):
    scores = q @ k.mT / 2
    weights = scores.softmax(1)  # here
    return weights @ v


@broken("normalises axis -1 of the scores, but the values are summed over axis -2")
def values_of_the_wrong_tokens(q, k, v):
    weights = (q @ k.mT / 2).softmax(-1)
    return torch.einsum("bhij,bhie->bhje", weights, v)  # here


@broken("no softmax: the weights are made of the scores by sigmoid")
def sigmoid_for_softmax(q, k, v):
    scores = q @ k.mT / 2
    weights = scores.sigmoid()  # here
    return weights @ v


@broken("no softmax: the weights are made of the scores by linalg_vector_norm, clamp_min, div")
def norm_for_softmax(q, k, v):
    scores = q @ k.mT / 2
    weights = F.normalize(scores, p=1.0, dim=-1)  # here
    return weights @ v


@broken("no softmax: the weights are made of the scores by exp, sum, div")
def one_sum_for_all_rows(q, k, v):
    exponentials = (q @ k.mT / 2).exp()
    weights = exponentials / exponentials.sum()  # here
    return weights @ v


# ** before it **


@broken("the product of queries and keys goes through mul by itself, which is no step of attention")
def squared_scores(q, k, v):
    scores = q @ k.mT / 2
    scores = scores * scores  # here
    return scores.softmax(-1) @ v


@broken("the product of queries and keys goes through clamp, which is no step of attention")
def clamped_scores(q, k, v):
    scores = q @ k.mT / 2
    scores = scores.clamp(-1.0, 1.0)  # here
    return scores.softmax(-1) @ v


@broken("single scores are multiplied by a tensor that varies over queries and keys")
def gated_scores(q, k, v):
    scores = q @ k.mT / 2
    scores = scores * GATE  # here
    return scores.softmax(-1) @ v


@broken("the scores are written in between")
def overwritten_scores(q, k, v):
    scores = q @ k.mT / 2
    scores[..., 0] = 0.0  # here
    return scores.softmax(-1) @ v


@broken("the key is written in between")
def overwritten_keys(q, k, v):
    scores = q @ k.mT / 2
    k.mul_(2.0)  # here
    return scores.softmax(-1) @ v


# ** behind it **


@broken("the attention weights are multiplied by a tensor after the softmax")
def gated_weights(q, k, v):
    weights = (q @ k.mT / 2).softmax(-1)
    weights = weights * GATE  # here
    return weights @ v


@broken("the weights are masked after the softmax, and the scores before it are not")
def mask_behind_the_softmax(q, k, v):
    weights = (q @ k.mT / 2).softmax(-1)
    weights = weights.masked_fill(~VISIBLE, 0.0)  # here
    return weights @ v


@broken("something is added to the weights after the softmax")
def two_softmaxes_averaged(q, k, v):
    one, two = (q @ k.mT / 2).softmax(-1), (q.flip(-1) @ k.mT).softmax(-1)
    weights = (one + two) / 2  # here
    return weights @ v


@broken("the weights go through cumsum, which is no step of attention")
def running_weights(q, k, v):
    weights = (q @ k.mT / 2).softmax(-1)
    weights = weights.cumsum(-1)  # here
    return weights @ v


@broken("dropout of the weights is active")
def dropout_in_training(q, k, v):
    weights = (q @ k.mT / 2).softmax(-1)
    weights = F.dropout(weights, 0.1, training=True)  # here
    return weights @ v


@broken("graph break")
def graph_break_in_between(q, k, v):
    weights = (q @ k.mT / 2).softmax(-1)
    torch._dynamo.graph_break()  # here
    return weights @ v


def report_on(case: Case) -> Report:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return latent.explain(case.function)(*(torch.randn(2, 3, 6, 4, generator=generator) for _ in range(3)))


def explanations(report: Report) -> list[list[str]]:
    """What the text says of every near miss, every refusal of the first fusing rewrite, and every graph break."""
    blocks: list[list[str]] = []
    lines = str(report).splitlines()
    starts = ("near miss", "  – fuse_attention", "  graph break")
    for n, line in enumerate(lines):
        if line.startswith(starts):
            indent = len(line) - len(line.lstrip())
            more = [i for i in range(n + 1, len(lines)) if len(lines[i]) - len(lines[i].lstrip()) <= indent]
            blocks.append(lines[n : more[0] if more else None])
    return blocks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.function.__name__)
def test_a_miss_names_the_line_and_the_condition(case: Case) -> None:
    report = report_on(case)
    assert report.count("fuse_attention") == 0
    found = explanations(report)
    (said,) = [block for block in found if case.line in " ".join(block)]
    assert case.reason in " ".join(line.strip() for line in said)
    assert sum(map(len, found)) <= 10


def test_the_two_halves_of_a_graph_break_are_told() -> None:
    (case,) = (case for case in CASES if case.reason == "graph break")
    (miss,) = report_on(case).near_misses
    assert "the weights leave the graph" in miss.reason


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: q @ k.mT @ v,  # linear attention: products in a row
        lambda q, k, v: (q @ k.mT * 0.5**GATE) @ v,  # with decay
        lambda q, k, v: F.linear(F.gelu(F.linear(q, k[0, 0])), v[0, 0].mT),  # two layers with given weights
        lambda q, k, v: (q @ k.mT).sigmoid().sum(-1),  # no values
    ],
    ids=["products", "decay", "layers", "no-values"],
)
def test_products_without_a_softmax_are_no_near_miss_by_themselves(function: Callable[..., Tensor]) -> None:
    assert report_on(Case(function, "")).near_misses == ()


def test_what_attention_allows_is_no_miss() -> None:
    def thresholded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * q.abs().amax()
        least = scores.topk(2, -1).values[..., -1:]
        return scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v

    assert report_on(Case(thresholded, "")).count("fuse_attention") == 1
