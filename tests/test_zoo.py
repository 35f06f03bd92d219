"""The zoo itself: models build, repeat themselves, and execute the attentions one expects."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from zoo.build import CannotBuild, build, causal_lm_types, first_tensor
from zoo.count import attention_calls, count
from zoo.layers import choose_layers
from zoo.named import NAMED, Named
from zoo.shrink import tiny_config


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny operations lose far more to waking threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


REPRESENTATIVES = (
    # model type, attentions, other softmaxes, why it is here
    ("llama", 2, 0),  # the plain case
    ("gemma2", 2, 0),  # softcap, sliding and full layers
    ("gpt2", 2, 0),  # weights [in, out]
    ("bloom", 2, 0),  # slopes, baddbmm
    ("falcon", 2, 0),  # one key head
    ("deepseek_v3", 2, 0),  # latent keys and values, experts
    ("gpt_oss", 2, 2),  # sinks, softmax routers
    ("bart", 4, 0),  # cross attention
    ("qwen3_next", 1, 2),  # linear attention beside attention
    ("mamba", 0, 0),  # no attention
    ("deepseek_v4", 2, 7),  # softmaxes that mix and compress
    ("xlnet", 2, 0),  # relative positions, einsum
)
# Exactly these cannot run with this release of the library; every other type must.
CANNOT = {
    "gemma3n": "timm",
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",
    "gemma4_unified_assistant": "set of layer types",
}


@pytest.mark.parametrize(("model_type", "attentions", "others"), REPRESENTATIVES)
def test_representative_builds_repeats_and_counts(model_type: str, attentions: int, others: int) -> None:
    first, second = build(model_type), build(model_type)
    torch.testing.assert_close(first_tensor(first.run()), first_tensor(second.run()), rtol=0, atol=0)
    counts = count(first.model, first.inputs)
    assert (len(counts.attentions), len(counts.others)) == (attentions, others)
    assert all(site.spread > 1.5 for site in counts.attentions if not site.fused), "rows of weights are uniform"


@pytest.mark.parametrize("entry", NAMED, ids=lambda entry: entry.name)
def test_named_architecture_executes_the_attentions_of_its_layers(entry: Named) -> None:
    built = entry.build()
    assert attention_calls(built.model, built.inputs) == entry.expected(built)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v2", "bart"])
def test_fused_and_spelled_out_attention_count_and_compute_the_same(model_type: str) -> None:
    spelled, fused = build(model_type), build(model_type, attn="sdpa")
    assert attention_calls(spelled.model, spelled.inputs) == attention_calls(fused.model, fused.inputs)
    # rows that may attend to nothing are undefined, so only the row without padding is compared
    torch.testing.assert_close(first_tensor(spelled.run())[1], first_tensor(fused.run())[1], rtol=1e-3, atol=1e-3)


def test_refusal_is_in_the_words_of_the_model() -> None:
    with pytest.raises(CannotBuild, match="does not support an attention implementation"):
        build("gemma2", attn="sdpa")


def test_half_precision_runs() -> None:
    built = build("llama", dtype=torch.bfloat16)
    assert first_tensor(built.run()).dtype == torch.bfloat16


def test_seed_decides_weights_and_inputs() -> None:
    assert not torch.equal(first_tensor(build("gpt2").run()), first_tensor(build("gpt2", seed=1).run()))


def test_latent_widths_are_all_different() -> None:
    config = tiny_config("deepseek_v3")
    widths = (
        *(config.hidden_size, config.q_lora_rank, config.kv_lora_rank),
        *(config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim),
    )
    assert len(set(widths)) == len(widths)


def test_every_kind_of_layer_is_kept() -> None:
    kinds = ["slide", "slide", "full", "slide"]
    choice = choose_layers({"num_hidden_layers": 4, "layer_types": kinds, "first_k_dense_replace": 1})
    assert choice.kept == (0, 1, 2)
    assert choice.changes["layer_types"] == ["slide", "slide", "full"]
    assert choice.changes["first_k_dense_replace"] == 1


class _Program(nn.Module):
    """One spelling of something that has a softmax."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.ones(5, 8))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT / math.sqrt(8)
        match self.spelling:
            case "attention":
                return torch.dropout(scores.softmax(-1), 0.0, False).to(v.dtype) @ v
            case "einsum":
                return torch.einsum("bij,bjd->bid", scores.softmax(-1), v)
            case "logsumexp":
                return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v
            case "router":
                weights, chosen = (q @ self.weight.mT).softmax(-1).topk(2)
                return (weights[..., None] * self.weight[chosen]).sum(-2)
            case "mixing":
                return (q @ self.weight.mT).softmax(-1) @ self.weight
            case "gate":
                return torch.nn.functional.linear(scores.softmax(-1).amax(-1, keepdim=True) * v, self.weight)
        raise ValueError(self.spelling)


@pytest.mark.parametrize(
    ("spelling", "attentions"),
    [("attention", 1), ("einsum", 1), ("logsumexp", 1), ("router", 0), ("mixing", 0), ("gate", 0)],
)
def test_only_products_on_both_sides_make_an_attention(spelling: str, attentions: int) -> None:
    q, k, v = (torch.randn(2, 5, 8) for _ in range(3))
    counts = count(_Program(spelling), {"q": q, "k": k, "v": v})
    assert len(counts.attentions) == attentions
    assert len(counts.attentions) + len(counts.others) == 1


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal_lm_types())
def test_every_causal_language_model(model_type: str) -> None:
    if model_type in CANNOT:
        with pytest.raises(CannotBuild, match=CANNOT[model_type]):
            build(model_type)
        return
    built = build(model_type)
    counts = count(built.model, built.inputs)
    assert all(site.spread > 1.2 for site in counts.attentions if not site.fused)
