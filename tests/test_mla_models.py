"""Every model type of transformers that expands keys and values from a latent: greedy decoding, absorbed, as eager.

`pytest tests/test_mla_models.py -m "" -s` prints a line for each case.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import latent
import transformers
from latent.rewriter.report import GraphReport, Report
from test_generate import assert_same_tokens, generate
from zoo.build import Built, build, finish
from zoo.inputs import text_inputs
from zoo.shrink import tiny_config

MODELS = (
    *("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note", "glm4_moe_lite"),
    *("glm5_next", "glm_moe_dsa", "hy_v4", "kimi_linear", "longcat_flash", "minicpm3", "mistral4", "mistral_large4"),
    "youtu",
)
"""Those with a method `expand_kv`."""

CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "glm5_next": (
        "Glm5NextForConditionalGeneration",
        {"text_config": {"index_kpool": 2, "index_topk": 4, "qk_rope_head_dim": 0}},
    ),
    "mistral4": ("Mistral4ForCausalLM", {"head_dim": 16}),
    "mistral_large4": ("MistralLarge4ForConditionalGeneration", {}),
}
"""Types that the automatic class for text does not know, or whose small sizes must fit together."""

WITHOUT_SDPA = {"hy_v4"}
BROKEN = {"glm5_next"}
"""The graph ends between the expansion and attention, which then reads expanded keys as inputs."""

QUICK = {
    ("deepseek_v3", "eager", "static"),
    ("deepseek_v2", "sdpa", "dynamic"),
    ("glm_moe_dsa", "sdpa", "static"),
    ("minicpm3", "eager", "dynamic"),
}
CASES = [
    pytest.param(*case, id="-".join(case), marks=() if case in QUICK else pytest.mark.slow)
    for case in product(MODELS, ("eager", "sdpa"), ("dynamic", "static"))
    if not (case[0] in WITHOUT_SDPA and case[1] == "sdpa")
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def tiny(name: str, attn: str) -> Built:
    if name not in CLASSES:
        return build(name, attn=attn)
    model_class, changes = CLASSES[name]
    config = tiny_config(name, **changes)
    return finish(
        lambda: getattr(transformers, model_class)._from_config(config, attn_implementation=attn, dtype=torch.float32),
        text_inputs,
    )


def decoding(report: Report) -> list[GraphReport]:
    """The graphs of one query token."""
    return [graph for graph in report.graphs if {site.shape.queries for site in graph.sites} == {"1"}]


def counts(graphs: list[GraphReport]) -> str:
    absorbed = sum(graph.count("absorb_up_projection") for graph in graphs)
    return f"{absorbed} of {sum(len(graph.sites) for graph in graphs)} absorbed in {len(graphs)} graphs"


def reasons(graphs: list[GraphReport]) -> str:
    """Why sites were left as they are."""
    found = Counter(
        f"{verdict.outcome}: {verdict.reason}"
        for graph in graphs
        for verdict in graph.verdicts
        if verdict.rewrite == "absorb_up_projection" and verdict.outcome != "applied"
    )
    return "; ".join(f"{text} × {times}" for text, times in found.items())


@pytest.mark.parametrize(("name", "attn", "cache"), CASES)
def test_decoding_is_absorbed_and_as_eager(name: str, attn: str, cache: str) -> None:
    model = tiny(name, attn).model
    expected = generate(model, cache)
    model.compile(backend="latent", options={"inner": "eager", "strict": True})
    actual = generate(model, cache)
    error = max(float((a - b).abs().max()) for a, b in zip(actual.logits, expected.logits, strict=True))
    report = latent.reports()
    decode = decoding(report)
    rest = [graph for graph in report.graphs if graph.sites and graph not in decode]
    print(
        f"{name:15} {attn:5} {cache:7} logits {error:.0e}  decode {counts(decode)}  prefill {counts(rest)}"
        f"  {reasons(decode)}"
    )
    assert_same_tokens(actual, expected)
    assert not any(graph.failure for graph in report.graphs)
    assert decode
    for graph in decode:
        assert graph.count("absorb_up_projection") == (0 if name in BROKEN else len(graph.sites))
    if name in BROKEN:
        assert "the keys come from an input of the graph" in reasons(decode)


@pytest.mark.parametrize("cached", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_absorbing_rounds_no_more_than_twice_as_much_as_expanding(cached: int) -> None:
    """bfloat16 logits of a prefill and three tokens, compared with float64 ones: tokens may differ where these tie."""
    config = transformers.DeepseekV2Config(
        hidden_size=640,
        num_attention_heads=20,
        num_key_value_heads=20,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        intermediate_size=256,
        vocab_size=256,
        q_lora_rank=None,
    )
    torch.manual_seed(0)
    plain = transformers.DeepseekV2ForCausalLM(config).eval().to(torch.bfloat16)
    tokens = torch.randint(0, 256, (2, cached + 3))

    def logits(dtype: torch.dtype, backend: str | None) -> torch.Tensor:
        model = transformers.DeepseekV2ForCausalLM(config).eval().to(torch.bfloat16)
        model.load_state_dict(plain.state_dict())
        model.to(dtype)
        if backend:
            model.compile(backend=backend, options={"inner": "eager", "strict": True})
        cache = transformers.DynamicCache(config=config)
        with torch.no_grad():
            parts = [
                model(tokens[:, start:stop], past_key_values=cache).logits
                for start, stop in ((0, cached), *((cached + n, cached + n + 1) for n in range(3)))
            ]
        return torch.cat(parts, 1).double()

    exact = logits(torch.float64, None)
    expanded, absorbed = (logits(torch.bfloat16, backend) - exact for backend in (None, "latent"))
    decode = decoding(latent.reports())
    assert decode and all(graph.count("absorb_up_projection") == 2 for graph in decode)
    for tokens_of in (slice(0, cached), slice(cached, None)):
        ours, own = (error[:, tokens_of].square().mean().sqrt() for error in (absorbed, expanded))
        print(f"{cached} cached, {tokens_of}: {ours:.1e} absorbed, {own:.1e} expanded")
        assert ours <= 2 * own
