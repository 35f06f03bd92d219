"""Queries that are multiplied by a number for their position: read in steps, and applied wherever queries are made."""

from __future__ import annotations

import itertools
import math
from typing import Any

import latent
import pytest
import torch
import transformers
from convert_models import SMALL, text
from latent.passes.recipes.cross_layer_svd import CrossLayerSVD
from latent.passes.recipes.head_spans import HeadSpans
from latent.passes.recipes.joint_latent import JointLatent
from latent.passes.recipes.routed_heads import RoutedHeads
from latent.rewriter.convert import query_scale
from latent.rewriter.convert.layers import ConversionRefused
from latent.rewriter.convert.read_decoder import read_decoder
from latent.rewriter.explain import explain
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo.build import randomise

pytestmark = pytest.mark.filterwarnings("ignore::latent.passes.recipes.routed_heads.UntrainedRouter")

IDS = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill_(0, torch.tensor(1), 0)
MASK[0], MASK[1, 7:] = 1, 1


def ministral3() -> Any:
    """It hands positions to its attention."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
    config = transformers.Ministral3Config(
        **SMALL, head_dim=8, rope_parameters=rope | {"original_max_position_embeddings": 8}
    )
    return prepared(transformers.Ministral3ForCausalLM(config))


def llama4() -> Any:
    """It counts tokens from those in the cache, in layers that turn nothing."""
    changes = {"floor_scale": 5, "attn_scale": 0.5, "no_rope_layers": [1, 0], "attention_chunk_size": 64}
    config = transformers.Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=48, moe_layers=[], use_qk_norm=False, **changes
    )
    return prepared(transformers.Llama4ForCausalLM(config))


class Scaled(LlamaAttention):
    """Its own factor, in front of the projection's bias or behind a norm, whatever is asked."""

    def factor(self, positions: Tensor) -> Tensor:
        return 1 + positions.div(4, rounding_mode="floor") / 7

    def forward(self, hidden_states: Tensor, **given: Any) -> Any:
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (
            linear(hidden_states).view(shape).transpose(1, 2) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = torch.arange(hidden_states.shape[1])
        query, key = self.scaled(query, key, self.factor(positions)[:, None])
        key, value = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def scaled(self, query: Tensor, key: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return factor * query, key


class ScaledKeys(Scaled):
    def scaled(self, query: Tensor, key: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return query, key * factor


class ScaledThenNormed(Scaled):
    def scaled(self, query: Tensor, key: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.rms_norm(query * factor, (8,)), key


class LearnedScale(Scaled):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.table = nn.Parameter(torch.rand(128))

    def factor(self, positions: Tensor) -> Tensor:
        return self.table[positions]


class DrawnScale(Scaled):
    def factor(self, positions: Tensor) -> Tensor:
        return torch.rand(len(positions))


def prepared(model: Any) -> Any:
    randomise(model.eval(), seed=0)
    return model.double()


def llama_with(attention: type[Scaled]) -> Any:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    for layer in model.model.layers:
        layer.self_attn = attention(model.config, layer.self_attn.layer_idx)
    return prepared(model)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **given: Any) -> Tensor:
    return model(input_ids=ids, **given).logits


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def in_parts(model: Any, cache: Any, mask: Tensor | None = None, step: Any = None) -> Tensor:
    """A prompt of 17 tokens, then a call of 3, then one token after another."""
    ends = [0, 17, 20, *range(21, IDS.shape[1] + 1)]
    found = []
    for start, end in itertools.pairwise(ends):
        given = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": places(mask)[:, start:end]}
        run = step if step is not None and end - start == 1 else model
        found.append(logits(run, IDS[:, start:end], past_key_values=cache, **given))
    return torch.cat(found, 1)


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


# ** what is read **


def test_steps_of_positions_that_are_handed_over() -> None:
    for layer in read_decoder(ministral3()).layers:
        scale = layer.query_scale
        assert scale is not None and layer.call.positions
        assert scale.starts == tuple(range(0, 128, 8))
        assert scale.factors == pytest.approx([1 + 0.5 * math.log(1 + n) for n in range(len(scale.starts))])


def test_steps_of_counted_tokens() -> None:
    first, second = read_decoder(llama4()).layers
    assert first.query_scale is None and not second.call.positions
    second = second.query_scale
    assert second.starts[:4] == (0, 4, 9, 14)
    assert second.factors[:3] == pytest.approx([1 + 0.5 * math.log1p(n) for n in range(3)])


def test_explain_names_it() -> None:
    assert "times a number for its position" in str(explain(ministral3())(input_ids=IDS, use_cache=False))


def test_another_spelling_is_read() -> None:
    model = llama_with(Scaled)
    made = latent.convert(model, JointLatent(rank=32), text())
    assert error(logits(made, use_cache=False), logits(model, use_cache=False)) < 1e-6


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ScaledKeys, "the key is multiplied by a number for its position"),
        (ScaledThenNormed, "a norm of its queries follows a number for their positions"),
        (DrawnScale, "the query comes from no projection"),
        (LearnedScale, "the query comes from no projection"),
    ],
)
def test_what_is_refused(kind: type[Scaled], reason: str) -> None:
    with pytest.raises(ConversionRefused, match=reason):
        read_decoder(llama_with(kind))


def test_numbers_that_change_all_the_time_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_scale, "STEPS", 8)
    with pytest.raises(ConversionRefused, match="makes a number of a query's position cannot be read"):
        read_decoder(ministral3())


# ** what is computed **

RECIPES = {
    "joint": JointLatent(rank=32),
    "spans": HeadSpans(density=1.0, measure="uniform", lengths=(64,)),
    "short spans": HeadSpans(density=0.4, measure="uniform", lengths=(40,)),
    "cross-layer": CrossLayerSVD(group=2, share=1.0, length=17),
    "routed": RoutedHeads(share=1.0, shared=0),
    "routed, some": RoutedHeads(share=0.5),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("make", [ministral3, llama4])
def test_every_recipe_keeps_it(make: Any, name: str, tmp_path: Any) -> None:
    """Exact where the recipe is, and the same in one call and in several, with padding, growing, fixed and saved."""
    model = make()
    made = latent.convert(model, RECIPES[name], text())
    whole = logits(made, use_cache=False)
    if name in ("joint", "spans", "cross-layer", "routed"):
        assert error(whole, logits(model, use_cache=False)) < 1e-6
    given = {"attention_mask": MASK, "position_ids": places(MASK)}
    padded = logits(made, use_cache=False, **given)
    shown = MASK.bool()
    for length in (None, 64):
        if name == "cross-layer" or (name, length) == ("short spans", None):
            continue
        assert error(in_parts(made, latent.LatentCache(made, max_length=length)), whole) < 1e-6
        found = in_parts(made, latent.LatentCache(made, max_length=length), MASK)
        assert error(found[shown], padded[shown]) < 1e-6
    made.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(latent.load(tmp_path), use_cache=False), whole, rtol=0, atol=0)


@pytest.mark.parametrize("make", [ministral3, llama4])
@pytest.mark.parametrize("name", ["joint", "short spans", "routed, some"])
def test_compiled_decoding(make: Any, name: str) -> None:
    torch._dynamo.reset()
    made = latent.convert(make(), RECIPES[name], text())
    step = torch.compile(made, backend="latent")
    found = in_parts(made, latent.LatentCache(made, max_length=64), step=step)
    assert error(found, in_parts(made, latent.LatentCache(made, max_length=64))) < 1e-5


def test_one_token_of_routed_heads_from_their_own_weights() -> None:
    made = latent.convert(ministral3(), RECIPES["routed, some"], text())
    cache, one = latent.LatentCache(made), IDS[:1]
    found = torch.cat([logits(made, one[:, n : n + 1], past_key_values=cache) for n in range(one.shape[1])], 1)
    assert error(found, logits(made, one, use_cache=False)) < 1e-6
