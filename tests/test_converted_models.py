"""What holds for every recipe that changes what is remembered: caches, padding, beams, bytes, files, gradients."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import latent
import transformers
from convert_models import SMALL, convert, decoder, logits, relative, text, tiny
from latent.passes.recipes.head_spans import HeadSpans
from latent.passes.recipes.joint_latent import JointLatent
from latent.passes.recipes.separate_latent import SeparateLatent
from latent.passes.recipes.transmla import TransMLA
from latent.passes.recipes.weight_svd import WeightSVD
from latent.rewriter.convert.layers import ConversionRefused
from latent.rewriter.convert.spans.plan import SpanPlan
from latent.rewriter.convert.spans.span import Full, Window
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo.build import randomise

RECIPES: dict[str, Any] = {
    "joint": JointLatent(share=0.75),
    "separate": SeparateLatent(share=0.75),
    "separate-heads-folded": SeparateLatent(share=0.75, basis="head", fold_values=True),
    "transmla": TransMLA(share=0.75, freq_fold=2),
    "weight-svd": WeightSVD(share=0.5),
}
NUMBERS = {"joint": 20, "separate": 20, "separate-heads-folded": 20, "transmla": 24, "weight-svd": 16}
"""Cached numbers of a token and layer; of 32."""

recipes = pytest.mark.parametrize("name", RECIPES)


def made(name: str, model: str = "llama") -> Any:
    return convert(model, RECIPES[name])


def caches(model: Any, length: int) -> dict[str, Any]:
    return {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=length),
        "growing": latent.LatentCache(model),
        "fixed": latent.LatentCache(model, max_length=length),
    }


@recipes
@pytest.mark.parametrize("model", ["llama", "mistral", "gemma2"])
def test_decoding_is_prefill(name: str, model: str) -> None:
    converted, tokens = made(name, model), text(2, 20)  # longer than the window of 8
    wanted = logits(converted, input_ids=tokens, use_cache=False)
    for kind, cache in caches(converted, 24).items():
        parts = [tokens[:, :7], tokens[:, 7:10], *tokens[:, 10:].split(1, 1)]
        found = torch.cat([logits(converted, input_ids=part, past_key_values=cache) for part in parts], 1)
        assert relative(found, wanted) < 1e-6, kind


@recipes
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    converted, tokens = made(name), text(1, 12)
    wanted = logits(converted, input_ids=tokens, use_cache=False)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), tokens), 1)
    mask = (torch.arange(15) >= 3).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for kind, cache in caches(converted, 16).items():
        found = []
        for start, end in ((0, 9), *((n, n + 1) for n in range(9, 15))):
            now = {"input_ids": padded[:, start:end], "position_ids": positions[:, start:end]}
            found.append(logits(converted, attention_mask=mask[:, :end], past_key_values=cache, **now))
        assert relative(torch.cat(found, 1)[:, 3:], wanted) < 1e-6, kind


@recipes
def test_beams(name: str) -> None:
    converted = made(name)
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        wanted = converted.generate(text(2, 5), use_cache=False, **how)
        for cache in (latent.LatentCache(converted), latent.LatentCache(converted, max_length=16)):
            assert torch.equal(converted.generate(text(2, 5), past_key_values=cache, **how), wanted)


def storages() -> dict[int, int]:
    """Every live tensor's memory."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is Tensor]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@recipes
@pytest.mark.parametrize("length", [1, 16, 100])
def test_live_bytes_are_the_arithmetic(name: str, length: int) -> None:
    converted, batch, item = made(name), 2, 8
    layers = decoder("llama").layers
    late = any(attention.self_attn.memory.turns_late for attention in converted.model.layers)
    angles = layers[0].rotary.width if late else 0  # type: ignore[union-attr]
    tokens = text(batch, length)
    wanted = batch * length * (len(layers) * NUMBERS[name] * item + angles * item)
    before = storages()
    cache = latent.LatentCache(converted)
    logits(converted, input_ids=tokens, past_key_values=cache)
    assert cache.nbytes == wanted
    assert sum(size for at, size in storages().items() if at not in before) == wanted
    fixed = latent.LatentCache(converted, max_length=length)
    logits(converted, input_ids=tokens, past_key_values=fixed)
    counters = 8 * (len(layers) + (1 if late else 0))
    assert fixed.nbytes == wanted + counters


@recipes
def test_crop_and_reset(name: str) -> None:
    converted, tokens = made(name), text(2, 12)
    wanted = logits(converted, input_ids=tokens, use_cache=False)
    for cache in (latent.LatentCache(converted), latent.LatentCache(converted, max_length=16)):
        logits(converted, input_ids=text(2, 9, seed=8), past_key_values=cache)
        cache.reset()
        logits(converted, input_ids=torch.cat((tokens[:, :6], text(2, 3, seed=9)), 1), past_key_values=cache)
        cache.crop(-3)
        found = logits(converted, input_ids=tokens[:, 6:], past_key_values=cache)
        assert relative(found, wanted[:, 6:]) < 1e-6


@recipes
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, tokens = tiny("llama"), text(2)
    before, weights = logits(model, input_ids=tokens), {k: v.clone() for k, v in model.state_dict().items()}
    made(name)
    assert torch.equal(logits(model, input_ids=tokens), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not hasattr(model.config, "latent")


LOAD = """
import json, sys, torch, latent
found = {}
for folder in sys.argv[1:]:
    model = latent.load(folder)
    with torch.no_grad():
        out = model(input_ids=torch.arange(3, 15)[None], past_key_values=latent.LatentCache(model))
    found[folder] = [type(model).__name__, out.logits.flatten().tolist()]
print(json.dumps(found))
"""


def test_saved_models_compute_the_same_in_a_new_process(tmp_path: Path) -> None:
    wanted = {}
    for name in RECIPES:
        converted = convert("qwen2", RECIPES[name])
        converted.save_pretrained(tmp_path / name)
        wanted[str(tmp_path / name)] = logits(converted, input_ids=torch.arange(3, 15)[None]).flatten()
    done = subprocess.run([sys.executable, "-c", LOAD, *wanted], capture_output=True, text=True, check=True)
    for folder, (kind, values) in json.loads(done.stdout).items():
        assert kind == "Qwen2ForCausalLM"
        assert relative(torch.tensor(values, dtype=torch.float64), wanted[folder]) < 1e-12


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_saved_conversion_is_not_loaded_as_the_original(model: str, tmp_path: Path) -> None:
    """transformers alone would warn, and leave the weights of its attentions random."""
    converted = convert(model, JointLatent(share=0.75))
    converted.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    found, wanted = (logits(one, input_ids=text(2, 9)) for one in (latent.load(tmp_path), converted))
    assert relative(found, wanted) < 1e-12


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("GptOss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
        ("Qwen3_5Text", {"head_dim": 8, "layer_types": ["full_attention"] * 2}),
        ("Persimmon", {"num_key_value_heads": 4}),
        ("NanoChat", {}),
    ],
)
def test_sinks_gates_and_norms_are_saved(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(**SMALL | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model, seed=0)
    groups = 4 if kind == "Persimmon" else 2
    plan = SpanPlan(((Full(), *[Window(1, 3)] * (groups - 1)),) * 2)
    made = latent.convert(model, HeadSpans(plan=plan))
    made.save_pretrained(tmp_path)
    found, wanted = (logits(one, input_ids=text(2, 20)) for one in (latent.load(tmp_path), made))
    assert torch.equal(found, wanted)
    assert relative(wanted, logits(model, input_ids=text(2, 20))) > 1e-3  # its heads see spans


@recipes
def test_a_token_changes_nothing_before_it(name: str) -> None:
    converted, tokens = made(name), text(1, 12)
    other = tokens.clone()
    other[0, 7] = (other[0, 7] + 1) % 64
    a, b = (logits(converted, input_ids=ids, use_cache=False) for ids in (tokens, other))
    assert torch.equal(a[:, :7], b[:, :7])
    assert (a[:, 7:] != b[:, 7:]).any(-1).all()


@recipes
def test_training_goes_on(name: str) -> None:
    """Every weight of a converted attention has a gradient, and its model learns to predict as before."""
    converted, tokens = convert("qwen2", RECIPES[name]), text(4)
    target = logits(tiny("qwen2"), input_ids=tokens).softmax(-1)
    optimiser = torch.optim.Adam(converted.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        found = converted(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(found, target, reduction="batchmean")
        optimiser.zero_grad()
        loss.backward()
        gradients = {key: float(p.grad.abs().sum()) for key, p in converted.named_parameters() if ".self_attn." in key}
        optimiser.step()
        losses.append(float(loss.detach()))
    # A bias of what no position turns adds the same to all keys of a query.
    ignored = "self_attn.memory.up_key.bias" if name in ("transmla", "weight-svd") else "-"
    assert all(value > 0 for key, value in gradients.items() if not key.endswith(ignored))
    assert losses[-1] < 0.7 * losses[0]


def test_one_memory_for_each_attention() -> None:
    with pytest.raises(ConversionRefused, match="an earlier recipe put in a JointMemory"):
        convert("llama", [JointLatent(rank=16), TransMLA(rank=16, freq_fold=1)])
