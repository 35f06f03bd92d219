"""Every causal language model type of transformers through the backend: recall, soundness, no crash."""

from __future__ import annotations

import pytest
import torch
from latent.rewriter import history
from zoo.build import CannotBuild, causal_lm_types
from zoo.named import named
from zoo.sweep import Row, compare, summary, sweep

QUICK = ("mistral", "qwen3_next", "jamba", "openai-gpt", "xlnet", "prophetnet", "deepseek_v4", "diffllama")
RECALL = 0.98


@pytest.mark.parametrize("model_type", QUICK)
def test_every_attention_of_a_type_is_found_and_right(model_type: str) -> None:
    (row,) = sweep([model_type], "eager", torch.float32, None)
    assert row.perfect, str(row)


@pytest.mark.parametrize("name", [entry.name for entry in named()])
@pytest.mark.parametrize("attn", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
def test_named_architectures(name: str, attn: str) -> None:
    """The architectures that other matchers are measured on, encoders, and models written by hand."""
    (entry,) = named([name])
    torch._dynamo.reset()
    history.forget()
    try:
        built = entry.build(attn=attn)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    row = compare(name, built, torch.float32, None)
    assert row.perfect and row.found == entry.expected(built), str(row)


def test_routers_are_refused_with_a_reason() -> None:
    (row,) = sweep(["gpt_oss"], "eager", torch.float32, None)
    assert row.found == row.expected == 2
    misses = [miss for graph in history.reports().graphs for miss in graph.misses]
    assert [miss.path for miss in misses] == [f"model.layers.{layer}.mlp.router" for layer in (0, 1)]
    assert {miss.reason for miss in misses} == {"the scores do not come from a product of queries and keys"}


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_all_types(attn: str) -> None:
    rows: list[Row] = []
    for row in sweep(causal_lm_types(), attn, torch.float32, None):
        print(row, flush=True)
        rows.append(row)
    print(summary(rows))
    ran = [row for row in rows if not row.skipped]
    assert not [row.model_type for row in ran if row.crash or row.wrong]
    found = sum(min(row.found, row.expected) for row in ran)
    assert found >= RECALL * sum(row.expected for row in ran)
