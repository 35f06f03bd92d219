"""`python tests/benchmarks/routed_training.py`: what routed heads cost when they are trained, and what they save.

A small Llama learns the bytes of Python's help topics and of its standard library. Then it goes on twice over the same
batches: as it is, and with routed heads, whose routers guess at first, and 0.001 times the balance loss; with --distill
a part of its loss is how far it is from what it was before. The losses are those of topics that were never trained on.
Decoding is timed on a wider model with random weights and routers, where weights and cache are large enough to matter:
one token against a full cache.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import latent
import torch
from latent import balance_loss, convert
from latent.passes.recipes.routed_heads import HeadRouter, RoutedHeads, UntrainedRouter
from latent.rewriter.command.console import table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH = 128, 8


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=4000, help="of the dense model, before")
    options.add_argument("--more", type=int, default=600, help="steps of either, after")
    options.add_argument("--distill", type=float, default=0.5, help="share of the loss that is KL to the dense model")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--share", type=float, default=0.75)
    options.add_argument("--shared", type=int)
    options.add_argument(
        "--layers", choices=("even", "text"), default="text", help="as many heads in each, or as it needs"
    )
    options.add_argument("--cached", type=int, nargs="+", default=[1024, 4096])
    options.add_argument("--compile", action="store_true", help='decode with torch.compile(backend="latent")')
    options.add_argument("--only", choices=("training", "decoding"))
    options.add_argument("--threads", type=int)
    given = options.parse_args()
    warnings.simplefilter("ignore", UntrainedRouter)
    if given.threads:
        torch.set_num_threads(given.threads)
    recipe = RoutedHeads(share=given.share, shared=given.shared, ranking="text", layers=given.layers)
    if given.only != "decoding":
        training(recipe, given.steps, given.more, given.distill, given.seeds)
    if given.only != "training":
        decoding(given.share, given.cached, given.compile)


# ** training **


def training(recipe: RoutedHeads, steps: int, more: int, distill: float, seeds: list[int]) -> None:
    learnt, unseen = texts()
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
    )
    print(
        f"training: {config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads"
    )
    print(f"  {steps} steps, then {more} more; {unseen.numel() // LENGTH * (LENGTH - 1)} scored bytes; nats for a byte")
    rows = [("seed", "dense", "routed, untrained", f"dense, {more} more", f"routed, {more} more", "routed / dense")]
    for seed in seeds:
        torch.manual_seed(seed)
        dense = LlamaForCausalLM(config)
        train(dense, learnt, steps, 3e-3, seed)
        sample = learnt[: 256 * LENGTH].view(256, LENGTH)
        routed = convert(dense.eval(), recipe, calibrate=sample)
        before = loss_of(dense, unseen), loss_of(routed, unseen)
        train(routed, learnt, more, 1e-3, seed + 1000, copy.deepcopy(dense), distill)
        train(dense, learnt, more, 1e-3, seed + 1000)
        after = loss_of(dense, unseen), loss_of(routed, unseen)
        ratios = f"{after[1] / before[0] - 1:+.1%} before, {after[1] / after[0] - 1:+.1%} after"
        rows.append((str(seed), *(f"{loss:.4f}" for loss in (*before, *after)), ratios))
        print(f"  seed {seed} is done", file=sys.stderr, flush=True)
    table(rows)


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to learn from, and those of every tenth topic to be scored on. Settings were chosen on another tenth."""
    names = sorted(topics)
    parts = {n: "\n".join(topics[name] for name in names[n::10]) for n in range(10)}
    learnt = "\n".join(text for n, text in parts.items() if n not in (0, 5)).encode()
    code = b"".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    unseen = torch.tensor(list(parts[5].encode()))
    return torch.tensor(list(learnt + code)), unseen[: 128 * LENGTH]


def train(
    model: nn.Module,
    text: Tensor,
    steps: int,
    rate: float,
    seed: int,
    teacher: nn.Module | None = None,
    distill: float = 0.0,
) -> None:
    """Next bytes; where there is a teacher, `distill` of the loss is KL(teacher || model)."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    routed = any(isinstance(module, HeadRouter) for module in model.modules())
    model.train()
    for ids in batches(text, steps, generator):
        made = model(input_ids=ids, labels=ids)
        loss = made.loss
        if teacher is not None and distill:
            with torch.no_grad():
                wanted = teacher(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)
            found = made.logits.log_softmax(-1).flatten(0, 1)
            kl = nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
            loss = (1 - distill) * loss + distill * kl
        if routed:
            loss = loss + 0.001 * balance_loss(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.eval()


def batches(text: Tensor, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


@torch.no_grad()
def loss_of(model: nn.Module, text: Tensor) -> float:
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    return statistics.fmean(model(input_ids=part, labels=part).loss.item() for part in rows.split(32))


# ** decoding **


def decoding(share: float, lengths: list[int], compiled: bool) -> None:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        max_position_embeddings=max(lengths) + 128,
    )
    torch.manual_seed(0)
    original = LlamaForCausalLM(config).eval()
    models = {"dense": convert(original, [])}
    for one in dict.fromkeys((share, 0.5)):
        made = models[f"{one:.0%} of the heads"] = convert(original, RoutedHeads(share=one))
        for module in made.modules():
            if isinstance(module, HeadRouter):
                nn.init.normal_(module.scores.weight)
    how = 'torch.compile(backend="latent")' if compiled else "eager"
    print(f"\ndecoding: {config.num_hidden_layers} layers, width 1024, 16 heads, MLP 2816; float32, {how}, ", end="")
    print(f"{torch.get_num_threads()} threads")
    rows = [("cached tokens", *models, "")]
    for length in lengths:
        steps = {name: prepared(model, length, compiled) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(40):  # in turns: whatever else the machine does meets all of them
            for name, step in steps.items():
                start = time.perf_counter()
                next(step)
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(found[8:]) * 1e3 for name, found in times.items()}
        gains = ", ".join(f"{medians['dense'] / took:.2f} x" for name, took in medians.items() if name != "dense")
        rows.append((str(length), *(f"{took:.2f} ms" for took in medians.values()), gains))
    table(rows)


def prepared(model: nn.Module, length: int, compiled: bool) -> Iterator[Tensor]:
    """Decodes a token each time it is asked, after `length` random ones."""
    config = model.config
    cache = latent.LatentCache(model, max_length=length + 64)
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        cache.keep(torch.randn(shape), torch.randn(shape), None, None, layer)
    run = torch.compile(copy.copy(model), backend="latent") if compiled else model
    while True:
        with torch.no_grad():
            yield run(input_ids=torch.randint(0, 256, (1, 1)), past_key_values=cache).logits


if __name__ == "__main__":
    main()
