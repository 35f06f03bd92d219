"""Architectures whose number of attentions is known in advance, by counting layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from .build import Built, build, finish
from .handwritten import EinopsTransformer, NanoGPT, TorchTransformer
from .inputs import BATCH, ENCODED, TOKENS, text_inputs
from .shrink import tiny_config

DECODERS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon"),
    *("starcoder2", "olmo2", "granite", "deepseek_v2", "deepseek_v3", "gptj", "gpt_oss"),
)
ENCODERS = ("bert", "roberta")
FRAMES = 48


@dataclass(frozen=True)
class Named:
    """An architecture, how to build it, and how many attentions one forward must execute."""

    name: str
    make: Callable[..., Built]
    sites: Callable[[Any], int]

    def build(self, **options: Any) -> Built:
        """`attn`, `dtype` and `seed` as in `zoo.build.build`."""
        return self.make(**options)

    def expected(self, built: Built) -> int:
        """The number of attentions, from the configuration."""
        return self.sites(getattr(built.model, "config", None))


def _layers(config: Any) -> int:
    return int(config.get_text_config().num_hidden_layers)


def _both_stacks(config: Any) -> int:
    """Encoder layers attend once, decoder layers twice."""
    encoder = getattr(config, "encoder_layers", None) or config.num_layers
    decoder = getattr(config, "decoder_layers", None) or config.num_decoder_layers
    return int(encoder + 2 * decoder)


def _decoder(model_type: str) -> Named:
    return Named(model_type, lambda **options: build(model_type, **options), _layers)


def _auto(
    model_type: str,
    auto: Any,
    sites: Callable[[Any], int],
    inputs: Callable[..., dict[str, Any]],
    **changes: Any,
) -> Named:
    """An architecture behind one of the library's other automatic classes."""

    def make(*, attn: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0) -> Built:
        def model() -> nn.Module:
            config = tiny_config(model_type, **changes)
            return auto.from_config(config, attn_implementation=attn, dtype=dtype)  # type: ignore[no-any-return]

        return finish(model, lambda made: inputs(made, seed), seed=seed)

    return Named(model_type, make, sites)


def _handwritten(name: str, model: Callable[[], nn.Module], sites: int, inputs: Callable[..., dict[str, Any]]) -> Named:
    def make(*, attn: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0) -> Built:
        return finish(lambda: model().to(dtype), lambda made: inputs(made, seed), seed=seed)

    return Named(name, make, lambda _: sites)


def _noise(model: nn.Module, seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)


def _padding(length: int) -> torch.Tensor:
    """True where a key may be seen; the last two of row 1 may not."""
    seen = torch.ones(BATCH, length, dtype=torch.bool)
    seen[1, -2:] = False
    return seen


def _text(model: nn.Module, seed: int) -> dict[str, Any]:
    return text_inputs(model, seed=seed)


def _pixels(model: Any, seed: int) -> dict[str, Any]:
    size = model.config.image_size
    return {"pixel_values": _noise(model, seed, BATCH, 3, size, size)}


def _text_pair(model: Any, seed: int) -> dict[str, Any]:
    source, target = text_inputs(model, seed=seed), text_inputs(model, seed=seed + 1)
    return {**source, "decoder_input_ids": target["input_ids"][:, : TOKENS - 3]}


def _speech(model: Any, seed: int) -> dict[str, Any]:
    target = torch.randint(12, 30, (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed))
    features = _noise(model, seed, BATCH, model.config.num_mel_bins, FRAMES)
    return {"input_features": features, "decoder_input_ids": target, "use_cache": False}


def _tokens(model: nn.Module, seed: int) -> dict[str, Any]:
    return {"idx": torch.randint(0, 131, (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed))}


def _with_context(model: nn.Module, seed: int) -> dict[str, Any]:
    x, context = _noise(model, seed, BATCH, TOKENS, 32), _noise(model, seed + 1, BATCH, ENCODED, 32)
    return {"x": x, "context": context, "mask": _padding(ENCODED)}


def _source_and_target(model: nn.Module, seed: int) -> dict[str, Any]:
    source, target = _noise(model, seed, BATCH, ENCODED, 32), _noise(model, seed + 1, BATCH, TOKENS, 32)
    return {"src": source, "tgt": target, "src_key_padding_mask": ~_padding(ENCODED)}


NAMED: tuple[Named, ...] = (
    *(_decoder(model_type) for model_type in DECODERS),
    *(_auto(model_type, AutoModelForMaskedLM, _layers, _text) for model_type in ENCODERS),
    _auto("t5", AutoModelForSeq2SeqLM, _both_stacks, _text_pair),
    _auto("vit", AutoModelForImageClassification, _layers, _pixels),
    _auto("whisper", AutoModelForSpeechSeq2Seq, _both_stacks, _speech, max_source_positions=FRAMES // 2),
    _handwritten("nano_gpt", NanoGPT, 2, _tokens),
    _handwritten("einops", EinopsTransformer, 4, _with_context),
    _handwritten("nn_transformer", TorchTransformer, 6, _source_and_target),
)


def named(names: Iterable[str] = ()) -> tuple[Named, ...]:
    """All named architectures, or the ones asked for."""
    wanted = set(names)
    return tuple(entry for entry in NAMED if not wanted or entry.name in wanted)
