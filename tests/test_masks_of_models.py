"""Masks of tiny Hugging Face models as Dynamo captures them, proven and compared with the masks of the same run."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from latent.rewriter.capture import capture
from latent.rewriter.masks.prove import Causal, Form, MaskProof, MaskReader, Padding
from latent.rewriter.masks.terms import Flags
from mask_tools import Seen, visible
from torch import fx

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def model_of(name: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    size = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    size |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)).eval()
    if name == "mistral":
        return transformers.MistralForCausalLM(
            transformers.MistralConfig(**size | {"num_hidden_layers": 1}, sliding_window=4)
        ).eval()
    config = transformers.Gemma2Config(**size, head_dim=8, query_pre_attn_scalar=8, sliding_window=4)
    return transformers.Gemma2ForCausalLM(config).eval()


@lru_cache
def captured(
    name: str, spelling: str, step: str, cache: str, dynamic: bool, padded: bool, packed: bool = False
) -> tuple[tuple[fx.Node, Form, MaskProof, Seen], ...]:
    """The masks of a tiny model as Dynamo captures it, each proven and with its values in the run."""
    import transformers

    model = model_of(name)
    model.set_attn_implementation(spelling)  # type: ignore[operator]
    prompt, mask = torch.randint(3, 64, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    inputs: dict[str, Any] = dict(input_ids=prompt, use_cache=cache != "none")
    if cache == "static":
        inputs["past_key_values"] = transformers.StaticCache(config=model.config, max_cache_len=16)
    elif cache == "dynamic":
        inputs["past_key_values"] = transformers.DynamicCache(config=model.config)
    if padded:
        inputs["attention_mask"] = mask
    if packed:
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])
    found: list[tuple[fx.Node, Form, MaskProof, Seen]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        gm = capture(gm, example_inputs)

        def run(*args: Any) -> Any:
            seen, reader = Seen(gm, args), MaskReader(gm.graph)
            for node, form in masks_in(gm):
                found.append((node, form, reader.prove(node, query_dim=-2, key_dim=-1, form=form), seen))
            return gm(*args)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        if step == "decode":
            model(**inputs)
            inputs["input_ids"] = torch.randint(3, 64, (2, 1))
            if padded:
                inputs["attention_mask"] = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        torch.compile(model, backend=backend, dynamic=dynamic)(**inputs)
    return tuple(found)


def masks_in(gm: fx.GraphModule) -> list[tuple[fx.Node, Form]]:
    found: list[tuple[fx.Node, Form]] = []
    for node in gm.graph.nodes:
        if node.target is SDPA and isinstance(mask := node.kwargs.get("attn_mask", (*node.args, 0, 0)[3]), fx.Node):
            found.append((mask, "keep"))
        elif node.target is torch.ops.aten.softmax.int:
            scores = node.args[0]
            while scores.target is not torch.ops.aten.add.Tensor:
                scores = scores.args[0]
            found.append((scores.args[1], "additive"))
    return found


MODELS = {
    # model, spelling, step, cache, dynamic, padded: masks of layers 0 and 1
    ("llama", "sdpa", "prefill", "none", False, False): ("causal", "causal"),
    ("llama", "eager", "prefill", "none", True, True): ("causal, padding", "causal, padding"),
    ("llama", "eager", "decode", "dynamic", True, True): ("padding", "padding"),
    ("llama", "sdpa", "decode", "static", False, True): ("keys before * + 1, keys before 7, padding",) * 2,
    ("mistral", "sdpa", "prefill", "none", True, True): ("causal, window 4, padding",),
    ("mistral", "sdpa", "decode", "static", True, False): ("keys * to *",),
    ("gemma2", "eager", "prefill", "none", False, False): ("causal, window 4", "causal"),
    ("gemma2", "eager", "decode", "static", False, False): ("none", "keys before * + 1"),
}


@pytest.mark.parametrize("scenario", MODELS, ids=lambda s: "-".join(map(str, s)))
def test_masks_of_models(scenario: tuple[Any, ...]) -> None:
    found = captured(*scenario)
    for (node, form, proof, seen), want in zip(found, MODELS[scenario], strict=True):
        assert fnmatch.fnmatch(proof.describe(), want), proof.describe()
        mask = visible(seen.values[node], form)
        assert torch.equal(seen.materialised(proof, node), mask)
        assert (proof.fill is not None) == (form == "additive" and not bool(mask.all()))


def test_packed_model_is_not_causal_alone() -> None:
    ((node, form, proof, seen), _) = captured("llama", "sdpa", "prefill", "none", False, False, packed=True)
    assert not proof.opaque
    assert "segments of cumsum" in proof.describe() and "causal" in proof.describe()
    assert proof.flags != Flags(causal=True)
    assert torch.equal(seen.materialised(proof, node), visible(seen.values[node], form))


def test_layers_share_one_proof() -> None:
    (_, _, first, _), (_, _, second, _) = captured("llama", "eager", "prefill", "none", True, True)
    assert first is second
    causal, padding = first.terms
    assert isinstance(causal, Causal) and isinstance(padding, Padding)
