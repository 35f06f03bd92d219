"""`python tests/benchmarks/compression.py`: methods that make the cache of SmolLM2-135M smaller, at equal bytes.

Every method is calibrated with three draws of text and scored on the same windows: at least 20 000 tokens of prose
and of code. Methods of about the same bytes stand together, naive baselines among them; ± is the standard deviation
over the draws. Each run is appended to --out, and runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import latent
import torch
from latent.passes.recipes.routed_heads import HeadRouter, UntrainedRouter
from latent.rewriter.command.console import aligned, counted, progress
from latent.rewriter.command.demo import smollm2_folder
from latent.rewriter.command.eval import cache_for, load_model, load_tokenizer
from latent.rewriter.evaluate.evaluation import (
    Evaluation,
    Material,
    Protocol,
    draw,
    evaluate,
    evaluate_original,
    references,
)
from latent.rewriter.evaluate.forward import CacheOf
from latent.rewriter.evaluate.quality import Reference
from latent.rewriter.evaluate.texts import DEFAULT_TEXTS, calibration_tokens, read_text
from latent.rewriter.units import number_text
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

DENSE = "dense"


@dataclass(frozen=True)
class Method:
    """One line of the table."""

    name: str
    convert: Callable[[Any, torch.Tensor], Any] = lambda model, tokens: model
    """(a copy of the original, calibration tokens [windows, length]) -> the model that is measured."""
    cache_of: CacheOf = cache_for
    calibrated: bool = True
    """Without calibration one run says all."""


class HalfLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in 16 bits: what every other method of half the bytes has to beat."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        held = super().update(keys.bfloat16(), values.bfloat16(), *args, **kwargs)
        return tuple(tensor.to(keys.dtype) for tensor in held)


def half_cache(model: Any) -> Any:
    cache = DynamicCache(config=model.config)
    cache.layers = [HalfLayer() for _ in cache.layers]
    return cache


class ForgettingLayer(DynamicLayer):  # type: ignore[misc]
    """Of the first call its newest tokens and the first four: what a factor of all of them has to beat."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.forgotten = share, 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        held = super().update(keys, values, *args, **kwargs)
        if (prompt := keys.shape[-2]) == self.keys.shape[-2]:
            self.forgotten = prompt - round(self.share * prompt)
            self.keys, self.values = (
                torch.cat((x[..., :4, :], x[..., self.forgotten + 4 :, :]), -2) for x in (self.keys, self.values)
            )
        return held

    def get_seq_length(self) -> int:
        return int(super().get_seq_length()) + self.forgotten

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What is kept lies right before the call, as far as a mask sees; angles are those of the keys' own places."""
        return super().get_seq_length() + query_length, self.forgotten


def forgetting_cache(share: float) -> CacheOf:
    def cache(model: Any) -> Any:
        made = DynamicCache(config=model.config)
        made.layers = [ForgettingLayer(share) for _ in made.layers]
        return made

    return cache


def by(recipe: Any) -> Callable[[Any, torch.Tensor], Any]:
    return lambda model, tokens: latent.convert(model, recipe, tokens, inplace=True)


def same_heads(share: float) -> Callable[[Any, torch.Tensor], Any]:
    """Every token uses the heads that add most on the text: what a router's guess for each token has to beat."""

    def convert(model: Any, tokens: torch.Tensor) -> Any:
        made = by(latent.RoutedHeads(share=share, ranking="text"))(model, tokens)
        for router in (module for module in made.modules() if isinstance(module, HeadRouter)):
            torch.nn.init.zeros_(router.scores.weight)
        return made

    return convert


def methods(prompt: int, length: int) -> tuple[Method, ...]:
    """Every line of the table, for windows of `length` tokens of which the first `prompt` are read in one call."""
    shares = (75, 50, 25)
    return (
        *(Method(f"joint latent {share} %", by(latent.JointLatent(share=share / 100))) for share in shares),
        Method("joint, not weighed 50 %", by(latent.JointLatent(share=0.5, weigh=False))),
        *(Method(f"separate latents {share} %", by(latent.SeparateLatent(share=share / 100))) for share in shares),
        Method("TransMLA full rank", by(latent.TransMLA(share=1.0))),
        *(Method(f"TransMLA {share} %", by(latent.TransMLA(share=share / 100))) for share in shares),
        Method("weights only 50 %", by(latent.WeightSVD(share=0.5)), calibrated=False),
        *(Method(f"spans {share} %", by(latent.HeadSpans(density=share / 100))) for share in (50, 25)),
        *(
            Method(
                f"one window {share} %",
                by(latent.HeadSpans(density=share / 100, measure="uniform", lengths=(length,))),
                calibrated=False,
            )
            for share in (50, 25)
        ),
        *(
            Method(
                f"xKV, groups of {n}, {share} %",
                by(latent.CrossLayerSVD(group=n, share=share / 100, length=prompt, least=1)),
                calibrated=False,
            )
            for share in (50, 25)
            for n in (1, 2, 3, 5)
        ),
        *(
            Method(f"newest {share} % of the prompt", cache_of=forgetting_cache(share / 100), calibrated=False)
            for share in (50, 25)
        ),
        Method("7 of 9 heads, untrained", by(latent.RoutedHeads(share=7 / 9, ranking="text"))),
        Method(
            "7 of 9 heads on average, untrained",
            by(latent.RoutedHeads(share=7 / 9, ranking="text", layers="text")),
        ),
        Method("7 of 9 heads, the same", same_heads(7 / 9)),
        Method("16-bit cache", cache_of=half_cache, calibrated=False),
    )


def main() -> None:
    given = _arguments()
    warnings.simplefilter("ignore", UntrainedRouter)
    folder = str(given.folder or smollm2_folder())
    lengths = sorted({given.length, *given.filled})
    protocol = Protocol(given.tokens, given.length, given.prefix, given.call, tuple(given.gap), lengths=tuple(lengths))
    tokenizer = load_tokenizer(Path(folder))
    drawn = draw(tokenizer, [read_text(name) for name in given.text], protocol)
    calibrating = [read_text(name) for name in given.calibrate]
    settings = {
        "protocol": asdict(protocol),
        "calibrate": given.calibrate,
        "windows": [given.windows, given.rows],
        "texts": {sample.text: sample.digest for sample in drawn.samples},
    }
    runs = Runs(given.out, settings)

    original = load_model(folder)
    known = references(original, drawn, protocol, bar(DENSE))
    if runs.missing(DENSE, 0):
        found = evaluate_original(DENSE, original, drawn, protocol, known, cache_for, bar(DENSE))
        runs.add(DENSE, 0, found)
    del original
    for method in chosen(given):
        for seed in range(given.seeds if method.calibrated else 1):
            if runs.missing(method.name, seed):
                tokens = calibration_tokens(tokenizer, calibrating, given.windows, given.rows, seed)
                runs.add(method.name, seed, measured(method, folder, tokens, drawn, protocol, known))
        print(f"\n{table(runs.found)}\n", flush=True)


def chosen(given: argparse.Namespace) -> list[Method]:
    """The methods asked for, all of them if none is."""
    every = {method.name: method for method in methods(given.prefix, given.length)}
    if unknown := [name for name in given.method if name not in every]:
        raise SystemExit(f"no method {unknown[0]!r}; there are: {', '.join(every)}")
    return [every[name] for name in given.method or every]


def measured(
    method: Method,
    folder: str,
    tokens: torch.Tensor,
    drawn: Material,
    protocol: Protocol,
    known: dict[str, Reference],
) -> Evaluation:
    model = load_model(folder)
    with progress(f"{method.name}: converting"):
        model = method.convert(model, tokens)
    return evaluate(method.name, model, drawn, protocol, method.cache_of, known, bar(method.name))


def bar(name: str) -> Callable[[str, int], AbstractContextManager[Callable[[], None]]]:
    return lambda what, total: counted(f"{name}: {what}", total)


class Runs:
    """What was measured with these settings, in memory and in a file of a line for each run."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, json.loads(json.dumps(settings))
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self.found: list[dict[str, Any]] = [line for line in lines if line["settings"] == self.settings]

    def missing(self, method: str, seed: int) -> bool:
        return all((run["name"], run["seed"]) != (method, seed) for run in self.found)

    def add(self, method: str, seed: int, evaluation: Evaluation) -> None:
        text = json.dumps({"settings": self.settings, "seed": seed, **evaluation.to_dict()})
        self.found.append(json.loads(text))
        with self.file.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Methods in groups of about equal bytes, the best on the first text first."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["name"], []).append(run)
    base = held(by_name[DENSE])
    groups: dict[int, list[list[dict[str, Any]]]] = {}
    for same in by_name.values():
        groups.setdefault(5 * round(20 * held(same) / base), []).append(same)
    texts = [score["text"] for score in runs[0]["scores"]]
    heads = ("", "B/token", *(head for text in texts for head in (text, "±", "vs dense", "±", "KL", "same")))
    heads += tuple(f"{recall['gap']} apart" for recall in runs[0]["recalls"])
    rows, breaks = [heads], []
    for _, members in sorted(groups.items(), reverse=True):
        breaks.append(len(rows))
        rows += [line(same) for same in sorted(members, key=lambda same: mean(same, 0, "perplexity", "mean"))]
    lines = aligned(rows, indent=0)
    for place in reversed(breaks):
        share = 5 * round(20 * held(by_name[rows[place][0]]) / base)
        lines.insert(place, f"── about {share} % of the bytes")
    return "\n".join(lines)


def line(same: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The draws of one method."""
    cells = [same[0]["name"], number_text(round(held(same)))]
    for text in range(len(same[0]["scores"])):
        cells += [f"{mean(same, text, 'perplexity', 'mean'):.2f}", spread(same, text, "perplexity", "mean", 1)]
        if same[0]["scores"][text]["against"] is None:
            cells += ["–"] * 4
            continue
        cells += [f"{100 * mean(same, text, 'against', 'increase'):+.1f} %"]
        cells += [spread(same, text, "against", "increase", 100)]
        cells += [f"{max(0.0, mean(same, text, 'against', 'kl')):.2g}"]
        cells += [f"{100 * mean(same, text, 'against', 'agreement'):.1f} %"]
    draws = zip(*(run["recalls"] for run in same), strict=True)
    cells += [f"{statistics.mean(recall['gain'] for recall in each):.1f}" for each in draws]
    return tuple(cells)


def held(same: Sequence[dict[str, Any]]) -> float:
    """Bytes per token of a cache with as many tokens as a scored window has: some methods hold less of longer ones."""
    length = same[0]["settings"]["protocol"]["length"]
    return statistics.mean(d["bytes_per_token"] for run in same for d in run["decodings"] if d["tokens"] == length)


def values(same: Sequence[dict[str, Any]], text: int, what: str, which: str) -> list[float]:
    return [run["scores"][text][what][which] for run in same]


def mean(same: Sequence[dict[str, Any]], text: int, what: str, which: str) -> float:
    return statistics.mean(values(same, text, what, which))


def spread(same: Sequence[dict[str, Any]], text: int, what: str, which: str, factor: float) -> str:
    return f"{factor * statistics.stdev(values(same, text, what, which)):.2f}" if len(same) > 1 else "–"


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", help="another model than SmolLM2")
    options.add_argument("--method", action="append", default=[], help="a line of the table")
    options.add_argument("--tokens", type=int, default=20_000, help="scored of each text")
    options.add_argument("--length", type=int, default=512, help="tokens of a window, and of the caches compared")
    options.add_argument("--prefix", type=int, default=128, help="tokens that are read in one call, and not scored")
    options.add_argument("--call", type=int, default=32, help="scored tokens of a call")
    options.add_argument("--seeds", type=int, default=3, help="draws of calibration text")
    options.add_argument("--calibrate", nargs="+", default=[DEFAULT_TEXTS[0]], help="texts; several are mixed")
    options.add_argument("--text", nargs="+", default=list(DEFAULT_TEXTS), help="texts to score")
    options.add_argument("--windows", type=int, default=48, help="windows of text to calibrate on")
    options.add_argument("--rows", type=int, default=256, help="tokens of such a window")
    options.add_argument("--gap", type=int, nargs="*", default=[128, 512, 2048])
    options.add_argument("--filled", type=int, nargs="+", default=[512, 2048])
    options.add_argument("--out", type=Path, default=Path("compression.jsonl"))
    return options.parse_args()


if __name__ == "__main__":
    main()
