"""Models that have to be left alone, besides those that reading refuses: the reason, and that nothing was changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import latent
import transformers
from convert_models import SMALL, text, tiny
from latent.passes.recipes.joint_latent import JointLatent
from latent.rewriter.convert.layers import ConversionRefused
from torch import nn
from zoo.build import randomise


def small(kind: str, automatic: Any = transformers.AutoModelForCausalLM, **changes: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    model = automatic.from_config(config).eval()
    randomise(model, seed=0)
    return model


def llama() -> Any:
    return copy.deepcopy(tiny("llama", torch.float32))


def normed_keys() -> Any:
    return small("Qwen3", head_dim=8)


def cross_attention() -> Any:
    return small("T5", transformers.AutoModelForSeq2SeqLM, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)


def encoder() -> Any:
    return small("Bert", transformers.AutoModelForMaskedLM)


class Rounded(nn.Module):
    """A linear layer of 8 bits that rounds what it is given as well."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() @ self.weight.to(x.dtype).t() * (step * self.scale)


def quantised() -> Any:
    model = llama()
    for block in model.model.layers:
        block.self_attn.k_proj = Rounded(block.self_attn.k_proj)
    return model


class Bent(nn.Linear):
    """A projection of something else than the hidden states."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.tanh(x))


def other_values() -> Any:
    model = llama()
    for block in model.model.layers:
        bent = Bent(32, 16, bias=False)
        bent.load_state_dict(block.self_attn.v_proj.state_dict())
        block.self_attn.v_proj = bent
    return model


CASES: list[tuple[Callable[[], Any], str]] = [
    (normed_keys, "joint_latent, layer 0: a norm stands between the projection of the keys"),
    (cross_attention, "encoder with a decoder"),
    (encoder, "queries see the keys that follow"),
    (quantised, "no projection with a weight"),
    (other_values, "not made of the same hidden states"),
]


@pytest.mark.parametrize(("make", "why"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_refused_with_a_reason(make: Callable[[], Any], why: str) -> None:
    model = make()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ConversionRefused, match=why):
        latent.convert(model, JointLatent(rank=8), text())
    assert [type(module) for module in model.modules()] == modules
    assert not hasattr(model.config, "latent")
