"""Caches that keep the latents of models which cache keys and values of every head: exact, small, and absorbed."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import latent
from own_latent_models import expanded
from transformers import DynamicCache
from zoo.build import build

WAYS: dict[str, dict[str, Any]] = {
    "shared rope behind": {},
    "shared rope first, biases": {"first": True, "bias": True},
    "no rope": {"turned": 0},
    "a rope for each head": {"ropes": 4},
    "grouped heads": {"groups": 2, "bias": True},
    "in buffers that are filled": {"filled": True},
}
NUMBERS = {"a rope for each head": 12 + 4 * 4, "no rope": 12}
"""Kept for a token and layer; of 4 (12 + 6) in full."""


def ids(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_steps(model: Any, tokens: Tensor, cache: Any, pieces: list[int], mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    made, positions = [], (mask.cumsum(-1) - 1).clamp_min(0)
    for end, count in zip(itertools.accumulate(pieces), pieces, strict=True):
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, end - count : end]}
        made.append(model(tokens[:, end - count : end], past_key_values=cache, **given).logits)
    return torch.cat(made, 1)


@pytest.mark.parametrize("max_length", [None, 32])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost(way: str, max_length: int | None) -> None:
    model, tokens = expanded(**WAYS[way]), ids()
    padding = torch.ones_like(tokens)
    padding[0, :6] = 0
    cache = latent.LatentCache(model, max_length)
    for mask in (None, padding):
        pieces = [13, 1, 1, 4, *[1] * 5]
        wanted = by_steps(model, tokens, DynamicCache(), pieces, mask)
        found = by_steps(model, tokens, cache, pieces, mask)
        shown = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(found[shown], wanted[shown], rtol=1e-12, atol=1e-12)
        assert cache.get_seq_length() == 24
        cache.reset()


@pytest.mark.parametrize("length", [512, 2048, 8192])
@pytest.mark.parametrize("way", ["shared rope behind", "no rope", "a rope for each head"])
def test_live_bytes_are_those_of_the_latents(way: str, length: int) -> None:
    model = expanded(torch.float32, **WAYS[way])
    for cache in (latent.LatentCache(model), latent.LatentCache(model, length)):
        by_steps(model, ids(1, length), cache, [length - 1, 1])
        steps = 4 * 2 * 2 if cache.max_length else 0  # how many tokens there are, as two tensors of a layer
        assert abs(cache.nbytes - 4 * 2 * length * NUMBERS.get(way, 16)) <= steps


def test_beams_copies_and_cropping() -> None:
    model, tokens = expanded(), ids()
    asked = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    cache = latent.LatentCache(model)
    empty = copy.deepcopy(cache)
    assert torch.equal(model.generate(tokens, past_key_values=cache, **asked), model.generate(tokens, **asked))
    by_steps(model, tokens, empty, [24])
    wanted = by_steps(model, tokens, DynamicCache(), [20, 4])[:, -4:]
    empty.crop(-4)
    mask, positions = torch.ones_like(tokens), torch.arange(20, 24)[None].expand(2, -1)
    with torch.no_grad():
        found = model(tokens[:, 20:], attention_mask=mask, position_ids=positions, past_key_values=empty).logits
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_attention_reads_the_latents(dtype: torch.dtype, filled: bool) -> None:
    model, tokens = expanded(dtype, filled=filled), ids(1, 40)
    compiled = copy.deepcopy(model)
    cache, other = latent.LatentCache(model, 512), latent.LatentCache(compiled, 512)
    torch._dynamo.reset()
    latent.rewriter.history.forget()
    compiled.compile(backend="latent", options={"strict": True})
    pieces = [36, 1, 1, 1, 1]
    wanted, found = by_steps(model, tokens, cache, pieces), by_steps(compiled, tokens, other, pieces)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 32 * torch.finfo(dtype).eps
    graphs = latent.reports().graphs
    assert len(graphs) == 2 and latent.reports().count("absorb_up_projection") == 4


@pytest.mark.parametrize("max_length", [None, 128])
def test_sizes_that_are_symbols_are_not_those_of_the_latents(max_length: int | None) -> None:
    """Three padded rows, compiled with dynamic=True: decoding attends to the latents all the same."""
    model, tokens = expanded(torch.float32, bias=True), ids(3, 90)
    mask = torch.ones_like(tokens)
    mask[0, :11], mask[2, :40] = 0, 0
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled.compile(backend="latent", dynamic=True, options={"inner": "eager"})
    pieces = [86, 1, 1, 1, 1]
    wanted = by_steps(model, tokens, DynamicCache(), pieces, mask)
    found = by_steps(compiled, tokens, latent.LatentCache(compiled, max_length), pieces, mask)
    shown = mask.bool()
    torch.testing.assert_close(found[shown], wanted[shown], rtol=1e-4, atol=1e-4)
    graphs = latent.reports().graphs
    assert not [v for graph in graphs for v in graph.verdicts if v.outcome == "undone"]
    decoding = graphs[-1]
    assert [v.outcome for v in decoding.verdicts if v.rewrite == "absorb_up_projection"] == ["applied"] * 2


def test_weights_that_changed_are_noticed() -> None:
    model = expanded()
    cache = latent.LatentCache(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.kv_b.weight[3] += 0.1
    with pytest.raises(ValueError, match=r"not made of the latent that was read .* make another cache"):
        by_steps(model, ids(), cache, [24])


def refused(name: str) -> Any:
    return expanded(norm=True) if name == "norm" else build(name).model


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("norm", "something that is not linear stands between its latent and its keys"),
        ("llama", "its keys and values are made of no latent"),
        ("deepseek_v3", "which are not the keys and values of . heads. If that is its latent, any cache"),
    ],
)
def test_what_has_no_latent_to_keep_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"no converted attention, .*{reason}.*Convert it first"):
        latent.LatentCache(refused(name))
