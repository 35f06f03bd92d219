"""Every causal language model type of transformers through the backend: recall, soundness, no crash."""

from __future__ import annotations

import pytest
import torch
from zoo.build import causal_lm_types
from zoo.sweep import Row, summary, sweep

QUICK = ("mistral", "gemma2", "gpt_neox", "bloom", "falcon", "deepseek_v3", "gpt_oss", "openai-gpt", "xlnet", "whisper")
RECALL = 0.98


@pytest.mark.parametrize("model_type", QUICK)
def test_every_attention_of_a_type_is_found_and_right(model_type: str) -> None:
    (row,) = sweep([model_type], "eager", torch.float32, None)
    assert row.perfect, str(row)


def test_routers_are_no_attention() -> None:
    (row,) = sweep(["gpt_oss"], "eager", torch.float32, None)
    assert row.found == row.expected == 2


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
