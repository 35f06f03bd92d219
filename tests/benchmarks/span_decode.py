"""`python tests/benchmarks/span_decode.py [attention|model]`: one token, heads that see a quarter of what is cached.

SmolLM2's shapes, 9 heads of 64 with 3 key heads, in float32 and random weights. `attention`: what is between the
projections, the write into the cache included, in several layers so that none finds its keys in a processor's cache.
`model`: the step of a whole model. Everything is compiled with backend="latent", and all take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import latent
import torch
from latent.passes.recipes.head_spans import HeadSpans, SpanReach
from latent.rewriter.command.timing import Call, Times, first_call, take_turns
from latent.rewriter.convert.attention import attend
from latent.rewriter.convert.cache import FixedLayer
from latent.rewriter.convert.scoring import Scoring
from latent.rewriter.convert.spans.plan import SpanPlan
from latent.rewriter.convert.spans.span import Full, Span, Window
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

HEADS, GROUPS, WIDTH = 9, 3, 64


def plans(length: int) -> dict[str, tuple[Span, ...]]:
    """Spans of a layer's key heads, a quarter of the length on average but for the first."""
    few = length // 16
    return {
        "dense": (Full(),) * GROUPS,
        "one window": (Window(4, length // 4 - 4),) * GROUPS,
        "two classes": (Window(4, few - 4), Window(4, few - 4), Window(4, 3 * length // 4 - 2 * few - 4)),
    }


def attention_alone(spans: tuple[Span, ...], length: int, layers: int) -> tuple[Call, Any]:
    """One token through the attention of some layers, each with a full cache."""
    classes = [[{"kind": span.kind, **vars(span)}, spans.count(span)] for span in dict.fromkeys(spans)]
    reach = SpanReach(classes, range(GROUPS))
    dense = all(isinstance(span, Full) for span in spans)
    held = [FixedLayer(length) if dense else reach.cache_layer(length) for _ in range(layers)]  # type: ignore[no-untyped-call]
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    scoring = Scoring(0.125, None, None)
    query = torch.randn(layers, 1, HEADS, 1, WIDTH)
    key, value = torch.randn(2, layers, 1, GROUPS, 1, WIDTH)

    def step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        made = []
        for n, layer in enumerate(held):
            if dense:
                made.append(attend(query[n], *layer.update(key[n], value[n]), mask, scoring))
            else:
                made.append(reach(query[n], key[n], value[n], mask, _Layers(held), scoring, n))
        return torch.stack(made)

    for layer in () if dense else held:
        layer.join(held)
    step(query, key, value, mask)
    return _filled(
        torch.compile(step, backend="latent", dynamic=False, fullgraph=True),
        (query, key, value, mask),
        {},
        held,
        length,
    ), held


class _Layers:
    """A cache of these layers."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers


def whole_model(spans: tuple[Span, ...], length: int, layers: int) -> tuple[Call, Any]:
    """A decode step."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 49152}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, max_position_embeddings=length)).eval()
    model = latent.convert(model, HeadSpans(plan=SpanPlan((spans,) * layers)), inplace=True)
    cache = latent.LatentCache(model, length)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), past_key_values=cache)
    given = {"input_ids": torch.ones(1, 1, dtype=torch.long), "past_key_values": cache}
    compiled = torch.compile(model, backend="latent", dynamic=False, fullgraph=True)
    return _filled(compiled, (), given, cache.layers, length), cache.layers


def _filled(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], held: Any, length: int) -> Call:
    """The call with caches that hold all but one token of `length`."""

    def prepare() -> None:
        for layer in held:
            layer.cumulative_length.fill_(length - 1)

    return Call(lambda: run(*args, **kwargs), prepare)


def table(title: str, times: dict[str, Times], rows: dict[str, float], layers: int) -> str:
    dense = times["dense"].median
    lines = [title]
    for name, taken in times.items():
        per = f"{1e3 * taken.median / layers:8.3f} ms a layer" if layers else f"{1e3 * taken.median:8.1f} ms a token"
        lines.append(f"  {name:12}{100 * rows[name]:5.0f} % of the keys {per}   × {dense / taken.median:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=["attention", "model"])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=30, help="of the model; attention alone has eight at most")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    wanted = plans(given.length)
    rows = {name: SpanPlan((spans,)).density(given.length) for name, spans in wanted.items()}
    with torch.no_grad():
        for which in given.which:
            alone = which == "attention"
            layers = min(8, given.layers) if alone else given.layers
            calls: dict[str, Call] = {}
            for name, spans in wanted.items():
                make = attention_alone if alone else whole_model
                calls[name], _ = make(spans, given.length, layers)
                _, seconds = first_call(calls[name])
                print(f"{which}, {name}: compiled in {seconds:.0f} s", flush=True)
            taken = take_turns(calls, given.rounds)
            title = f"{which}, {layers} layers, {given.length} tokens, {given.threads} threads"
            print(table(title, taken, rows, layers if alone else 0), flush=True)


if __name__ == "__main__":
    main()
