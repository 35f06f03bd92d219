"""Heads that see spans: prefill, rings and permuted heads against dense attention under a mask for every head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import latent
import pytest
import torch
import transformers
from latent.passes.recipes.head_spans import HeadSpans
from latent.passes.recipes.joint_latent import JointLatent
from latent.rewriter.convert import span_attention
from latent.rewriter.convert.layers import ConversionRefused
from latent.rewriter.convert.span_plan import PlanError, SpanPlan
from latent.rewriter.convert.spans import Full, Span, Strided, Window, seen
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 3}
MODELS = {
    "llama": (transformers.LlamaConfig, GROUPED),
    "qwen2": (transformers.Qwen2Config, GROUPED),
    "gpt_neox": (transformers.GPTNeoXConfig, {**SIZES, "rotary_pct": 0.5}),
    "gemma2": (
        transformers.Gemma2Config,
        {**GROUPED, "head_dim": 8, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": (transformers.MistralConfig, {**GROUPED, "sliding_window": 11}),
}
SPANS: tuple[Span, ...] = (Window(2, 3, 0.25), Full(), Window(0, 5))


def model_of(name: str = "llama", spelling: str = "sdpa") -> Any:
    config, sizes = MODELS[name]
    spelling = "eager" if name == "gemma2" else spelling
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config(**sizes, attn_implementation=spelling))
    return made.double().eval()


def plan_of(model: Any, spans: Sequence[Span] = SPANS) -> SpanPlan:
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    spans = tuple(spans[g % len(spans)] for g in range(heads))
    return SpanPlan((spans, spans[::-1]))


def converted(model: nn.Module, plan: SpanPlan) -> Any:
    return latent.convert(model, HeadSpans(plan=plan))


def ids(rows: int = 2, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(2, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference(model: Any, plan: SpanPlan, tokens: Tensor, padding: Sequence[int] = ()) -> Tensor:
    """The unchanged model, its layers given a mask for every head."""
    model = copy.deepcopy(model)
    length = tokens.shape[1]
    starts = torch.tensor(list(padding) or [0] * len(tokens))
    at = torch.arange(length) - starts[:, None]
    query, key = at[:, :, None], at[:, None, :]
    layers = (model.gpt_neox if hasattr(model, "gpt_neox") else model.model).layers

    def masked(n: int) -> Any:
        each = torch.stack([seen(span, query, key) for span in plan.layers[n]], 1)
        own = each.repeat_interleave(model.config.num_attention_heads // each.shape[1], 1)
        own = own | torch.eye(length, dtype=torch.bool)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        hide = torch.zeros(own.shape, dtype=torch.float64).masked_fill(~own, torch.finfo(torch.float64).min)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            given = kwargs["attention_mask"]
            if given is None:
                given = own & causal
            mask = own & given if given.dtype == torch.bool else torch.minimum(given, hide)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    for n, layer in enumerate(layers):
        attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
        attention.register_forward_pre_hook(masked(n), with_kwargs=True)
    shown = (torch.arange(length) >= starts[:, None]).long()
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=shown, position_ids=at.clamp_min(0), use_cache=False).logits  # type: ignore[no-any-return]


@torch.no_grad()
def by_steps(model: Any, tokens: Tensor, cache: Any, pieces: Sequence[int], shown: Tensor | None = None) -> Tensor:
    """Logits of calls of so many tokens each."""
    made, at = [], 0
    whole = torch.ones_like(tokens) if shown is None else shown
    places = (whole.cumsum(1) - 1).clamp_min(0)
    for size in pieces:
        end = at + size
        given = {"attention_mask": whole[:, :end]} if shown is not None else {}
        output = model(
            input_ids=tokens[:, at:end], position_ids=places[:, at:end], past_key_values=cache, use_cache=True, **given
        )
        made.append(output.logits)
        at = end
    return torch.cat(made, 1)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.fixture(params=[1, span_attention.BLOCK], ids=["blocks", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(span_attention, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_is_dense_attention_under_the_masks(name: str, spelling: str, block: int) -> None:
    model = model_of(name, spelling)
    plan = plan_of(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = converted(model, plan)
    with torch.no_grad():
        # eager models take their softmax in 32 bits
        close(
            made(input_ids=ids()).logits,
            reference(model, plan, ids()),
            1e-11 if spelling == "sdpa" and name != "gemma2" else 1e-6,
        )
        assert made(input_ids=ids()).logits.sub(model(input_ids=ids()).logits).abs().max() > 1e-3
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("pieces", [[1] * 40, [7, 1, 1, 12, 1, 18], [24, 16]], ids=["ones", "mixed", "halves"])
@pytest.mark.parametrize("length", [None, 40, 64])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_rings_give_what_the_whole_text_gives(name: str, length: int | None, pieces: list[int], block: int) -> None:
    model = model_of(name)
    plan = plan_of(model, (Window(2, 3, 0.25), Full(), Strided(3, 2, 3, 1)))
    made = converted(model, plan)
    close(by_steps(made, ids(), latent.LatentCache(made, length), pieces), reference(model, plan, ids()), 1e-12)


@pytest.mark.parametrize("length", [None, 48])
@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_are_as_alone(name: str, length: int | None) -> None:
    model = model_of(name)
    plan = plan_of(model, (Window(2, 3, 0.25), Strided(2, 2, 3, 1), Window(3, 5)))
    made = converted(model, plan)
    tokens, padding = ids(3, 40), [0, 9, 31]
    shown = (torch.arange(40) >= torch.tensor(padding)[:, None]).long()
    wanted = reference(model, plan, tokens, padding)
    for pieces in ([32, *[1] * 8], [20, 12, 1, 7]):
        found = by_steps(made, tokens, latent.LatentCache(made, length), pieces, shown)
        for row, start in enumerate(padding):
            if name != "gemma2":  # transformers' own has no number in padding in 64 bits
                close(found[row, start:], wanted[row, start:])
            alone = by_steps(made, tokens[row : row + 1, start:], None, [40 - start])
            close(found[row, start:], alone[0])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_of_transformers_give_the_same_and_save_nothing(cache: str) -> None:
    for name in ("llama", "mistral"):
        model = model_of(name)
        plan = plan_of(model)
        made = converted(model, plan)
        past = (
            transformers.DynamicCache(config=model.config)
            if cache == "dynamic"
            else transformers.StaticCache(config=model.config, max_cache_len=48)
        )
        tokens = ids(1)
        close(by_steps(made, tokens, past, [20, 1, 1, 17, 1]), reference(model, plan, tokens))


def test_a_foreign_window_and_several_rows_are_refused() -> None:
    made = converted(model_of("mistral"), plan_of(model_of("mistral")))
    past = transformers.DynamicCache(config=made.config)
    shown = torch.ones(2, 40, dtype=torch.long)
    shown[0, :8] = 0
    with pytest.raises(ValueError, match=r"LatentCache\(model\)"):
        by_steps(made, ids(), past, [20, 20], shown)
