"""Hugging Face folders as targets: the model with its weights or with random ones, and inputs that fit it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from .targets import HFChoices, Target, TargetError

__all__ = ["import_transformers", "load_folder"]

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TEXT = "The quick brown fox jumps over the lazy dog, and then it lies down in the shade of an old tree to sleep. "


def import_transformers() -> Any:
    """The library, or a TargetError that names what to install."""
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            f"A Hugging Face folder needs transformers, which cannot be imported: {error}.",
            'Install it with: pip install "torch-latent[hf]"',
        ) from error
    return transformers


def load_folder(folder: Path, choices: HFChoices) -> Target:
    """The model of a folder and one call of it. Raises TargetError."""
    file = folder / "config.json"
    if (folder / "manifest.json").is_file() and not file.is_file():
        raise TargetError(
            f"{folder}: this folder is a dump, and the command needs the model itself.",
            "`latent explain` and `latent report` read dumps, `latent diff` compares them.",
        )
    if not file.is_file():
        raise TargetError(
            f"{folder}: the folder has no config.json, so it is no Hugging Face model.",
            "Point at the folder that `save_pretrained` wrote. For anything else use file.py:factory.",
        )
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise TargetError(f"{file}: transformers cannot read it: {error}", "It needs a known `model_type`.") from error
    weights = any(next(folder.glob(pattern), None) for pattern in WEIGHTS)
    random = choices.from_config or not weights
    model, spelling = _build(transformers, folder, config, random, choices.attention)
    notes = []
    if random:
        notes.append("random weights" + ("" if choices.from_config else ": the folder holds none") + " (seed 0)")
    notes.append(f"attention spelled as {spelling}")
    kwargs = _inputs(folder, config, model, choices)
    if choices.phase == "decode":
        kwargs = _decode(model, kwargs, folder)
        notes.append(f"one decode step after {choices.tokens} tokens, with a dynamic cache")
    else:
        notes.append("one forward" + (f" over {choices.tokens} tokens" if "input_ids" in kwargs else ""))
    return Target(model, (), kwargs, tuple(notes))


def _build(transformers: Any, folder: Path, config: Any, random: bool, attention: str | None) -> tuple[Any, str]:
    import torch

    kind = next((getattr(transformers, n, None) for n in config.architectures or ()), None) or transformers.AutoModel
    options = {"attn_implementation": attention} if attention else {}
    dtype = getattr(config, "dtype", None) or torch.float32
    try:
        if random:
            torch.manual_seed(0)
            make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
            model = make(config, dtype=dtype, **options)
        else:
            model = _from_pretrained(kind, folder, config, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise TargetError(
            f"{folder}: {kind.__name__} cannot be made: {type(error).__name__}: {error}",
            "With --from-config the weights are left aside; --attention eager|sdpa chooses the spelling.",
        ) from error
    return model.eval(), str(getattr(model.config, "_attn_implementation", None) or "it is written")


def _from_pretrained(kind: Any, folder: Path, config: Any, **options: Any) -> Any:
    """Converted models are put together by latent, all others by transformers."""
    if getattr(config, "latent", None):
        from ..convert.store import load

        return load(folder, **options)
    return kind.from_pretrained(folder, local_files_only=True, **options)


def _inputs(folder: Path, config: Any, model: Any, choices: HFChoices) -> dict[str, Any]:
    import torch

    text = config.get_text_config()
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3), height, width, dtype=model.dtype)}
    if model.main_input_name != "input_ids":
        raise TargetError(
            f"{folder}: {type(model).__name__} takes {model.main_input_name!r}, for which no input is made up here.",
            "Write a factory that returns (model, args, kwargs), and use file.py:factory.",
        )
    ids = _token_ids(folder, text.vocab_size, choices.tokens)
    if config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, : max(1, choices.tokens // 2)]}
    return {"input_ids": ids}


def _token_ids(folder: Path, vocabulary: int, count: int) -> Any:
    """English where a tokenizer lies in the folder, else token ids in a row."""
    import torch

    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        with contextlib.suppress(Exception):  # a tokenizer that does not load is no reason not to look at the model
            tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
            ids = tokenizer(TEXT * (1 + count // 16), return_tensors="pt")["input_ids"][:, :count]
            if ids.shape[1] == count and int(ids.max()) < vocabulary:
                return ids
    return (torch.arange(count) % max(2, vocabulary - 1))[None]


def _decode(model: Any, kwargs: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the prefill eagerly; what is left is the call for the next token."""
    import torch

    if not model.can_generate():
        raise TargetError(
            f"{folder}: {type(model).__name__} does not generate, so it has no decode phase.", "Leave out --phase."
        )
    with torch.no_grad():
        done = model(**kwargs, use_cache=True)
    token = done.logits[:, -1:].argmax(-1)
    if "decoder_input_ids" in kwargs:
        kwargs = {"encoder_outputs": (done.encoder_last_hidden_state,), "decoder_input_ids": token}
    else:
        kwargs = {"input_ids": token}
    if (cache := getattr(done, "past_key_values", None)) is not None:
        kwargs["past_key_values"] = cache
    return kwargs
