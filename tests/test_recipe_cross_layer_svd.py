"""One factor for the tokens of several layers: exact where it must be, the best of its rank elsewhere, and small."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import convert_models
import latent
from convert_tools import VOCABULARY, converted, decode, decoder_of, forward, step, tiny, tokens
from latent.passes.recipes.cross_layer_svd import VALUES, CrossLayerSVD, cached_numbers
from latent.rewriter.convert import factored
from latent.rewriter.convert.groups.grouping import _partition, even_groups, given_groups
from latent.rewriter.convert.layers import ConversionRefused
from latent.rewriter.convert.weighing import value_roots
from zoo.build import build

WIDTH = 16
"""G d of the model, keys and values alike."""

PROMPT, LENGTH = 20, 27
TEXT = tokens(8, 32, seed=5)


def ids(seed: int = 1) -> Tensor:
    return tokens(2, LENGTH, seed)


def padded() -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :6] = 0
    return mask


def xkv(**changes: Any) -> CrossLayerSVD:
    return CrossLayerSVD(**{"group": 2, "rank_key": 5, "rank_value": 7, "least": 0, **changes})


def full(**changes: Any) -> CrossLayerSVD:
    return xkv(rank_key=WIDTH, rank_value=WIDTH, **changes)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# ** nothing is lost **


@pytest.mark.parametrize("max_length", [None, 40])
@pytest.mark.parametrize("bases", ["prompt", "calibrated"])
@pytest.mark.parametrize("groups", ["even", ((0, 2), (1, 3)), ((0, 1, 2),)])
@pytest.mark.parametrize("weigh", [True, False])
def test_full_rank_reproduces_the_logits(bases: Any, max_length: int | None, groups: Any, weigh: bool) -> None:
    """Also with padding, and with groups that interleave or leave a layer as it was."""
    model = tiny()
    made = converted(model, full(bases=bases, groups=groups, weigh=weigh), TEXT)
    found = decode(made, latent.LatentCache(made, max_length), ids(), PROMPT, padded())
    seen = padded().bool()
    assert_close(found[seen], forward(model, ids(), padded())[seen])


@pytest.mark.parametrize("bases", ["prompt", "calibrated"])
def test_keys_with_a_norm_are_kept_after_it(bases: Any) -> None:
    """As of Qwen3; it stands before rope, so it changes nothing for what is cached."""
    model = build("qwen3").model
    widths = [layer.cached // 2 for layer in decoder_of(model).layers]
    recipe = CrossLayerSVD(group=2, rank_key=widths[0], rank_value=widths[0], bases=bases, least=0)
    size = model.config.vocab_size
    text = TEXT % size
    made = converted(model, recipe, text)
    cache = latent.LatentCache(made)
    found, wanted = decode(made, cache, ids() % size, PROMPT), forward(model, ids() % size)
    assert type(made.model.layers[0].self_attn.memory).__name__ == "CrossLayerMemory"
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_without_its_cache_the_model_is_the_original() -> None:
    from transformers import DynamicCache

    model = tiny()
    made = converted(model, xkv())
    assert_close(forward(made, ids()), forward(model, ids()))
    assert_close(decode(made, DynamicCache(), ids(), PROMPT), forward(model, ids()))


def test_a_short_prompt_is_kept_as_it_is_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    """What remains is a cache of keys before rope: exact."""
    model = tiny()
    made = converted(model, xkv(least=None))
    cache = latent.LatentCache(made)
    with caplog.at_level(logging.WARNING):
        assert_close(decode(made, cache, ids(), PROMPT), forward(model, ids()))
    assert [record.getMessage() for record in caplog.records] == [
        f"latent: a prompt of 20 tokens is kept uncompressed; below {4 * 2 * WIDTH} the bases take too much of what is "
        "saved"
    ]
    assert cache.nbytes == 2 * LENGTH * (4 * 2 * WIDTH + 4) * 8


def test_the_rank_of_the_prompt_is_enough() -> None:
    model = tiny()
    made = converted(model, xkv(rank_key=3, rank_value=3))
    assert_close(decode(made, latent.LatentCache(made), ids(), 6), forward(model, ids()))
    short = decode(made, latent.LatentCache(made), ids(), 7)
    assert float((short - forward(model, ids())).abs().max()) > 1e-3


@pytest.mark.parametrize("bases", ["prompt", "calibrated"])
def test_the_first_token_does_not_depend_on_the_rank(bases: Any) -> None:
    model = tiny()
    made = converted(model, xkv(rank_key=1, rank_value=1, bases=bases), TEXT)
    found = decode(made, latent.LatentCache(made), ids(), PROMPT)
    wanted = forward(model, ids())
    assert_close(found[:, :PROMPT], wanted[:, :PROMPT])
    assert float((found - wanted)[:, PROMPT:].abs().max()) > 1e-2


def test_the_original_is_left_alone() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = converted(model, xkv(bases="calibrated"), TEXT)
    decode(made, latent.LatentCache(made), ids(), PROMPT)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ** in several calls **


def in_calls(made: Any, cache: Any, *ends: int) -> None:
    """The text up to the last of `ends`, a call for each."""
    for start, end in itertools.pairwise((0, *ends)):
        step(made, cache, ids()[:, :end], end - start)


@pytest.mark.parametrize("max_length", [None, 40])
def test_a_prompt_in_several_calls_becomes_as_small_as_one_in_one(max_length: int | None) -> None:
    made = converted(tiny(), xkv())
    caches = [latent.LatentCache(made, max_length) for _ in range(2)]
    in_calls(made, caches[0], PROMPT)
    in_calls(made, caches[1], 6, 13, PROMPT)
    assert caches[1].nbytes > caches[0].nbytes
    caches[1].compress()
    assert caches[1].nbytes == caches[0].nbytes and caches[1].get_seq_length() == PROMPT
    before = [t.clone() for layer in caches[1].layers for t in layer.tensors()]
    caches[1].compress()
    assert all(map(torch.equal, before, (t for layer in caches[1].layers for t in layer.tensors())))


@pytest.mark.parametrize("max_length", [None, 40])
@pytest.mark.parametrize("least", [0, 15])
def test_compressing_again_loses_nothing_at_full_rank(max_length: int | None, least: int) -> None:
    model = tiny()
    made = converted(model, full(least=least))
    cache = latent.LatentCache(made, max_length)
    in_calls(made, cache, 6, 13, PROMPT)
    cache.compress()
    cache.reorder_cache(torch.tensor([1, 1]))
    found = step(made, cache, ids()[1:].expand(2, -1), LENGTH - PROMPT)
    assert_close(found, forward(model, ids())[1:, PROMPT:].expand(2, -1, -1))


def test_a_first_call_that_was_too_short_is_compressed_with_the_second_as_if_they_were_one() -> None:
    made = converted(tiny(), xkv(least=15))
    caches = [latent.LatentCache(made) for _ in range(2)]
    in_calls(made, caches[0], PROMPT)
    in_calls(made, caches[1], 6, PROMPT)
    caches[1].compress()
    for layer, which in itertools.product(range(4), range(2)):
        rows = prompt_rows(tiny(), made, which)[layer]
        errors = [float((rebuilt(cache, layer, which) - rows).pow(2).sum()) for cache in caches]
        assert errors[1] == pytest.approx(errors[0], rel=1e-6)


# ** the best of its rank **


def prompt_rows(model: Any, made: Any, which: int) -> list[Tensor]:
    """What each layer gives its cache for the prompt, [B, T, G w]."""
    rows: list[Tensor] = []
    for layer in made.model.layers:
        memory = layer.self_attn.memory
        linear = (memory.full.key, memory.full.value)[which]
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, weight=linear.weight: rows.append(
                (args[0] if args else kwargs["hidden_states"]) @ weight.t()
            ),
            with_kwargs=True,
        )
    forward(made, ids()[:, :PROMPT])
    return rows


def rebuilt(cache: Any, layer: int, which: int) -> Tensor:
    held = cache.layers[layer]
    basis = held.bases[which]
    return (held.leader.tokens.keys, held.leader.tokens.values)[which].squeeze(1) @ basis


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_the_error_is_the_energy_of_what_was_left_out(group: int, which: int) -> None:
    made = converted(tiny(), xkv(group=group, weigh=False))
    cache = latent.LatentCache(made)
    step(made, cache, ids()[:, :PROMPT], PROMPT)
    rows = prompt_rows(tiny(), made, which)
    for members in even_groups(4, group):
        wide = torch.cat([rows[index] for index in members], -1)
        found = torch.cat([rebuilt(cache, index, which) for index in members], -1)
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
        rank = (5, 7)[which] * len(members)
        error, energy = (wide - found).pow(2).sum((1, 2)), s[:, rank:].pow(2).sum(-1)
        assert_close(error / wide.pow(2).sum((1, 2)), energy / wide.pow(2).sum((1, 2)), 1e-10)
        if group == 1:  # the truncated decomposition of a layer by itself
            assert_close(found, u[..., :rank] * s[:, None, :rank] @ v[:, :rank], 1e-9)


@pytest.mark.parametrize("name", ["gpt_oss", "gated", "qwen2"])
def test_at_full_rank_sinks_and_gates_weigh_the_bias_of_the_values_too(name: str) -> None:
    model, text = convert_models.tiny(name), ids()
    made = convert_models.convert(name, full(weigh=False))
    wanted = forward(model, text)
    cache = latent.LatentCache(made)
    found = [step(made, cache, text[:, :PROMPT], PROMPT)]
    found += [step(made, cache, text[:, :end], 1) for end in range(PROMPT + 1, LENGTH + 1)]
    assert_close(torch.cat(found, 1), wanted, 1e-9)


@pytest.mark.parametrize("bases", ["prompt", "calibrated"])
def test_weighed_values_lose_less_of_what_the_output_reads(bases: Any) -> None:
    """By exactly the energy that the best factor of the values' shares of the output leaves out, if it is the prompt's.

    Heads of very different outputs, so that the two ways differ.
    """
    model = copy.deepcopy(tiny())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, ::3] *= 4
    layers, lost = decoder_of(model).layers, []
    for weigh in (True, False):
        made = converted(model, xkv(rank_value=3, weigh=weigh, bases=bases), ids()[:, :PROMPT])
        cache = latent.LatentCache(made)
        step(made, cache, ids()[:, :PROMPT], PROMPT)
        rows = prompt_rows(model, made, 1)
        total = torch.zeros(2, dtype=torch.double)
        for index, layer in enumerate(layers):
            read = layer.output.weight.unflatten(1, (layer.groups, -1))  # [C, G, heads of a group, e]
            error = (rows[index] - rebuilt(cache, index, 1)).unflatten(-1, (layer.groups, -1))
            total += torch.einsum("cghe,btge->btghc", read, error).pow(2).sum((1, 2, 3, 4))
        lost.append(total)
    weighed, plain = lost
    if bases == "prompt":
        best = torch.zeros(2, dtype=torch.double)
        for pair in even_groups(4, 2):
            wide = torch.cat([rows[i] @ torch.block_diag(*value_roots(layers[i])) for i in pair], -1)
            best += torch.linalg.svdvals(wide)[:, 6:].pow(2).sum(-1)
        assert_close(weighed, best, 1e-9)
        assert (weighed < plain).all()
    assert weighed.sum() < plain.sum()


def test_padding_and_other_rows_have_no_say() -> None:
    """A row of a batch, padded on the left, gives what it gives alone."""
    made = converted(tiny(), xkv())
    together = decode(made, latent.LatentCache(made), ids(), PROMPT, padded())
    alone = decode(made, latent.LatentCache(made), ids()[:1, 6:], PROMPT - 6)
    assert_close(together[:1, 6:], alone, 1e-10)
    second = decode(made, latent.LatentCache(made), ids()[1:], PROMPT)
    assert_close(together[1:], second, 1e-10)


@pytest.mark.parametrize("bases", ["prompt", "calibrated"])
def test_no_token_sees_a_later_one(bases: Any) -> None:
    made = converted(tiny(), xkv(bases=bases), TEXT)
    before, changed = ids(), ids()
    changed[:, -3] = (changed[:, -3] + 1) % VOCABULARY
    found = [decode(made, latent.LatentCache(made), text, PROMPT) for text in (before, changed)]
    assert torch.equal(found[0][:, :-3], found[1][:, :-3])
    assert not torch.equal(found[0][:, -3:], found[1][:, -3:])


def test_calibrated_bases_find_a_subspace_that_all_text_lies_in() -> None:
    """Keys and values of few dimensions across the layers: those are all that is needed, for other text too."""
    model = copy.deepcopy(tiny())
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[4:] = linear.weight[:4].repeat(3, 1)
    made = latent.convert(model, xkv(rank_key=4, rank_value=4, bases="calibrated"), calibrate=TEXT)
    assert_close(decode(made, latent.LatentCache(made), ids(9), PROMPT), forward(model, ids(9)), 1e-9)


# ** small **


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = func._schema.returns and any(r.alias_info is not None for r in func._schema.returns)
        if isinstance(out, Tensor) and not views:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_decoding_forms_a_block_of_keys_and_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factored, "BLOCK", 32)
    made = converted(tiny(), xkv())
    text = tokens(1, 402)
    cache = latent.LatentCache(made)
    step(made, cache, text[:, :400], 400)
    step(made, cache, text[:, :401], 1)
    factors = sum(cached_numbers(decoder_of(tiny()), even_groups(4, 2), (5, 7), 400) for _ in range(1))
    assert cache.nbytes == 8 * (factors + 4 * 2 * WIDTH + 4)
    with Largest() as seen:
        step(made, cache, text, 1)
    assert seen.numbers <= 6 * 402 < 400 * WIDTH  # the scores of all heads
    monkeypatch.setattr(factored, "BLOCK", 1024)
    with Largest() as seen:
        step(made, cache, torch.cat((text, text[:, :1]), 1), 1)
    assert seen.numbers >= 400 * WIDTH


@pytest.mark.parametrize("bases", ["prompt", "calibrated"])
def test_ranks_fit_into_a_share_of_the_bytes(bases: Any) -> None:
    decoder = decoder_of(tiny())
    made = converted(tiny(), CrossLayerSVD(group=2, share=0.5, length=300, bases=bases, least=0), TEXT)
    memory = made.model.layers[0].self_attn.memory
    key, value = (rank // 2 for rank in memory.ranks)
    assert value == VALUES * key
    cache = latent.LatentCache(made)
    step(made, cache, tokens(1, 300), 300)
    prompt = bases == "prompt"
    assert cache.nbytes == 8 * cached_numbers(decoder, even_groups(4, 2), (key, value), 300, prompt)
    more = cached_numbers(decoder, even_groups(4, 2), (key + 1, VALUES * (key + 1)), 300, prompt)
    assert cache.nbytes <= 0.5 * 8 * 300 * decoder.cached < 8 * more


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_values_are_weighed_by_can_be_undone_when_it_is_rounded(dtype: torch.dtype) -> None:
    """Outputs that read two directions of eight: the inverse of the rounded roots is no larger than it must be."""
    layer = decoder_of(tiny(dtype)).layers[0]
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(-2, 3, (2, layer.value_width), generator=generator).to(dtype)
    read = torch.randint(-2, 3, (*layer.output.weight.shape[:2], 2), generator=generator).to(dtype) @ few
    roots = value_roots(replace(layer, output=replace(layer.output, weight=read)))
    largest = torch.linalg.matrix_norm(roots, 2)
    undone = torch.linalg.matrix_norm(torch.linalg.inv(roots.to(dtype).double()), 2)
    assert (undone * largest.max() <= 1.5 / max(1e-4, 8 * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("bases", ["prompt", "calibrated"])
def test_a_layer_whose_output_is_zero_is_compressed_like_others(bases: Any) -> None:
    """As layers are that were added to a model before training."""
    model = copy.deepcopy(tiny())
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    made = converted(model, full(bases=bases), TEXT)
    assert_close(decode(made, latent.LatentCache(made), ids(), PROMPT), forward(model, ids()))


def test_saved_bases_come_back(tmp_path: Any) -> None:
    made = converted(tiny(), xkv(bases="calibrated"), TEXT)
    made.save_pretrained(tmp_path)
    again = latent.load(tmp_path)
    assert torch.equal(
        again.model.layers[1].self_attn.memory.basis_key, made.model.layers[1].self_attn.memory.basis_key
    )
    found, wanted = (decode(m, latent.LatentCache(m), ids(), PROMPT) for m in (again, made))
    assert torch.equal(found, wanted)


# ** groups **


def test_borders_are_found_where_layers_differ() -> None:
    alike = torch.full((7, 7), 0.1)
    for start, end in ((0, 2), (2, 6), (6, 7)):
        alike[start:end, start:end] = 0.9
    alike.fill_diagonal_(1)
    assert _partition(alike, 3, 4) == [(0, 1), (2, 3, 4, 5), (6,)]
    assert all(len(group) <= 3 for group in _partition(alike, 3, 3))


def test_similar_layers_are_found_by_text() -> None:
    """Layers 1 to 3 are made the same function of nearly the same hidden states."""
    model = copy.deepcopy(tiny())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
        first = model.model.layers[1].self_attn
        for layer in model.model.layers[2:]:
            for name in ("k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight.copy_(getattr(first, name).weight)
    made = latent.convert(model, xkv(groups="similar"), calibrate=TEXT)
    assert [layer.self_attn.memory.members for layer in made.model.layers] == [(0,), *[(1, 2, 3)] * 3]
    assert [layer.self_attn.memory.ranks for layer in made.model.layers] == [(5, 7), *[(15, 21)] * 3]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"groups": ((0, 1), (1, 2))}, "layer 1 is named twice"),
        ({"groups": ((3, 4),)}, "there is no layer 4; layers are 0 to 3"),
        ({"group": 0}, "0 layers are no group"),
        ({"rank_key": 0}, "a rank below 1 keeps nothing"),
        ({"rank_value": None}, "give both rank_key and rank_value"),
        ({"rank_key": None, "rank_value": None, "share": 0.1, "length": 16}, "leaves no room for bases and angles"),
        ({"rank_key": None, "rank_value": None, "share": 1.5}, "1.5 is no share of the cache"),
        ({"bases": "calibrated"}, "it learns from text, and none was given"),
        ({"groups": "similar"}, "it learns from text, and none was given"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionRefused, match=reason):
        converted(tiny(), xkv(**changes))


def test_groups_as_given() -> None:
    groups: Sequence[Sequence[int]] = ((3, 1), (0,), ())
    assert given_groups(groups, 4) == [(1, 3), (0,)]
    assert even_groups(5, 2) == [(0, 1), (2, 3), (4,)]
