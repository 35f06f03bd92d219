"""A joint latent: exact at full rank, its loss the tail of the spectrum, its ranks what the bytes allow."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import latent
from convert_models import CONFIGS, attention_error, convert, decoder, layer, limit, text, tiny
from latent.passes.recipes.joint_latent import JointLatent, JointMemory, basis, keys_of, stacked, weighing
from latent.rewriter.convert.calibrate import Calibration
from latent.rewriter.convert.layers import ConversionRefused
from torch import Tensor


def moment(name: str) -> Tensor:
    found = Calibration(tiny(name), text()).second_moments({layer(name).path: stacked(layer(name))}, "test")
    return found[layer(name).path]


@pytest.mark.parametrize("name", CONFIGS)
def test_full_rank_is_exact(name: str) -> None:
    full = convert(name, JointLatent(rank=layer(name).cached))
    assert attention_error(name, full) < limit(name)
    assert attention_error(name, convert(name, JointLatent(rank=layer(name).cached // 4))) > 1e-2


def test_the_text_is_not_what_makes_it_exact() -> None:
    """At full rank any basis will do."""
    other = convert("qwen2", JointLatent(rank=32, balance=False), text(2, seed=11))
    assert attention_error("qwen2", other) < 1e-10


@pytest.mark.parametrize("rank", [1, 12, 31])
def test_discarded_energy_is_the_tail_of_the_spectrum(rank: int) -> None:
    one, total, keys = layer("llama"), moment("llama"), keys_of(layer("llama"))
    vectors, energy, rho = basis(total, keys)
    memory = JointMemory.of(one, vectors[:, :rank], rho)
    scale = torch.ones(32, 1, dtype=torch.float64)
    scale[:keys] = 1 / rho
    up = torch.cat((memory.up_key.weight, memory.up_value.weight))
    lost = scale * (stacked(one) - up @ memory.down.weight)  # of [k/ρ ; v], as a map of hidden states
    seen: list[Tensor] = []
    module = tiny("llama").get_submodule(one.path)
    handle = module.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["hidden_states"]), with_kwargs=True)
    with torch.no_grad():
        tiny("llama")(input_ids=text())
    handle.remove()
    found = (seen[0] @ lost.t()).square().sum()
    assert torch.isclose(found, energy[rank:].sum(), rtol=1e-9)


def test_no_separate_basis_keeps_more() -> None:
    """Ranks of keys and values by themselves are one choice of the joint basis among others."""
    total, keys = moment("qwen2"), keys_of(layer("qwen2"))
    _, energy, rho = basis(total, keys)
    key_energy = basis(total[:keys, :keys], 0)[1] / rho**2
    value_energy = basis(total[keys:, keys:], 0)[1]
    for rank_key in range(1, 12):
        assert key_energy[:rank_key].sum() + value_energy[: 12 - rank_key].sum() <= energy[:12].sum() * (1 + 1e-12)


def ranks(recipe: JointLatent, name: str = "llama") -> list[int]:
    converted = convert(name, recipe)
    found = [one["parts"]["memory"]["rank"] for one in converted.config.latent["attentions"].values()]
    return [int(rank) for rank in found]


def test_ranks_fit_into_the_share() -> None:
    # 2 layers of 32 numbers, and 8 for the angles
    assert ranks(JointLatent(share=0.5)) == [12, 12]
    assert ranks(JointLatent(share=0.77)) == [20, 20]
    assert ranks(JointLatent(share=1)) == [28, 28]
    assert ranks(JointLatent(share=0.5), "gpt2") == [32, 32]  # nothing is turned
    by_energy = ranks(JointLatent(share=0.5, ranks="energy"))
    assert sum(by_energy) == 24 and min(by_energy) >= 1


@pytest.mark.parametrize("share", [0, 1.1, 0.14])
def test_shares_that_cannot_be(share: float) -> None:
    with pytest.raises(ConversionRefused, match="share"):
        convert("llama", JointLatent(share=share))


def test_text_is_required() -> None:
    with pytest.raises(ConversionRefused, match="learns from text"):
        JointLatent().convert([], decoder("llama"), Calibration(tiny("llama"), None))


def test_it_is_a_recipe() -> None:
    assert latent.recipes()["joint_latent"] is JointLatent


@pytest.mark.parametrize("name", ["llama", "cohere", "gpt_neox", "gpt2"])
def test_errors_are_weighed_by_what_reads_them(name: str) -> None:
    """|D_v δv|² is what the heads of a group add to the output; columns that rope mixes count alike."""
    one = layer(name)
    felt = torch.rand(one.heads * one.key_width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, keys = weighing(one, felt), keys_of(one)
    delta = torch.randn(one.groups, one.value_width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    heads = delta.repeat_interleave(one.heads // one.groups, 0)
    per_head = torch.einsum("che,he->ch", one.output.weight, heads)
    found = (weights[keys:, keys:] @ delta.flatten()).square().sum()
    torch.testing.assert_close(found, per_head.square().sum(), rtol=1e-6, atol=0)
    columns = weights.diagonal()[:keys].view(one.groups, -1)
    wanted = felt.view(one.groups, -1, one.key_width).sum(1)
    torch.testing.assert_close(columns.square().sum(1), wanted.sum(1))  # rope keeps the sum of a pair's squares
    if one.rotary is not None:
        turned = columns[:, one.rotary.first : one.rotary.first + one.rotary.width]
        pairs = turned.view(one.groups, 2, -1).mT if one.rotary.form == "half" else turned.view(one.groups, -1, 2)
        assert torch.equal(pairs[..., 0], pairs[..., 1])
