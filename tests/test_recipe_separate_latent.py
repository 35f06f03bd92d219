"""Latents of keys and values by themselves: exact at full rank, for a layer or each head, folded or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import latent
from convert_models import CONFIGS, attention_error, convert, layer, limit, logits, relative, text
from latent.passes.recipes.separate_latent import SeparateLatent, leading
from latent.rewriter.convert.layers import ConversionRefused

FULL: dict[str, Any] = {"rank_key": 999, "rank_value": 999}
WAYS = [
    pytest.param(kind, fold, id=f"{kind}{'-folded' * fold}") for kind in ("layer", "head") for fold in (False, True)
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("kind", "fold"), WAYS)
def test_full_rank_is_exact(name: str, kind: Any, fold: bool) -> None:
    recipe = SeparateLatent(**FULL, basis=kind, fold_values=fold)
    if fold and name in ("gated", "gpt_oss"):
        with pytest.raises(ConversionRefused, match=r"a gate for every column stands|which sinks or gates weigh"):
            convert(name, recipe)
        return
    converted = convert(name, recipe)
    assert attention_error(name, converted) < limit(name)


@pytest.mark.parametrize("kind", ["layer", "head"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])  # with a bias of the values; with one of the output as well
def test_folding_the_values_changes_nothing(name: str, kind: Any) -> None:
    plain, folded = (
        convert(name, SeparateLatent(rank_key=8, rank_value=6, basis=kind, fold_values=fold)) for fold in (False, True)
    )
    wanted = logits(plain, input_ids=text(2))
    assert relative(logits(folded, input_ids=text(2)), wanted) < 1e-6
    module = folded.get_submodule(layer(name).path)
    assert module.memory.up_value is None
    assert module.output.in_features == layer(name).heads * (6 if kind == "layer" else 6 // layer(name).groups)


def memory(recipe: SeparateLatent, name: str = "llama") -> Any:
    return convert(name, recipe).get_submodule(layer(name).path).memory


def test_ranks_fit_into_the_share() -> None:
    assert memory(SeparateLatent(share=0.75)).ranks == (8, 12)
    assert memory(SeparateLatent(share=0.75, keys=0.5)).ranks == (10, 10)
    assert memory(SeparateLatent(share=0.75, basis="head")).ranks == (4, 6)
    assert memory(SeparateLatent(share=0.75, keys=0.1)).ranks == (4, 16)  # values have no use for more


def test_a_basis_for_each_head_loses_more_and_rebuilds_with_less() -> None:
    layers, heads = (memory(SeparateLatent(share=0.75, basis=kind)) for kind in ("layer", "head"))  # type: ignore[arg-type]
    assert heads.up_key.weight.numel() * 2 == layers.up_key.weight.numel()
    total = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = total.t() @ total

    def kept(blocks: int, rank: int) -> float:
        vectors = torch.block_diag(*leading(moment, blocks, rank))
        assert torch.allclose(vectors.t() @ vectors, torch.eye(8, dtype=torch.float64))
        return float((vectors.t() @ moment @ vectors).trace())

    assert kept(2, 4) < kept(1, 8) < float(moment.trace())


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (SeparateLatent(rank_key=4), "go together"),
        (SeparateLatent(keys=1.0), "keys is 1.0"),
        (SeparateLatent(rank_key=1, rank_value=4, basis="head"), "no rank for each of 2 blocks"),
    ],
)
def test_choices_that_do_not_hold(recipe: SeparateLatent, why: str) -> None:
    with pytest.raises(ConversionRefused, match=why):
        convert("llama", recipe)


def test_it_is_a_recipe() -> None:
    assert latent.recipes()["separate_latent"] is SeparateLatent
