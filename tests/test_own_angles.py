"""Attentions that make the angles of positions themselves: the frequencies that are read, and what is made of them."""

from __future__ import annotations

import functools
from typing import Any

import latent
import pytest
import torch
import transformers
from convert_models import SMALL, text
from hypothesis import given, settings
from hypothesis import strategies as st
from latent.passes.recipes.head_spans import HeadSpans
from latent.passes.recipes.joint_latent import JointLatent
from latent.passes.recipes.transmla import TransMLA
from latent.rewriter.convert.layers import ConversionRefused
from latent.rewriter.convert.own_angles import fitted_angles
from latent.rewriter.convert.read_decoder import read_decoder
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, rotate_half
from zoo.build import randomise

IDS = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :6] = 0
PLACES = (MASK.cumsum(-1) - 1).clamp_min(0)

GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48, "rotary_dim": 4}


def gptj() -> Any:
    return prepared(transformers.GPTJForCausalLM(transformers.GPTJConfig(**GPT, bos_token_id=1, eos_token_id=2)))


def codegen() -> Any:
    return prepared(transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**GPT, bos_token_id=1, eos_token_id=2)))


class Own(LlamaAttention):
    """As modelling code that comes with weights often has it: angles from `position_ids`, in the attention."""

    factor = 1.0

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.register_buffer("inv_freq", 1e4 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim), persistent=False)

    def angles(self, position_ids: Tensor) -> Tensor:
        once = position_ids[:, :, None].float() * self.inv_freq.float()
        return torch.cat((once, once), -1)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **given: Any) -> Any:
        shape, past = (*hidden_states.shape[:2], -1, self.head_dim), given.get("past_key_values")
        query, key, value = (
            linear(hidden_states).view(shape).transpose(1, 2) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = self.angles(given["position_ids"])[:, None]
        cos, sin = (angles.cos() * self.factor).to(query.dtype), (angles.sin() * self.factor).to(query.dtype)
        query, key = (x * cos + rotate_half(x) * sin for x in (query, key))
        if past is not None:
            key, value = past.update(key, value, self.layer_idx)
        key, value = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (key, value))
        causal = attention_mask is None and query.shape[2] > 1
        attend = nn.functional.scaled_dot_product_attention
        out = attend(query, key, value, attention_mask, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class Yarn(Own):
    factor = 1.25


class Table(Own):
    """As Llama's code once had it: a table of all positions, cut to the text, of which rows are taken."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.register_buffer("table", torch.outer(torch.arange(128).float(), self.inv_freq), persistent=False)

    def angles(self, position_ids: Tensor) -> Tensor:
        once = self.table[: self.length].float()[position_ids]
        return torch.cat((once, once), -1)

    def forward(self, hidden_states: Tensor, **given: Any) -> Any:
        past = given.get("past_key_values")
        self.length = hidden_states.shape[1] + (0 if past is None else past.get_seq_length(self.layer_idx))
        return super().forward(hidden_states, **given)


class TableMadeAnew(Table):
    def angles(self, position_ids: Tensor) -> Tensor:
        once = torch.outer(torch.arange(self.length).float(), self.inv_freq.float())[position_ids]
        return torch.cat((once, once), -1)


class Bent(Own):
    def angles(self, position_ids: Tensor) -> Tensor:
        return super().angles(position_ids**2 // 16)


class Learned(Own):
    """Angles that the hidden states have a say in."""

    def forward(self, hidden_states: Tensor, **given: Any) -> Any:
        places = given.pop("position_ids") + (hidden_states.mean(-1) > 0)
        return super().forward(hidden_states, position_ids=places, **given)


class WithoutAngles(LlamaDecoderLayer):
    """Hands none to its attention."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **given: Any) -> Any:
        return super().forward(hidden_states, **given)


def llama_with(attention: type[Own]) -> Any:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    for n in range(len(model.model.layers)):
        model.model.layers[n] = WithoutAngles(model.config, n)
        model.model.layers[n].self_attn = attention(model.config, n)
    return prepared(model)


def prepared(model: Any) -> Any:
    randomise(model.eval(), seed=0)
    return model.double()


MODELS = {
    "gptj": gptj,
    "codegen": codegen,
    **{kind.__name__: functools.partial(llama_with, kind) for kind in (Own, Yarn, Table, TableMadeAnew)},
}


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **given: Any) -> Tensor:
    return model(input_ids=ids, **given).logits


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1e-6, 3.0), min_size=1, max_size=8),
    st.sampled_from([1.0, 0.5, 1.2407]),
    st.sampled_from([64, 500, 4096]),
)
def test_frequencies_are_found_to_a_rounding(frequencies: list[float], factor: float, positions: int) -> None:
    wanted = torch.tensor(frequencies)
    angles = torch.arange(positions).float()[:, None] * wanted
    found = fitted_angles(angles.cos() * factor, angles.sin() * factor)
    assert found is not None
    assert found.factor == pytest.approx(factor, rel=1e-6)
    off = (torch.tensor(found.frequencies) - wanted).abs()
    assert bool((off <= 2e-7 * wanted + 4e-8 / positions).all())


@pytest.mark.parametrize("bent", [lambda p: p**2, lambda p: p + 1, lambda p: p // 2, lambda p: p.sqrt()])
def test_other_functions_of_the_position_are_not(bent: Any) -> None:
    angles = bent(torch.arange(200).float())[:, None] * torch.tensor([1.0, 0.1, 0.01])
    assert fitted_angles(angles.cos(), angles.sin()) is None


def test_frequencies_of_gptj() -> None:
    for layer in read_decoder(gptj()).layers:
        assert layer.own_angles is not None and layer.call.positions and layer.turns == 0
        assert layer.own_angles.frequencies == tuple(torch.tensor([1.0, 0.01]).tolist())


@pytest.mark.parametrize("kind", [Bent, Learned])
def test_angles_that_do_not_grow_evenly_are_refused(kind: type[Own]) -> None:
    with pytest.raises(ConversionRefused, match="do not grow evenly with the position"):
        read_decoder(llama_with(kind))


@pytest.mark.parametrize("name", MODELS)
def test_latents_of_full_rank(name: str, tmp_path: Any) -> None:
    """The same as the model, in one call and in several, with padding, growing, fixed and saved."""
    model = MODELS[name]()
    made = latent.convert(model, JointLatent(rank=model.config.hidden_size * 2), text())
    given = {"attention_mask": MASK, "position_ids": PLACES}
    wanted, shown = logits(model, use_cache=False, **given), MASK.bool()
    whole = logits(made, use_cache=False)
    assert error(whole, logits(model, use_cache=False)) < 1e-6
    assert error(logits(made, use_cache=False, **given)[shown], wanted[shown]) < 1e-6
    for length in (None, 64):
        cache, found = latent.LatentCache(made, max_length=length), []
        for start, end in ((0, 17), *((n, n + 1) for n in range(17, 30))):
            part = {"attention_mask": MASK[:, :end], "position_ids": PLACES[:, start:end]}
            found.append(logits(made, IDS[:, start:end], past_key_values=cache, **part))
        assert error(torch.cat(found, 1)[shown], wanted[shown]) < 1e-6
    made.save_pretrained(tmp_path)
    if name in ("gptj", "codegen"):
        torch.testing.assert_close(logits(latent.load(tmp_path), use_cache=False), whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_was_cast_as_a_whole(dtype: torch.dtype) -> None:
    """Its table of cosines is rounded too; the frequencies are those of the model before."""
    model = gptj()
    exact, wanted = read_decoder(model).layers[0].own_angles, logits(model)
    model = model.to(dtype)
    assert model.transformer.h[0].attn.embed_positions.dtype == dtype
    found = read_decoder(model).layers[0].own_angles
    assert found is not None and exact is not None and found.factor == exact.factor == 1
    assert found.frequencies == pytest.approx(exact.frequencies, rel=1e-3)
    made = latent.convert(model, JointLatent(rank=64), text())
    rounding = error(logits(model).to(wanted), wanted)
    assert error(logits(made).to(wanted), wanted) < 2 * rounding < 0.1


def test_spans_and_transmla() -> None:
    model = llama_with(Own)
    spans = latent.convert(model, HeadSpans(density=1.0, measure="uniform", lengths=(64,)), text())
    turned = latent.convert(model, TransMLA(rope_dim=8, freq_fold=1, share=1.0), text())
    for made in (spans, turned):
        cache = latent.LatentCache(made)
        found = torch.cat([logits(made, IDS[:, n : n + 1], past_key_values=cache) for n in range(12)], 1)
        assert error(found, logits(made, IDS[:, :12], use_cache=False)) < 1e-6
    assert error(logits(spans, use_cache=False), logits(model, use_cache=False)) < 1e-6


def test_compiled_decoding() -> None:
    torch._dynamo.reset()
    made = latent.convert(gptj(), JointLatent(rank=24), text())
    step = torch.compile(made, backend="latent")
    both = []
    for run in (made, step):
        cache = latent.LatentCache(made, max_length=64)
        logits(made, IDS[:, :17], past_key_values=cache)
        both.append(torch.cat([logits(run, IDS[:, n : n + 1], past_key_values=cache) for n in range(17, 24)], 1))
    assert error(both[1], both[0]) < 1e-5
