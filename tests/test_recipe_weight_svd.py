"""Latent attention from the weights alone: its factors are theirs, at every rank and for every spelling."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import latent
from convert_models import TURNED, convert, decoder, layer
from latent.passes.recipes.joint_latent import stacked
from latent.passes.recipes.mla import MLAMemory
from latent.passes.recipes.weight_svd import WeightSVD
from latent.rewriter.convert.attention import ConvertedAttention
from latent.rewriter.convert.calibrate import Calibration
from latent.rewriter.convert.layers import ConversionRefused


@pytest.mark.parametrize("name", TURNED)
def test_full_rank_has_the_weights_of_the_layer(name: str) -> None:
    one, converted = layer(name), convert(name, WeightSVD(rank=999))
    memory, rotary = converted.get_submodule(one.path).memory, one.rotary
    assert rotary is not None
    width = rotary.width // 2
    turned = list(range(rotary.first + width, rotary.first + rotary.width))
    plain = [c for c in range(one.key_width) if c not in turned]
    down = memory.down.weight
    assert len(down) == min(one.cached, down.shape[1])
    values = (memory.up_value.weight @ down).view_as(one.value.weight)
    keys = (memory.up_key.weight @ down).view(one.groups, len(plain), -1)
    torch.testing.assert_close(values, one.value.weight)
    torch.testing.assert_close(keys, one.key.weight[:, plain])
    torch.testing.assert_close(memory.turned_key.weight, one.key.weight[:, turned].mean(0))


def test_the_latent_is_that_of_the_singular_values() -> None:
    memory = convert("llama", WeightSVD(rank=5)).get_submodule(layer("llama").path).memory
    _, values, rows = torch.linalg.svd(stacked(layer("llama")))
    torch.testing.assert_close(memory.down.weight.norm(dim=1), values[:5])
    assert (memory.down.weight @ rows[:5].t()).abs().allclose(values[:5].diag())


def test_angles_are_those_of_a_narrower_rope() -> None:
    rotary = convert("llama", WeightSVD(rope_dim=4)).get_submodule(layer("llama").path).memory.rotary
    own = 1e4 ** -(torch.arange(0, 8, 2) / 8)
    assert torch.allclose(own[list(rotary.frequencies)], 1e4 ** -(torch.arange(0, 4, 2) / 4))


def test_it_needs_no_text() -> None:
    read = decoder("llama")
    attentions = [ConvertedAttention.of(one) for one in read.layers]
    WeightSVD().convert(attentions, read, Calibration(read.model, None))
    assert WeightSVD.needs == "nothing"
    assert all(isinstance(attention.memory, MLAMemory) for attention in attentions)


@pytest.mark.parametrize("rope_dim", [3, 6, 16])
def test_widths_that_do_not_fit(rope_dim: int) -> None:
    with pytest.raises(ConversionRefused, match=f"rope_dim {rope_dim} is no even divisor of the 8"):
        convert("llama", WeightSVD(rope_dim=rope_dim))


def test_positions_are_required() -> None:
    with pytest.raises(ConversionRefused, match="not turned at all"):
        convert("gpt2", WeightSVD())


def test_it_is_a_recipe() -> None:
    assert latent.recipes()["weight_svd"] is WeightSVD
    assert "distillation" in str(WeightSVD.__doc__)
