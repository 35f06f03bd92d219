"""Model type -> tiny model with random weights, and inputs for one forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .inputs import text_inputs
from .shrink import tiny_config

MATRIX_NOISE = 0.25
VECTOR_NOISE = 0.1


class CannotBuild(Exception):
    """A model type that cannot be built or run here; the message is the reason."""


@dataclass(frozen=True)
class Built:
    """A model in evaluation mode and the keyword arguments of one forward."""

    model: nn.Module
    inputs: dict[str, Any]

    def run(self) -> Any:
        """One forward without gradients."""
        with torch.no_grad():
            return self.model(**self.inputs)


def causal_lm_types() -> list[str]:
    """Every model type transformers offers as a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def randomise(model: nn.Module, seed: int) -> None:
    """Add noise to every parameter, so that scores vary and no norm or bias is the identity.

    Noise is added rather than drawn afresh because some parameters carry structure (decay rates, norms around one).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            scale = MATRIX_NOISE if parameter.ndim > 1 else VECTOR_NOISE
            noise = torch.randn(parameter.shape, generator=generator) * scale
            usable = torch.nan_to_num(parameter.float(), 0.0, 0.0, 0.0).clamp(-20, 20)
            parameter.copy_((usable + noise).to(parameter.dtype))


def first_tensor(output: Any) -> torch.Tensor:
    """The tensor a forward is judged by: logits where there are some."""
    candidates = [output, getattr(output, "logits", None), getattr(output, "last_hidden_state", None)]
    for candidate in candidates if isinstance(output, (torch.Tensor, dict)) else output:
        if isinstance(candidate, torch.Tensor):
            return candidate
    raise TypeError(f"no tensor in {type(output).__name__}")


def _instantiate(config: Any, attn: str, dtype: torch.dtype) -> Any:
    """The causal language model of a configuration, or of the part of it that the model class asks for."""
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    wanted = model_class.config_class
    if wanted is not None and not isinstance(config, wanted):
        config = next((part for part in vars(config).values() if isinstance(part, wanted)), config)
    return model_class._from_config(config, attn_implementation=attn, dtype=dtype)


def finish(
    make: Callable[[], Any],
    make_inputs: Callable[[nn.Module], dict[str, Any]],
    *,
    seed: int = 0,
) -> Built:
    """Make a model, randomise it and run it once; raises `CannotBuild` with the reason of whatever fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = make().eval()
            randomise(model, seed)
            built = Built(model, make_inputs(model))
            result = first_tensor(built.run())
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]) from error
    if not torch.isfinite(result).all():
        raise CannotBuild("the output is not finite")
    return built


def build(
    model_type: str,
    *,
    attn: str = "eager",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    use_cache: bool = False,
) -> Built:
    """A tiny causal language model of this type which has run once; raises `CannotBuild` with the reason if not."""

    def make() -> Any:
        config = tiny_config(model_type)
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        return _instantiate(config, attn, dtype)

    return finish(make, lambda model: text_inputs(model, seed=seed, use_cache=use_cache), seed=seed)
