"""Routed heads: what must hold exactly, in float64, for several kinds of decoders."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings

import latent
import pytest
import torch
import transformers
from convert_models import without_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from latent.kernels import gemv, picked_heads
from latent.kernels.cpp_library import compiler
from latent.passes.recipes.joint_latent import JointLatent
from latent.passes.recipes.routed_heads import HeadRouter, RoutedHeads, UntrainedRouter, largest, load_loss
from latent.rewriter.convert.attention import ConvertedAttention
from latent.rewriter.convert.heads_of_layers import cheapest, choices, costs_of
from latent.rewriter.convert.layers import ConversionRefused

pytestmark = pytest.mark.filterwarnings("ignore::latent.passes.recipes.routed_heads.UntrainedRouter")

NEEDS_COMPILER = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

SIZES = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
CONFIGS = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=8),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=64, rotary_pct=0.5),
    "gemma2": transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6, attn_logit_softcapping=5.0),
    "qwen3_5": transformers.Qwen3_5TextConfig(**GROUPED, head_dim=8, layer_types=["full_attention"] * 2),  # gates
    "gpt_oss": transformers.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=1),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=48, n_layer=2, n_head=6, n_positions=128),
}
FLOAT32 = ("gemma2", "qwen3", "qwen3_5")
"""Whose softmax or norms are float32 whatever the weights are."""

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    spelling = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"  # caps are there in the eager spelling alone
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=spelling)
    without_experts(model).to(torch.float64).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # biases that are not zero
    return model


@functools.cache
def converted(name: str, recipe: RoutedHeads) -> torch.nn.Module:
    return latent.convert(model_of(name), recipe)


def routed(name: str, seed: int | None = 2, **choices: object) -> torch.nn.Module:
    """Converted; with a seed its routers are random."""
    made = copy.deepcopy(converted(name, RoutedHeads(**choices)))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for router in routers(made):
            for parameter in router.parameters():
                parameter.data += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return made


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The keys' heads that each call reads, where it reads some."""
    counts: list[int] = []

    def attend(query: torch.Tensor, key: torch.Tensor, *others: object) -> torch.Tensor:
        counts.append(key.shape[1])
        return plain(query, key, *others)

    plain = picked_heads.attend
    monkeypatch.setattr(picked_heads, "attend", attend)
    return counts


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Which heads the routers picked, [B, S, H] each."""
    found: list[torch.Tensor] = []
    plain = HeadRouter.weights

    def weights(router: HeadRouter, hidden: torch.Tensor) -> torch.Tensor:
        made = plain(router, hidden)
        found.append(made != 0)
        return made

    monkeypatch.setattr(HeadRouter, "weights", weights)
    return found


def routers(model: torch.nn.Module) -> list[HeadRouter]:
    return [module for module in model.modules() if isinstance(module, HeadRouter)]


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_with_all_heads_picked_the_start_is_the_original(name: str) -> None:
    model = model_of(name)
    wanted = logits(model)
    made = latent.convert(model, RoutedHeads(share=1.0, shared=list(CONFIGS).index(name) % 4))
    assert len(routers(made)) == 2
    tolerance = 1e-5 if name in FLOAT32 else 1e-10
    torch.testing.assert_close(logits(made), wanted, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        routers(made)[0].scores.weight.normal_()
    assert (logits(made) - wanted).abs().max() > 1e-4  # the gate is really there
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=0)  # and not in the original


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_decoding_skips_heads_and_gives_what_the_prefill_gives(
    name: str, fixed: bool, attended: list[int], picked: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill computes every head and weighs it, with 0 where it is skipped; one token reads what it needs."""
    monkeypatch.setattr(picked_heads, "LARGE", 0)
    made = routed(name, share=0.4)
    wanted = logits(made, IDS[:1])
    cache = latent.LatentCache(made, max_length=16 if fixed else None)
    found = [logits(made, IDS[:1, :5], past_key_values=cache)]
    attended.clear(), picked.clear()
    found += [logits(made, IDS[:1, n : n + 1], past_key_values=cache) for n in range(5, 12)]
    groups = 6 if name in ("gpt_neox", "gpt2") else 2
    assert len(picked) == 7 * 2 and all(used.sum() == 2 for used in picked)
    assert sum(attended) == sum(int(used.view(groups, -1).any(1).sum()) for used in picked) < 7 * 2 * groups
    tolerance = 1e-5 if name in FLOAT32 else 1e-9
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=NEEDS_COMPILER)])
def test_skipped_heads_are_not_read(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, keys and values of heads that no token picks may be anything."""
    for module, name in ((picked_heads, "LARGE"), (gemv, "WORTH")):
        monkeypatch.setattr(module, name, 0)
    made = routed("gpt_neox", None, picked=2, shared=1)  # heads 0, 1, 2: equal ones go in order
    made = made.float() if how == "compiled" else made
    wanted, cache = logits(made, IDS[:1]), latent.LatentCache(made)
    logits(made, IDS[:1, :11], past_key_values=cache)
    width = 8
    for attention in (layer.attention for layer in made.gpt_neox.layers):
        with torch.no_grad():
            attention.query.weight[3 * width :] = torch.nan
            attention.output.weight[:, 3 * width :] = torch.nan
    for layer in cache.layers:
        layer.keys[:, 3:], layer.values[:, 3:] = torch.nan, torch.nan
    run = torch.compile(made, backend="latent", options={"inner": "eager"}) if how == "compiled" else made
    found = logits(run, IDS[:1, 11:], past_key_values=cache)
    tolerance = 1e-4 if how == "compiled" else 1e-9
    torch.testing.assert_close(found[:, 0], wanted[:, -1], rtol=tolerance, atol=tolerance)
    assert all(layer.keys[:, :, -1].shape[1] == 6 and not layer.keys[:, :, -1].isnan().any() for layer in cache.layers)


def test_a_batch_and_left_padding_decode_as_they_prefill() -> None:
    made = routed("llama", share=0.6)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    wanted = logits(made, attention_mask=mask, position_ids=positions)
    cache = latent.LatentCache(made)
    logits(made, IDS[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8], past_key_values=cache)
    for n in range(8, 12):
        here = {"attention_mask": mask[:, : n + 1], "position_ids": positions[:, n : n + 1]}
        found = logits(made, IDS[:, n : n + 1], past_key_values=cache, **here)
        torch.testing.assert_close(found[:, 0], wanted[:, n], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(wanted[0, 4:], logits(made, IDS[:1, 4:])[0], rtol=1e-9, atol=1e-9)


def test_no_token_sees_a_later_one() -> None:
    made = routed("llama", share=0.6)
    changed = IDS.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 64
    before, after = logits(made), logits(made, changed)
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=0)
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-4


def test_routed_heads_may_be_permuted() -> None:
    """Routers whose rows are permuted as the heads are give the heads the same weights."""
    hidden = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    first = HeadRouter(16, range(6), 2, 2).double()
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter)
    for permutation in itertools.permutations(range(2, 6)):
        other = copy.deepcopy(first)
        other.order = (0, 1, *permutation)
        with torch.no_grad():
            other.scores.weight[:4] = first.scores.weight[[p - 2 for p in permutation]]
            torch.testing.assert_close(other.weights(hidden), first.weights(hidden), rtol=1e-12, atol=1e-12)


def test_weights_are_those_of_the_paper() -> None:
    router = HeadRouter(16, (3, 0, 1, 2, 4), 2, 2).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    weights = router.weights(x)[0, 0]
    route, share, balance = (router.scores.weight @ x[0, 0]).split((3, 2, 2))
    p = torch.softmax(route, 0)
    best = p.topk(2).indices
    kinds = 2 * torch.softmax(balance, 0)
    wanted = torch.zeros(5, dtype=torch.float64)
    wanted[[3, 0]] = kinds[0] * 2 * torch.softmax(share, 0)
    wanted[torch.tensor([1, 2, 4])[best]] = kinds[1] * 2 * p[best] / p[best].sum()
    torch.testing.assert_close(weights, wanted, rtol=1e-12, atol=1e-12)


def test_compiled_and_eager_pick_the_same_heads() -> None:
    """Of equal ones the first, in both spellings."""
    p = torch.randint(0, 4, (50, 9), generator=torch.Generator().manual_seed(0)).double()
    found = largest(p, 4)
    assert torch.equal(torch.compile(largest, backend="eager")(p, 4), found)
    assert (found.sum(-1) == 4).all()
    for row, on in zip(p.tolist(), found.tolist(), strict=True):
        assert [i for i in range(9) if on[i]] == sorted(sorted(range(9), key=lambda i: (-row[i], i))[:4])


def test_load_loss_is_k_where_all_heads_are_equally_likely() -> None:
    n, k = 6, 2
    p = torch.full((4, 30, n), 1 / n, dtype=torch.float64)
    even = torch.stack([torch.arange(n).roll(-k * t)[:k] for t in range(30)]).expand(4, -1, -1)
    uneven = torch.arange(k).expand(4, 30, k)
    for picked in (even, uneven):
        torch.testing.assert_close(load_loss(p, torch.zeros_like(p).scatter(-1, picked, 1.0)).item(), float(k))
    sure = torch.zeros_like(p).scatter(-1, uneven, 1 / k)
    assert load_loss(sure, torch.zeros_like(p).scatter(-1, uneven, 1.0)) == pytest.approx(n)  # always the same heads


@pytest.mark.parametrize("how", ["plain", "checkpointed", "compiled"])
def test_gradients_reach_the_routers(how: str) -> None:
    made = routed("llama", share=0.6, shared=2).train()
    run = made
    if how == "checkpointed":
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "compiled":
        run = torch.compile(made, backend="aot_eager")
    for parameters in (p for router in routers(made) for p in router.parameters()):
        parameters.grad = None
    run(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    task = [g for router in routers(made) for g in router.scores.weight.grad.clone().split(router.sizes)]
    assert len(task) == 6 and all(grad.abs().max() > 0 for grad in task)
    made.zero_grad()
    run(input_ids=IDS, labels=IDS, use_cache=False)
    loss = latent.balance_loss(made)
    assert loss.requires_grad and 0 < loss.item() < 16
    loss.backward()
    assert all(router.scores.weight.grad[: router.sizes[0]].abs().max() > 0 for router in routers(made))
    reference = routed("llama", share=0.6, shared=2).train()
    reference(input_ids=IDS)
    torch.testing.assert_close(loss, latent.balance_loss(reference))


def test_balance_loss_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="no routed heads"):
        latent.balance_loss(model_of("llama"))
    made = routed("llama", share=0.6).train()
    logits(made)
    with pytest.raises(RuntimeError, match="no forward with gradients"):
        latent.balance_loss(made)
    made(input_ids=IDS)
    copy.deepcopy(made)  # what the last forward left behind is no hindrance
    latent.balance_loss(made)
    with pytest.raises(RuntimeError, match="once after each forward"):
        latent.balance_loss(made)
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    made.get_input_embeddings().weight.requires_grad_()
    made(input_ids=IDS, use_cache=False)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        latent.balance_loss(made)


def test_heads_that_add_most_on_text_are_shared_and_picked_first() -> None:
    model = model_of("llama")
    attention = model.model.layers[1].self_attn
    sizes = torch.tensor([1.0, 6.0, 0.1, 4.0, 0.2, 3.0], dtype=torch.float64)
    with torch.no_grad():
        attention.o_proj.weight *= sizes.repeat_interleave(8)
    made = latent.convert(model, RoutedHeads(share=0.5, shared=1, ranking="text"), calibrate=IDS)
    router = routers(made)[1]
    assert router.order[0] == 1 and set(router.order[:3]) == {1, 3, 5}
    with pytest.raises(ConversionRefused, match="none was given"):
        latent.convert(model, RoutedHeads(ranking="text"))


def test_an_untrained_router_guesses_which_heads_add_most_to_a_token() -> None:
    """Tokens below 32 lie on one side of a direction u; v = b (1 ± u·x) is nothing on the wrong side of a group."""
    model = model_of("qwen2")
    width, side = 48, torch.where(torch.arange(64) < 32, 1.0, -1.0).double()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 5 * side
        attention = model.model.layers[0].self_attn
        for group, sign in enumerate((1, -1)):
            rows = slice(8 * group, 8 * group + 8)
            attention.v_proj.weight[rows] *= 0.1
            attention.v_proj.weight[rows, 0] = sign * width**-0.5 * attention.v_proj.bias[rows]
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 32, (16, 40), generator=generator) + 32 * (torch.arange(16)[:, None] % 2)
    made = latent.convert(model, RoutedHeads(share=0.5, shared=0, ranking="text"), calibrate=text)
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.arange(64)))
    with torch.no_grad():
        weights = routers(made)[0].weights(hidden[None])[0]
    used = weights != 0
    assert used[:32, :3].all() and used[32:, 3:].all() and used.sum() == 3 * 64
    assert float((weights[used] - 1).abs().max()) < 0.3


def test_layers_use_the_heads_that_they_need() -> None:
    """Heads of one layer that add next to nothing are left out there, and the other layers keep all of theirs."""
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 8:] *= 1e-6
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 20  # so that a head that is missing is missed
        model.lm_head.weight *= 20
    start = torch.arange(16)[:, None]
    text = model.generate(start, max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0)  # its own words
    even = latent.convert(model, RoutedHeads(share=0.75, shared=1, ranking="text"), calibrate=text)
    made = latent.convert(model, RoutedHeads(share=0.75, shared=1, ranking="text", layers="text"), calibrate=text)
    assert [router.picked for router in routers(even)] == [3, 3]
    assert [router.picked for router in routers(made)] == [5, 1] and routers(made)[1].order[0] == 0
    wanted = logits(model)
    assert (logits(made) - wanted).abs().max() < 1e-3 * (logits(even) - wanted).abs().max()
    cache = latent.LatentCache(made)
    found = [logits(made, IDS[:1, n : n + 1], past_key_values=cache) for n in range(12)]
    torch.testing.assert_close(torch.cat(found, 1), logits(made, IDS[:1]), rtol=1e-9, atol=1e-9)
    with pytest.raises(ConversionRefused, match="none was given"):
        latent.convert(model, RoutedHeads(layers="text"))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_heads_of_layers_are_the_cheapest_there_are(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(2, 7), min_size=1, max_size=4))
    tried = [choices(data.draw(st.integers(1, size)), size) for size in sizes]
    assert all(counts == sorted(set(counts)) and counts[-1] == size for counts, size in zip(tried, sizes, strict=True))
    told: list[tuple[int, int]] = []
    drawn = st.floats(-0.1, 1, allow_nan=False)
    costs = costs_of(tried, lambda layer, heads: data.draw(drawn), lambda done, total: told.append((done, total)))
    assert told[-1] == (sum(map(len, tried)) - len(tried),) * 2
    most = data.draw(st.integers(sum(counts[0] for counts in tried), sum(sizes)))
    found = cheapest(costs, most)
    lost = [
        sum(cost[n] for cost, n in zip(costs, counts, strict=True))
        for counts in itertools.product(*tried)
        if sum(counts) <= most
    ]
    assert sum(found) <= most
    assert sum(cost[n] for cost, n in zip(costs, found, strict=True)) == pytest.approx(min(lost))
    with pytest.raises(ValueError, match="too few"):
        cheapest(costs, sum(counts[0] for counts in tried) - 1)


def test_a_router_that_skips_no_head_starts_at_zero() -> None:
    model = model_of("llama")
    made = latent.convert(model, RoutedHeads(share=1.0, ranking="text"), calibrate=IDS)
    assert all(not one.scores.weight.any() for one in routers(made))
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-10, atol=1e-10)


def test_beside_a_latent_cache() -> None:
    """The gate weighs heads, whatever their keys and values are made of."""
    model = model_of("llama")
    both = latent.convert(model, [JointLatent(rank=32), RoutedHeads(share=1.0)], calibrate=IDS)
    torch.testing.assert_close(logits(both), logits(model), rtol=1e-8, atol=1e-8)
    made = latent.convert(model, [JointLatent(rank=16), RoutedHeads(share=0.6)], calibrate=IDS)
    cache = latent.LatentCache(made)
    found = [logits(made, IDS[:1, n : n + 1], past_key_values=cache) for n in range(12)]
    torch.testing.assert_close(torch.cat(found, 1), logits(made, IDS[:1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_and_loaded_it_computes_the_same(name: str, tmp_path: object) -> None:
    made = routed(name, share=0.6, shared=2)
    made.save_pretrained(tmp_path)
    loaded = latent.load(tmp_path)
    assert [r.settings() for r in routers(loaded)] == [r.settings() for r in routers(made)]
    outputs = [module.output.weight for module in loaded.modules() if isinstance(module, ConvertedAttention)]
    assert outputs and all(weight.t().is_contiguous() for weight in outputs)  # as decoding reads it
    torch.testing.assert_close(logits(loaded), logits(made), rtol=0, atol=0)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    first = made.generate(IDS[:1], past_key_values=latent.LatentCache(made), **options)
    assert torch.equal(loaded.generate(IDS[:1], past_key_values=latent.LatentCache(loaded), **options), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_compiled_decoding_skips_heads_too(dtype: torch.dtype, attended: list[int]) -> None:
    """In float32 by a generated kernel, where there is a compiler."""
    made = routed("llama", share=0.6).to(dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    wanted = logits(made, IDS[:1])
    cache = latent.LatentCache(made, max_length=16)
    logits(made, IDS[:1, :5], past_key_values=cache)
    step = torch.compile(made, backend="latent", options={"inner": "eager"})
    for n in range(5, 12):
        attended.clear()
        found = logits(step, IDS[:1, n : n + 1], past_key_values=cache)
        torch.testing.assert_close(found[:, 0], wanted[:, n], rtol=tolerance, atol=tolerance)
    assert sum(attended) == (0 if dtype == torch.float32 and compiler() else 2 * 2)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_one_token_under_autocast(name: str, compiled: bool) -> None:
    """The kept keys are bfloat16 there, the query of picked rows of a weight is as wide as the weight."""
    torch._dynamo.reset()
    made = routed(name, share=0.6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, cache = logits(made, IDS[:1]), transformers.DynamicCache(config=made.config)
        logits(made, IDS[:1, :11], past_key_values=cache)
        step = torch.compile(made, backend="latent", options={"inner": "eager"}) if compiled else made
        found = logits(step, IDS[:1, 11:], past_key_values=cache)
    assert (found[:, 0] - wanted[:, -1]).abs().max() <= 2e-2 * wanted.abs().max()


def test_it_says_that_training_is_needed() -> None:
    model = model_of("llama")
    assert RoutedHeads.needs == "training"
    with pytest.warns(UntrainedRouter, match="untrained"):
        latent.convert(model, RoutedHeads(share=0.6))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedRouter)
        latent.convert(model, RoutedHeads(share=1.0))


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"shared": 6}, "cannot be shared"),
        ({"shared": -1}, "cannot be shared"),
        ({"share": 0.0}, "no share of the heads"),
        ({"share": 0.3, "shared": 2}, "0 cannot be picked"),
        ({"picked": 6, "shared": 1}, "6 cannot be picked"),
    ],
)
def test_impossible_numbers_are_refused(choices: dict[str, object], reason: str) -> None:
    model = model_of("llama")
    wanted = logits(model)
    with pytest.raises(ConversionRefused, match=reason):
        latent.convert(model, RoutedHeads(**choices), inplace=True)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=0)
    assert not routers(model)


def test_two_routers_and_converted_models_are_refused() -> None:
    model = model_of("llama")
    with pytest.raises(ConversionRefused, match="routed already"):
        latent.convert(model, [RoutedHeads(), RoutedHeads()])
    with pytest.raises(ConversionRefused, match="converted already"):
        latent.convert(converted("llama", RoutedHeads(share=0.6)), RoutedHeads())
