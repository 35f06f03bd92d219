"""Greedy generation: the same tokens as eager, with every cache and spelling, and no more compilations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import latent
from transformers import CompileConfig
from zoo.build import build

MODELS = ("llama", "mistral", "deepseek_v3", "mixtral", "gemma2", "gpt2", "gpt_neox", "falcon")
NEW_TOKENS = 12
EAGER = {"inner": "eager", "strict": True}
WITHOUT_SDPA = {"gemma2"}


@dataclass(frozen=True)
class Case:
    model: str
    attn: str
    cache: str
    dynamic: bool | None

    def __str__(self) -> str:
        return f"{self.model}-{self.attn}-{self.cache}-dynamic={self.dynamic}"


EVERY = tuple(
    Case(*case)
    for case in product(MODELS, ("eager", "sdpa"), ("dynamic", "static"), (None, True))
    if not (case[0] in WITHOUT_SDPA and case[1] == "sdpa")
)
QUICK = (
    Case("llama", "eager", "dynamic", None),
    Case("llama", "eager", "static", True),
    Case("mistral", "sdpa", "dynamic", True),
    Case("mistral", "eager", "static", None),
    Case("deepseek_v3", "eager", "dynamic", True),
    Case("deepseek_v3", "sdpa", "static", None),
    Case("mixtral", "sdpa", "static", None),
    Case("gemma2", "eager", "dynamic", None),
    Case("gemma2", "eager", "static", True),
    Case("gpt2", "eager", "dynamic", True),
    Case("gpt_neox", "sdpa", "dynamic", None),
    Case("falcon", "sdpa", "dynamic", True),
)
WITH_INDUCTOR = (
    Case("llama", "eager", "dynamic", None),
    Case("llama", "sdpa", "static", True),
    Case("mistral", "eager", "static", None),
    Case("deepseek_v3", "sdpa", "dynamic", True),
    Case("gpt2", "eager", "dynamic", True),
)


def _slow(cases: tuple[Case, ...], quick: tuple[Case, ...] = ()) -> list[Any]:
    return [pytest.param(case, id=str(case), marks=() if case in quick else pytest.mark.slow) for case in cases]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def prompts() -> dict[str, torch.Tensor]:
    """Two rows, the first padded on the left."""
    ids = torch.randint(12, 30, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, cache: str, **changes: Any) -> Any:
    """Greedy tokens and the logits behind them; no token ends the text."""
    with torch.no_grad():
        return model.generate(
            **{**prompts(), **changes},
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            cache_implementation="static" if cache == "static" else None,
            return_dict_in_generate=True,
            output_logits=True,
        )


def assert_same_tokens(actual: Any, expected: Any) -> None:
    """Equal tokens; if not, the first step that differs says whether it was a tie or a wrong logit."""
    for step, (got, wanted) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        if not torch.equal(got.argmax(-1), wanted.argmax(-1)):
            best = wanted.topk(2).values
            margin = float((best[:, 0] - best[:, 1]).min())
            error = float((got - wanted).abs().max())
            why = "a tie" if margin <= 2 * error < 1e-4 else "wrong logits"
            raise AssertionError(f"token {step}: {why}; the best two {margin:.1e} apart, logits off by {error:.1e}")
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4, msg=lambda text, n=step: f"token {n}: {text}")
    assert torch.equal(actual.sequences, expected.sequences)


def check(case: Case, options: dict[str, Any]) -> None:
    model = build(case.model, attn=case.attn).model
    expected = generate(model, case.cache)
    model.compile(backend="latent", dynamic=case.dynamic, options=options)
    assert_same_tokens(generate(model, case.cache), expected)
    report = latent.reports()
    assert report.graphs and not any(graph.failure for graph in report.graphs)
    assert {verdict.outcome for verdict in report.verdicts} <= {"applied", "refused", "not paying", "off"}
    assert all(len(graph.sites) == model.config.num_hidden_layers for graph in report.graphs)
    if case.attn == "eager":
        fused, absorbed = report.count("fuse_attention"), report.count("absorb_up_projection")
        assert fused + absorbed == len(report.sites)


@pytest.mark.parametrize("case", _slow(EVERY, QUICK))
def test_tokens_are_those_of_eager(case: Case) -> None:
    check(case, EAGER)


@pytest.mark.parametrize("case", _slow(WITH_INDUCTOR))
def test_tokens_are_those_of_eager_through_inductor(case: Case) -> None:
    check(case, {"strict": True})


@pytest.mark.parametrize("model_type", ["llama", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("attn", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
def test_automatic_compilation_of_the_library(model_type: str, attn: str) -> None:
    model = build(model_type, attn=attn).model
    expected = generate(model, "static")
    config = CompileConfig(backend="latent", mode=None, options=EAGER)
    config._compile_all_devices = True
    assert_same_tokens(generate(model, "static", compile_config=config), expected)
    assert len(latent.reports().graphs) == 1, "only decoding is compiled there, and once"


@pytest.mark.slow
def test_automatic_compilation_with_the_default_mode_of_the_library() -> None:
    model = build("llama").model
    expected = generate(model, "static")
    config = CompileConfig(backend="latent")
    config._compile_all_devices = True
    assert_same_tokens(generate(model, "static", compile_config=config), expected)


# ** models that nothing here was written for **

FAMILIES = (
    *("mpt", "gpt_bigcode", "codegen", "stablelm", "cohere2", "persimmon", "nemotron", "glm4", "exaone4", "smollm3"),
    *("diffllama", "doge", "gemma3_text", "xglm"),
)
ONLY_EAGER = {"mpt", "codegen", "xglm"}
OTHERS = [
    pytest.param(Case(*case), id=str(Case(*case)), marks=pytest.mark.slow)
    for case in product(FAMILIES, ("eager", "sdpa"), ("dynamic", "static"), (None, True))
    if not (case[0] in ONLY_EAGER and case[1] == "sdpa")
]


@pytest.mark.parametrize("case", OTHERS)
def test_other_families(case: Case) -> None:
    """Three rows, two of them padded on the left; every attention spelled out is fused."""
    ids = torch.randint(12, 30, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[2, :4] = 0
    rows = {"input_ids": ids, "attention_mask": mask}
    model = build(case.model, attn=case.attn).model
    expected = generate(model, case.cache, **rows)
    model.compile(backend="latent", dynamic=case.dynamic, options=EAGER)
    assert_same_tokens(generate(model, case.cache, **rows), expected)
    report = latent.reports()
    assert report.graphs and not any(graph.failure or graph.near_misses for graph in report.graphs)
    done = report.count("fuse_attention") + report.count("absorb_up_projection")
    assert report.sites and (case.attn == "sdpa" or done == len(report.sites))


# ** compilations **


def compilations(case: Case, backend: Any, options: dict[str, Any] | None, tokens: int = NEW_TOKENS) -> int:
    """How often generation calls a backend; "latent" counts by its reports."""
    calls: list[int] = []

    def counting(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        calls.append(len(gm.graph.nodes))
        if backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(gm, example_inputs)
        return gm.forward

    torch._dynamo.reset()
    model = build(case.model, attn=case.attn).model
    model.compile(backend="latent" if backend == "latent" else counting, dynamic=case.dynamic, options=options)
    with torch.no_grad():
        model.generate(
            **prompts(),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            cache_implementation="static" if case.cache == "static" else None,
        )
    return len(latent.reports().graphs) if backend == "latent" else len(calls)


@pytest.mark.parametrize("case", _slow(EVERY, (Case("mistral", "sdpa", "dynamic", None),)))
def test_no_more_compilations_than_without_rewriting(case: Case) -> None:
    assert compilations(case, "latent", EAGER) <= compilations(case, "eager", None)


@pytest.mark.slow
@pytest.mark.parametrize("case", _slow(WITH_INDUCTOR))
def test_no_more_compilations_than_with_inductor(case: Case) -> None:
    assert compilations(case, "latent", {"strict": True}) <= compilations(case, "inductor", None)


@pytest.mark.parametrize("cache", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_longer_text_compiles_no_more(cache: str) -> None:
    case = Case("llama", "eager", cache, None)
    assert compilations(case, "latent", EAGER, 4) == compilations(case, "latent", EAGER, 9)
