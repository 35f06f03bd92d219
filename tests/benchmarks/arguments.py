"""What the benchmarks of models have in common: their arguments, the run, the table."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import torch
from latent.rewriter.command.bench import CONTESTANTS, BenchChoices, bench
from latent.rewriter.command.bench_text import render
from latent.rewriter.command.targets import Target


def parser(text: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Options with the names of `latent bench`, with these defaults."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    standard = {field.name: field.default for field in fields(BenchChoices)} | defaults
    for name in ("tokens", "cached", "repeat"):
        made.add_argument(f"--{name}", type=int, default=standard[name])
    made.add_argument("--threads", type=int)
    made.add_argument("--cache", choices=("static", "dynamic"), default="static")
    made.add_argument("--only", choices=CONTESTANTS, action="append", default=[])
    made.add_argument("--phase", choices=("decode", "prefill"), action="append", default=[])
    return made


def run(name: str, model: torch.nn.Module, given: argparse.Namespace, dtype: str = "float32", **other: Any) -> None:
    """Measure a causal language model and print the table."""
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(0, int(vocabulary), (1, 16), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    choices = {"tokens": given.tokens, "cached": given.cached, "repeat": given.repeat} | other
    phases, only = tuple(given.phase) or ("decode", "prefill"), tuple(given.only) or CONTESTANTS
    wanted = BenchChoices(phases, only, cache=given.cache, dtype=dtype, threads=given.threads, **choices)
    print(render(bench(name, Target(model, (), {"input_ids": ids}), wanted)), flush=True)
