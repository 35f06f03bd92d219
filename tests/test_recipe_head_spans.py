"""Heads that see spans: prefill, rings and permuted heads against dense attention under a mask for every head."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import latent
import pytest
import torch
import transformers
from convert_models import without_experts
from latent.passes.recipes.head_spans import HeadSpans, SpanReach, permute_heads
from latent.passes.recipes.joint_latent import JointLatent
from latent.passes.recipes.routed_heads import RoutedHeads
from latent.rewriter.convert.attention import ConvertedAttention
from latent.rewriter.convert.calibrate import Calibration
from latent.rewriter.convert.layers import ConversionRefused, Decoder
from latent.rewriter.convert.read_decoder import read_decoder
from latent.rewriter.convert.spans import attention as span_attention
from latent.rewriter.convert.spans.plan import SpanPlan
from latent.rewriter.convert.spans.span import Full, Span, Strided, Window, seen
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
    "gpt_oss": (
        transformers.GptOssConfig,
        {**GROUPED, "head_dim": 8, "sliding_window": 9, "num_local_experts": 1},
    ),
    "qwen3_5": (transformers.Qwen3_5TextConfig, {**GROUPED, "head_dim": 8, "layer_types": ["full_attention"] * 2}),
}
EAGER = ("gemma2", "gpt_oss")
FLOAT32 = ("gemma2", "qwen3_5")
"""Whose softmax or norms are float32 whatever the weights are."""

SPANS: tuple[Span, ...] = (Window(2, 3, 0.25), Full(), Window(0, 5))


@functools.cache
def model_of(name: str = "llama", spelling: str = "sdpa") -> Any:
    config, sizes = MODELS[name]
    spelling = "eager" if name in EAGER else spelling
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config(**sizes, attn_implementation=spelling))
    return without_experts(made).double().eval()


def plan_of(model: Any, spans: Sequence[Span] = SPANS) -> SpanPlan:
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    spans = tuple(spans[g % len(spans)] for g in range(heads))
    return SpanPlan((spans, spans[::-1]))


@functools.cache
def decoder_of(model: Any) -> Decoder:
    return read_decoder(model)


def converted(model: Any, plan: SpanPlan) -> Any:
    """As latent.convert, with what was read of the model before."""
    return by_recipes(model, [HeadSpans(plan=plan)], None)


def by_recipes(model: Any, recipes: Sequence[Any], tokens: Tensor | None) -> Any:
    decoder = decoder_of(model)
    attentions = [ConvertedAttention.of(layer) for layer in decoder.layers]
    for one in recipes:
        one.convert(attentions, decoder, Calibration(model, tokens))
    made = copy.deepcopy(model)
    for layer, attention in zip(decoder.layers, attentions, strict=True):
        made.set_submodule(layer.path, attention.eval())
    return made


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


@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_is_dense_attention_under_the_masks(name: str, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name, spelling)
    plan = plan_of(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = converted(model, plan)
    wanted = reference(model, plan, ids())
    for block in (1, 7, 256):
        monkeypatch.setattr(span_attention, "BLOCK", block)
        with torch.no_grad():  # eager models take their softmax in 32 bits
            close(made(input_ids=ids()).logits, wanted, 1e-11 if spelling == "sdpa" and name not in FLOAT32 else 1e-6)
    with torch.no_grad():
        assert (wanted - model(input_ids=ids()).logits).abs().max() > 1e-3
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("length", [None, 40, 64])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_rings_give_what_the_whole_text_gives(name: str, length: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    plan = plan_of(model, (Window(2, 3, 0.25), Full(), Strided(3, 2, 3, 1)))
    made = converted(model, plan)
    wanted = reference(model, plan, ids())
    for block, pieces in ((1, [1] * 40), (1, [7, 1, 1, 12, 1, 18]), (256, [7, 1, 1, 12, 1, 18]), (1, [24, 16])):
        monkeypatch.setattr(span_attention, "BLOCK", block)
        close(by_steps(made, ids(), latent.LatentCache(made, length), pieces), wanted, 1e-12)


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
                close(found[row, start:], wanted[row, start:], 1e-6 if name in FLOAT32 else 1e-11)
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


def test_spans_as_long_as_the_text_and_permuted_heads_change_nothing() -> None:
    for name in ("llama", "gpt_neox"):
        model = model_of(name)
        long = plan_of(model, (Window(1, 40), Full(), Strided(4, 10, 5), Window(39, 1)))
        layers, heads = 2, len(long.layers[0])
        with torch.no_grad():
            wanted = model(input_ids=ids()).logits
            for plan in (
                long,
                SpanPlan.streaming(layers, heads, [(n, g) for n in range(layers) for g in range(heads)]),
                SpanPlan.strided(layers, heads, stride=1),
                SpanPlan.uniform(layers, heads, Strided(4, 1, 1)),
                SpanPlan.uniform(layers, heads, Window(39, 1)),
            ):
                close(converted(model, plan)(input_ids=ids()).logits, wanted)


@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_heads_in_any_order_give_the_same(name: str) -> None:
    decoder = decoder_of(model_of(name))
    hidden = torch.randn(2, 7, 48, dtype=torch.float64)
    turns = torch.randn(2, 2, 7, 4 if name == "gpt_neox" else 8, dtype=torch.float64)
    for layer in decoder.layers:
        plain, moved = (ConvertedAttention.of(layer) for _ in range(2))
        permute_heads(moved, [*range(1, layer.groups), 0])
        assert not torch.equal(plain.query.weight, moved.query.weight)
        given = {"hidden_states": hidden, "position_embeddings": tuple(turns)}
        with torch.no_grad():
            close(moved(**given)[0], plain(**given)[0], 1e-13)


def test_what_comes_later_changes_nothing() -> None:
    model = model_of()
    made = converted(model, plan_of(model, (Window(2, 3, 0.25), Full(), Strided(3, 2, 3, 1))))
    changed = ids()
    changed[:, 17] += 1
    with torch.no_grad():
        first, second = (made(input_ids=x).logits for x in (ids(), changed))
    assert torch.equal(first[:, :17], second[:, :17])
    assert not torch.equal(first[:, 17], second[:, 17])


@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_live_bytes_are_those_of_the_plan(length: int) -> None:
    model = model_of()
    plan = plan_of(model, (Window(4, 100, 0.25), Full(), Strided(64, 2, 3, 1)))
    made = converted(model, plan)
    numbers = 2 * 8 * 8  # keys and values of 8 numbers in 64 bits
    for fixed in (None, length):
        cache = latent.LatentCache(made, fixed)
        counters = 8 * 2  # where rows begin, in each of two layers; of a fixed cache that and its length, once
        seen = 0
        for pieces in (length - 7, *[1] * 7):
            for layer in cache.layers:
                key, value = (torch.zeros(1, 3, pieces, 8, dtype=torch.float64) for _ in range(2))
                layer.update(key, value)
            seen += pieces
            assert cache.nbytes == plan.rows(fixed or seen) * numbers + counters
    assert plan.density(8192) < 0.6


@pytest.mark.parametrize("length", [None, 64])
def test_beams_and_rows_of_a_batch(length: int | None) -> None:
    model = model_of()
    made = converted(model, plan_of(model))
    how: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    tokens = ids(2, 20)
    tokens[1, :6] = 0
    how |= {"attention_mask": (tokens != 0).long()}
    wanted = made.generate(tokens, **how)  # with a cache of transformers
    assert torch.equal(made.generate(tokens, past_key_values=latent.LatentCache(made, length), **how), wanted)
    cache = latent.LatentCache(made, length)
    by_steps(made, ids(), cache, [30])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3]))
    again = by_steps(made, ids()[1:], latent.LatentCache(made, length), [30, 1])[:, -1:]
    with torch.no_grad():
        given = {"input_ids": ids()[1:, 30:31], "position_ids": torch.tensor([[30]])}
        close(made(**given, past_key_values=cache).logits, again)


@pytest.mark.parametrize("length", [None, 64])
def test_caches_start_again_and_forget_only_what_they_can(length: int | None) -> None:
    model = model_of()
    made = converted(model, plan_of(model, (Window(2, 16), Full(), Strided(4, 4, 3))))
    cache = latent.LatentCache(made, length)
    wanted = by_steps(made, ids(), latent.LatentCache(made, length), [40])
    by_steps(made, ids(seed=1), cache, [14])
    cache.crop(-14)
    by_steps(made, ids(), cache, [10, 4])
    cache.crop(-4)
    with torch.no_grad():
        rest = made(input_ids=ids()[:, 10:], past_key_values=cache).logits
    close(rest, wanted[:, 10:])
    with pytest.raises(RuntimeError, match="have dropped tokens which a sequence of 36 would see again"):
        cache.crop(-4)
    cache.reset()
    close(by_steps(made, ids(), cache, [40]), wanted)
    if length is not None:
        with pytest.raises(ValueError, match="60 \\+ 5 tokens are more than max_length=64"):
            by_steps(made, ids(2, 65), latent.LatentCache(made, 64), [60, 5])


def test_a_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    model = model_of("qwen2")
    plan = plan_of(model)
    made = latent.convert(model, HeadSpans(plan=plan))
    made.save_pretrained(tmp_path)
    loaded = latent.load(tmp_path, attn_implementation="sdpa")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids()).logits, made(input_ids=ids()).logits)
    assert SpanPlan.load(tmp_path) == plan


def test_fixed_rings_compile_once_and_decode_with_split_keys() -> None:
    model = copy.deepcopy(model_of()).float()
    made = converted(model, plan_of(model))
    wanted = by_steps(made, ids(1), None, [40])
    cache = latent.LatentCache(made, 64)
    by_steps(made, ids(1), cache, [20])
    before = len(latent.reports().graphs)
    compiled = torch.compile(made, backend="latent", options={"inner": "eager"}, fullgraph=True)
    with torch.no_grad():
        for at in range(20, 40):
            given = {"input_ids": ids(1)[:, at : at + 1], "position_ids": torch.tensor([[at]])}
            close(compiled(**given, past_key_values=cache).logits[:, 0], wanted[:, at], 1e-5)
    (graph,) = latent.reports().graphs[before:]
    assert len(graph.sites) == graph.count("split_kv_decode") == 6


def test_growing_caches_trace_as_one_graph_where_every_size_is_dynamic() -> None:
    """Sizes that are equal must not become symbols where an operator wants a plain truth value."""
    model = copy.deepcopy(model_of()).float()
    made = converted(model, plan_of(model))
    wanted, cache = by_steps(made, ids(1), None, [40]), latent.LatentCache(made)
    by_steps(made, ids(1), cache, [20])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(made, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for at in range(20, 40):
            given = {"input_ids": ids(1)[:, at : at + 1], "position_ids": torch.tensor([[at]])}
            close(compiled(**given, past_key_values=cache).logits[:, 0], wanted[:, at], 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4  # windows that are not full yet have their own


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [64, None])
def test_prompts_of_any_length_where_every_size_is_dynamic(fixed: int | None) -> None:
    """Layers share what they compute: its sizes must not be symbols of the first layer alone, which nobody defines.

    Nor can a span's own numbers be symbols: what is rounded from them has no bounds.
    """
    model = copy.deepcopy(model_of()).float()
    made = converted(model, plan_of(model, (Window(2, 5), Window(2, 5), Window(2, 9, 0.1))))
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="latent", dynamic=True)
    for length in (30, 38, 7):
        tokens = ids(3, length + 2)
        wanted = by_steps(made, tokens, latent.LatentCache(made, fixed), [length, 1, 1])
        close(by_steps(compiled, tokens, latent.LatentCache(made, fixed), [length, 1, 1]), wanted, 1e-5)


# ** refusals **


def test_what_does_not_hold_is_refused_with_a_reason() -> None:
    model = model_of()
    plan = plan_of(model)
    spans = HeadSpans(plan=plan)
    for recipes, reason in (
        ([JointLatent(rank=24), spans], "it remembers a JointMemory, one for all heads"),
        ([spans, JointLatent(rank=24)], "an earlier recipe gave its heads spans"),
        ([spans, spans], "its heads have spans already"),
        ([RoutedHeads(share=1.0), spans], "its heads are routed by their places"),
        ([HeadSpans(plan=SpanPlan.uniform(3, 3, Full()))], "the plan has 3 layers, the model 2"),
        ([HeadSpans(plan=SpanPlan.uniform(2, 6, Full()))], "the plan gives layer 0 6 heads, and it has 3 key heads"),
        ([HeadSpans(density=0.01)], "The narrowest span takes"),
        ([HeadSpans(density=0.1, sinks=8, measure="uniform")], "leaves no room beside 8 sinks"),
    ):
        with pytest.raises(ConversionRefused, match=reason):
            by_recipes(model, recipes, ids(4))
    with pytest.raises(ConversionRefused, match="it learns from text, and none was given"):
        by_recipes(model, [HeadSpans()], None)


def test_a_model_that_sees_ahead_is_refused() -> None:
    model = model_of()
    decoder = decoder_of(model)
    ahead = copy.deepcopy(model)
    for layer in ahead.model.layers:
        everything = {"attention_mask": torch.ones(1, 1, 24, 24, dtype=torch.bool)}
        layer.self_attn.register_forward_pre_hook(lambda _, a, k: (a, {**k, **everything}), with_kwargs=True)  # noqa: B023
    attentions = [ConvertedAttention.of(layer) for layer in decoder.layers]
    with pytest.raises(ConversionRefused, match="its tokens see later ones"):
        HeadSpans(plan=plan_of(model)).convert(attentions, decoder, Calibration(ahead, None))
    assert all(attention.reach is None for attention in attentions)


def test_a_mask_for_each_head_is_refused() -> None:
    model = model_of()
    made = converted(model, plan_of(model))
    mask = torch.ones(1, 6, 8, 8, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"layer 0: its heads have spans, and a mask for each head \[B, 6, S, T\]"):
        made(input_ids=ids(1, 8), attention_mask=mask)


@pytest.mark.parametrize("measure", ["influence", "mass", "uniform"])
@pytest.mark.parametrize("lengths", [(), (32, 64)])
def test_plans_are_found_on_text_and_hold_their_density(measure: Any, lengths: tuple[int, ...]) -> None:
    model = model_of()
    made = by_recipes(model, [HeadSpans(None, 0.5, measure, 2, lengths=lengths)], ids(3, 48))
    reaches = [module for module in made.modules() if isinstance(module, SpanReach)]
    assert len(reaches) == 2
    for n, length in enumerate(lengths or (48,)):
        rows = sum(span.rows(length) * count for reach in reaches for span, count in reach.classes)
        assert (0 if n else 0.4) * 6 * length < rows <= 0.5 * 6 * length
    assert all(len({span for span, _ in reach.classes}) <= 2 for reach in reaches)
