"""TransMLA: every exact step by itself, what folding and truncating lose, and absorbed decoding with every cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import latent
from convert_models import TURNED, attention_error, convert, decoder, layer, limit, logits, text, tiny
from latent.passes.recipes.joint_latent import basis, keys_of, stacked
from latent.passes.recipes.mla import MLAMemory, pair_columns
from latent.passes.recipes.transmla import Split, TransMLA, components, put_split, rotation, strongest, turning
from latent.rewriter.convert.attention import ConvertedAttention, Given, attend
from latent.rewriter.convert.calibrate import Calibration
from latent.rewriter.convert.layers import AttentionLayer, ConversionRefused, Rotary
from latent.rewriter.convert.memory import heads_of
from latent.rewriter.convert.rotation import rotate
from latent.rewriter.convert.scoring import Scoring
from test_generate import EAGER, assert_same_tokens, generate
from torch import Tensor
from transformers import DynamicCache, StaticCache

EYE = torch.eye(64, dtype=torch.float64)


def rotary_of(name: str) -> Rotary:
    found = layer(name).rotary
    assert found is not None
    return found


def moment(name: str) -> Tensor:
    found = Calibration(tiny(name), text()).second_moments({layer(name).path: stacked(layer(name))}, "test")
    return found[layer(name).path]


def every_block(name: str) -> int:
    return layer(name).groups * rotary_of(name).width


# ** exact steps **


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize(("fold", "balance"), [(1, True), (1, False), (None, True)])
def test_every_block_turned_at_full_rank_is_exact(name: str, fold: int | None, balance: bool) -> None:
    recipe = TransMLA(rope_dim=every_block(name), freq_fold=fold, rank=999, balance=balance)
    assert attention_error(name, convert(name, recipe)) < limit(name)


def turns(rotary: Rotary, positions: int = 5) -> tuple[Tensor, Tensor]:
    """Angles of each pair that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(1, positions, rotary.width // 2, generator=generator, dtype=torch.float64) * 6
    return angles.cos(), angles.sin()


def commuting_error(name: str, split: Split) -> float:
    """How far turning all groups' keys and then mixing them is from mixing them first."""
    one, rotary = layer(name), rotary_of(name)
    x = torch.randn(1, one.groups, 5, one.key_width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def mixed(keys: Tensor) -> Tensor:
        return keys.transpose(1, 2).flatten(2) @ split.turned

    inner = Rotary(rotary.form, split.turned.shape[1], 0, rotary.given, split.frequencies)
    found = rotate(mixed(x)[:, None], turns(rotary), inner)[:, 0]
    wanted = mixed(rotate(x, turns(rotary), rotary))
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("name", TURNED)
def test_the_split_is_orthogonal_and_without_folding_commutes_with_turning(name: str) -> None:
    rotary = rotary_of(name)
    for width, fold in ((rotary.width, 1), (every_block(name), 1), (rotary.width, 2)):
        split = rotation(layer(name), moment(name), width, fold)
        whole = torch.cat((split.turned, split.plain), 1)
        keys = keys_of(layer(name))
        assert split.turned.shape == (keys, width)
        assert (whole.t() @ whole - EYE[:keys, :keys]).abs().max() < 1e-12
        error = commuting_error(name, split)
        # A layer of one group has nothing to mix: folding does not pay there, and mixes frequencies all the same.
        assert error < 1e-12 if fold == 1 else error > 1e-3


def test_the_first_block_has_most_of_the_energy_of_every_frequency() -> None:
    total = moment("llama")[:16, :16]
    split = rotation(layer("llama"), total, 16, 1)
    energy = (split.turned.t() @ total @ split.turned).diagonal().view(2, 4, 2).sum(0)  # [frequency, component]
    assert (energy[:, 0] >= energy[:, 1]).all()
    assert energy.sum().allclose(total.trace())
    assert split.frequencies == (0, 0, 1, 1, 2, 2, 3, 3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "cohere", "gpt_neox", "gemma2"])
def test_grouped_queries_are_one_head_with_one_key(name: str) -> None:
    """GQA as MLA: nothing is mixed; a query reads the columns of its group and has zeros for the others."""
    read, rotary = decoder(name), rotary_of(name)
    converted = convert(name, TransMLA(rank=999, freq_fold=1))
    for one in read.layers:
        keys, first = keys_of(one), torch.arange(one.groups)[:, None] * one.key_width
        parts = torch.stack([(first + columns).flatten() for columns in pair_columns(rotary)])
        order = parts.flatten() if rotary.form == "half" else parts.t().flatten()
        rest = [column for column in range(keys) if column not in set(order.tolist())]
        frequencies = tuple(range(rotary.width // 2)) * one.groups
        split = Split(EYE[:keys, order], EYE[:keys, rest], frequencies)
        attention = ConvertedAttention.of(one)
        put_split(attention, one, torch.eye(one.cached, dtype=torch.float64), split, 999, False, "test")
        turned = attention.query.weight.view(one.heads, -1, 32)[:, one.key_width :]
        assert (turned.flatten(2) != 0).any(-1).sum() == one.heads * rotary.width
        converted.set_submodule(one.path, attention)
    assert attention_error(name, converted) < limit(name)


# ** what is lost, and only that **


def by_definition(one: AttentionLayer, split: Split, hidden: Tensor, angles: Any) -> Tensor:
    """q_h·(P_g Pᵀ k) + turn(T_gᵀ q_h)·turn(Tᵀ k), with whole keys and values."""
    query, key, value = (
        torch.nn.functional.linear(hidden, p.flat, None if p.bias is None else p.bias.flatten())
        for p in (one.query, one.key, one.value)
    )
    assert one.rotary is not None
    inner = replace(one.rotary, first=0, width=split.turned.shape[1], frequencies=split.frequencies)
    per_group = split.turned.view(one.groups, one.key_width, -1).repeat_interleave(one.heads // one.groups, 0)
    query = heads_of(query, one.heads)
    turned_query = rotate(torch.einsum("bhsd,hdt->bhst", query, per_group), angles, inner)
    turned_key = rotate((key @ split.turned)[:, None], angles, inner).expand(-1, one.groups, -1, -1)
    plain_key = heads_of(key @ split.plain @ split.plain.t(), one.groups)
    queries, keys = torch.cat((query, turned_query), -1), torch.cat((plain_key, turned_key), -1)
    out = attend(queries, keys, heads_of(value, one.groups), None, Scoring(one.scale, one.cap))
    return out.flatten(2) @ one.output.weight.flatten(1).t() + (0 if one.output.bias is None else one.output.bias)


@pytest.mark.parametrize("name", ["llama", "llama-one-head", "qwen2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("fold", [None, 1, 2])
def test_what_is_not_turned_is_all_that_loses_at_full_rank(name: str, fold: int | None) -> None:
    one, rotary = layer(name), rotary_of(name)
    converted = convert(name, TransMLA(freq_fold=fold, rank=999)).get_submodule(one.path)
    hidden = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    angles = turns(rotary)
    if fold is None:
        change = turning(decoder(name), Calibration(tiny(name), text()), "test")[one.path]
        split = strongest(one, moment(name), rotary.width, change)
    else:
        split = rotation(one, moment(name), rotary.width, fold)
    wanted = by_definition(one, split, hidden, angles)
    found = converted.output(converted.attention(Given(hidden, angles, None, None)))
    assert (found - wanted).abs().max() < 1e-10 * wanted.abs().max()


def test_discarded_energy_is_the_tail_of_the_spectrum() -> None:
    one, total = layer("llama"), moment("llama")
    split = rotation(one, total, 8, 2)
    into = torch.block_diag(split.plain, EYE[:16, :16])
    _, energy, rho = basis(into.t() @ total @ into, 8)
    assert len(energy) == 24 and rho > 0
    memory = convert("llama", TransMLA(freq_fold=2, rank=10)).get_submodule(one.path).memory
    kept = Calibration(tiny("llama"), text()).second_moments({one.path: memory.down.weight.detach()}, "test")[one.path]
    assert torch.isclose(energy.sum() - kept.trace(), energy[10:].sum(), rtol=1e-9)


def test_biases_stay_beside_what_is_truncated() -> None:
    """The bias of a shared key is turned with it; the others are added to what the latent gives, whole."""
    one = layer("qwen2")
    memory = convert("qwen2", TransMLA(freq_fold=2, rank=3)).get_submodule(one.path).memory
    assert one.key.bias is not None and one.value.bias is not None
    split, bias = rotation(one, moment("qwen2"), 8, 2), one.key.bias.flatten()
    torch.testing.assert_close(memory.up_value.bias, one.value.bias.flatten())
    torch.testing.assert_close(memory.up_key.bias + split.turned @ memory.turned_key.bias, bias)


# ** choices **


def test_the_fold_is_chosen_on_the_calibration_text() -> None:
    tokens = text(rows=6, seed=7)
    memory = convert("llama", TransMLA(rank=12, freq_fold="auto"), tokens).get_submodule(layer("llama").path).memory
    losses = {}
    for fold in (1, 2, 4):
        converted = convert("llama", TransMLA(rank=12, freq_fold=fold), tokens)
        modules = {one.path: converted.get_submodule(one.path) for one in decoder("llama").layers}
        losses[fold] = Calibration(tiny("llama"), tokens).loss(modules, "test", "")
    best = min(losses, key=losses.__getitem__) if losses[2] < losses[1] else 1
    split = rotation(layer("llama"), moment("llama"), 8, best)
    assert memory.rotary.frequencies == split.frequencies
    assert len(set(losses.values())) == 3


def test_the_loss_is_that_of_the_text() -> None:
    model, tokens = tiny("llama"), text(rows=6)
    with torch.no_grad():
        wanted = model(input_ids=tokens, labels=tokens).loss
    found = Calibration(model, tokens).loss({}, "test", "")
    assert abs(found - float(wanted)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "cohere", "gpt_neox"])
def test_how_far_frequencies_turn_is_read_from_the_model(name: str) -> None:
    width = rotary_of(name).width
    theta = tiny(name).config.rope_parameters["rope_theta"]
    angle = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    distances = torch.logspace(0, math.log10(128), 4096, dtype=torch.float64)  # up to max_position_embeddings
    wanted = (1 - (angle[:, None] * distances).cos()).mean(1)
    found = turning(decoder(name), Calibration(tiny(name), text()), "test")
    assert all(torch.allclose(found[one.path], wanted, rtol=1e-4) for one in decoder(name).layers)


def test_what_turning_changes_most_is_turned() -> None:
    """Each component has the gain of its energy and its frequency; none that is left out has more than one taken."""
    one, total = layer("llama"), moment("llama")
    change = torch.tensor([1.0, 0.5, 1e-3, 1e-6], dtype=torch.float64)
    split = strongest(one, total, 6, change)
    energy = components(one, total, 1)[1]
    gain = (energy * change[:, None]).flatten()
    taken = gain.topk(3).indices.sort().values
    assert split.frequencies == tuple((taken // 2).tolist())
    kept = (split.turned.t() @ total[:16, :16] @ split.turned).diagonal().view(2, 3).sum(0)
    torch.testing.assert_close(kept, energy.flatten()[taken])
    assert commuting_error("llama", split) < 1e-12


def test_which_frequencies_the_kept_components_turn_by() -> None:
    total = moment("llama")
    assert rotation(layer("llama"), total, 8, 1).frequencies == (0, 1, 2, 3)
    assert rotation(layer("llama"), total, 8, 4).frequencies == (0, 1, 2, 3)
    assert rotation(layer("llama"), total, 4, 2).frequencies == (0, 2)  # one of two components: its first frequency
    assert rotation(layer("llama"), total, 4, 4).frequencies == (0, 2)
    assert rotation(layer("llama"), total, 16, 2).frequencies == (0, 1, 0, 1, 2, 3, 2, 3)


def test_latent_and_shared_key_fit_into_the_share() -> None:
    for share, rank in ((0.5, 8), (0.75, 16), (1, 24)):
        memory = convert("llama", TransMLA(share=share, freq_fold=1)).get_submodule(layer("llama").path).memory
        assert (memory.down.out_features, memory.turned_key.out_features) == (rank, 8)


@pytest.mark.parametrize(
    ("name", "recipe", "why"),
    [
        ("gpt2", TransMLA(), "these are not turned at all"),
        ("llama", TransMLA(freq_fold=3), "freq_fold 3 does not divide its 4 frequencies"),
        ("llama", TransMLA(rope_dim=18), "rope_dim 18 is not from 1 to the 16 columns"),
        ("llama", TransMLA(rope_dim=4, freq_fold=1), "turns 0.5 components of each fold"),
        ("llama", TransMLA(rope_dim=6, freq_fold="auto"), "turns 3 components of each fold"),
        ("llama", TransMLA(rope_dim=5), "rope_dim 5 is odd"),
        ("llama", TransMLA(share=0.25), "leaves no room beside the positions"),
    ],
)
def test_choices_that_do_not_hold(name: str, recipe: TransMLA, why: str) -> None:
    with pytest.raises(ConversionRefused, match=why):
        convert(name, recipe)


@pytest.mark.parametrize("length", [16, 100])
def test_caches_of_transformers_hold_the_small_state(length: int) -> None:
    converted = convert("llama", TransMLA(share=0.75))
    for cache in (DynamicCache(config=converted.config), StaticCache(config=converted.config, max_cache_len=length)):
        logits(converted, input_ids=text(2, length), past_key_values=cache)
        held = [tensor.untyped_storage().nbytes() for one in cache.layers for tensor in (one.keys, one.values)]
        assert held == [2 * length * 16 * 8, 2 * length * 8 * 8] * 2  # rows, tokens, numbers, bytes: latent and key


# ** the compiler **


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cache_of(kind: str, model: Any) -> dict[str, Any]:
    if kind == "growing":
        return {"past_key_values": latent.LatentCache(model)}
    return {"past_key_values": latent.LatentCache(model, max_length=24)} if kind == "fixed" else {}


MODELS = ("llama", "llama-one-head", "llama-all-heads", "qwen2", "cohere", "gpt_neox", "phi3", "mistral")
QUICK = {
    ("llama", "dynamic"),
    ("qwen2", "static"),
    ("llama-one-head", "static"),
    ("cohere", "growing"),
    ("llama", "fixed"),
}
CASES = [
    pytest.param(*case, id="-".join(case), marks=() if case in QUICK else pytest.mark.slow)
    for case in product(MODELS, ("dynamic", "static", "growing", "fixed"))
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_decoding_is_absorbed_with_every_cache(fresh: None, name: str, kind: str) -> None:
    model = convert(name, TransMLA(share=0.75, freq_fold=2), dtype=torch.float32)
    expected = generate(model, kind, **cache_of(kind, model))
    model.compile(backend="latent", options=EAGER)
    actual = generate(model, kind, **cache_of(kind, model))
    assert_same_tokens(actual, expected)
    graphs = [graph for graph in latent.reports().graphs if graph.sites]
    assert len(graphs) >= 2 and not any(graph.failure for graph in graphs)
    for graph in graphs:
        assert graph.count("absorb_up_projection") == len(graph.sites) == len(decoder(name).layers)


def test_what_is_explained_is_a_latent() -> None:
    model = convert("llama", TransMLA(share=0.75, freq_fold=2), dtype=torch.float32)
    with torch.no_grad():
        report = latent.explain(model)(input_ids=text(2, 6), past_key_values=latent.LatentCache(model))
    assert report.count("attention") == 2 and report.count("absorb_up_projection") == 2
    assert all(isinstance(one.self_attn.memory, MLAMemory) for one in model.model.layers)


def test_it_is_a_recipe() -> None:
    assert latent.recipes()["transmla"] is TransMLA
