"""A span for every key head: some tokens for good, and the newest ones (MoA, DuoAttention, S2).

    o_h = softmax over j in kept(h) or i - j < α_h + β_h (i + 1)  of  q_h k_j v_j

Heads of one span stand side by side, W_q, W_k, W_v and W_o permuted alike, which changes nothing; each class of heads
is one attention over a cache of its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.convert.attention import ConvertedAttention
from ...rewriter.convert.calibrate import Calibration
from ...rewriter.convert.layers import ConversionRefused, Decoder
from ...rewriter.convert.memory import FullMemory
from ...rewriter.convert.reach import Reach
from ...rewriter.convert.read_decoder import probe_tokens
from ...rewriter.convert.recipe import Needs, part, recipe
from ...rewriter.convert.scoring import Scoring
from ...rewriter.convert.spans.allocation import window_of
from ...rewriter.convert.spans.attention import AtHand, Keys, attend_spans
from ...rewriter.convert.spans.cache import GrowingSpans, SpanLayer, leading
from ...rewriter.convert.spans.plan import SpanPlan, span_of, span_settings
from ...rewriter.convert.spans.rings import FixedSpans
from ...rewriter.convert.spans.search import search
from ...rewriter.convert.spans.span import Full, Span, Window

__all__ = ["HeadSpans", "SpanReach"]


@recipe
@dataclass(frozen=True)
class HeadSpans:
    """Let each key head see the first tokens and the newest ones only, as many as a plan says.

    `plan` is a SpanPlan or its YAML file. Without it spans are chosen on text, so that heads cache at most `density` of
    the tokens, at each of the `lengths` (without them, at that of the text's rows): where what they do not see has the
    least `measure`, influence on the loss (by gradients) or mass of attention. At most `classes` different spans stand
    in a layer; 0 sets no limit.
    """

    plan: SpanPlan | str | None = None
    density: float = 0.5
    measure: Literal["influence", "mass", "uniform"] = "influence"
    sinks: int = 4
    classes: int = 2
    lengths: tuple[int, ...] = ()

    name: ClassVar[str] = "head_spans"
    needs: ClassVar[Needs] = "gradients"
    exact: ClassVar[str] = "where every span is as long as the text"

    def convert(self, attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration) -> None:
        """Put a SpanReach into every attention. Raises ConversionRefused."""
        for attention, layer in zip(attentions, decoder.layers, strict=True):
            _refuse_other_memory(attention, layer.path)
        _refuse_future(calibration.model)
        plan = self._plan(attentions, decoder, calibration)
        if len(plan.layers) != len(decoder.layers):
            raise ConversionRefused(
                self.name, f"the plan has {len(plan.layers)} layers, the model {len(decoder.layers)}"
            )
        for n, (attention, layer, spans) in enumerate(zip(attentions, decoder.layers, plan.layers, strict=True)):
            if len(spans) != layer.groups:
                reason = f"the plan gives layer {n} {len(spans)} heads, and it has {layer.groups} key heads"
                raise ConversionRefused(layer.path, reason)
            order = [g for _, g in sorted((str(span), g) for g, span in enumerate(spans))]
            permute_heads(attention, order)
            sorted_spans = [spans[g] for g in order]
            classes = [(span, len(list(same))) for span, same in groupby(sorted_spans)]
            attention.reach = SpanReach([[span_settings(span), count] for span, count in classes], order)

    def _plan(self, attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration) -> SpanPlan:
        if self.plan is not None:
            return SpanPlan.load(self.plan) if isinstance(self.plan, str) else self.plan
        if self.measure == "uniform":
            lengths = self.lengths or (calibration.required(self.name).shape[1],)
            span = window_of(self.density, lengths, self.sinks)
            return SpanPlan(tuple((span,) * layer.groups for layer in decoder.layers))
        found = search(
            decoder,
            calibration,
            [self.density],
            measure=self.measure,
            sinks=self.sinks,
            classes=self.classes,
            lengths=self.lengths,
            attentions=attentions,
        )
        return found[0].plan


def _refuse_other_memory(attention: ConvertedAttention, path: str) -> None:
    if not isinstance(attention.memory, FullMemory):
        held = type(attention.memory).__name__
        raise ConversionRefused(path, f"it remembers a {held}, one for all heads, so that spans of heads save nothing")
    if attention.reach is not None:
        raise ConversionRefused(path, "its heads have spans already")
    if attention.gate is not None:
        raise ConversionRefused(
            path,
            "its heads are routed by their places, and spans bring them into another order",
            "Give the recipe of the spans before that of the routing.",
        )


def _refuse_future(model: nn.Module) -> None:
    """Spans look back only: a model in which a token sees later ones is refused."""
    tokens = probe_tokens(model)
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % (tokens.max() + 1)
    with torch.no_grad():
        first, second = (_logits(model(input_ids=ids, use_cache=False))[:, :-1].double() for ids in (tokens, changed))
    if float((first - second).abs().max() / first.abs().max()) > 1e-4:
        raise ConversionRefused(type(model).__name__, "its tokens see later ones; a span is about earlier ones alone")


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def permute_heads(attention: ConvertedAttention, order: Sequence[int]) -> None:
    """Bring key heads, and the queries and outputs that go with them, into another order. Changes no result."""
    memory, form = attention.memory, attention.form
    assert isinstance(memory, FullMemory)
    groups = len(order)
    gate = [] if attention.output_gate is None else [attention.output_gate.linear]
    for linear in (attention.query, memory.key, memory.value, *gate):
        linear.weight.data = _reordered(linear.weight.data, order, groups)
        if linear.bias is not None:
            linear.bias.data = _reordered(linear.bias.data, order, groups)
    for norm in (attention.query_norm, memory.key_norm, memory.value_norm):
        if norm is not None:
            norm.weight.data = _reordered(norm.weight.data, order, groups)
            if norm.bias is not None:
                norm.bias.data = _reordered(norm.bias.data, order, groups)
    if attention.sinks is not None:
        attention.sinks.score.data = _reordered(attention.sinks.score.data, order, groups)
    assert form.heads % groups == 0
    attention.output.weight.data = _reordered(attention.output.weight.data.t(), order, groups).t().contiguous()


def _reordered(x: Tensor, order: Sequence[int], groups: int) -> Tensor:
    return x.view(groups, -1, *x.shape[1:])[list(order)].flatten(0, 1)


@part
class SpanReach(Reach):
    """Classes of heads that see alike: (a span's settings, number of key heads), heads in the order of the classes.

    `order` says which head of the model each was.
    """

    def __init__(self, classes: Sequence[Sequence[Any]], order: Sequence[int]) -> None:
        super().__init__()
        self.classes: tuple[tuple[Span, int], ...] = tuple((span_of(dict(one)), int(count)) for one, count in classes)
        self.order = tuple(order)

    def settings(self) -> dict[str, object]:
        return {"classes": [[span_settings(span), count] for span, count in self.classes], "order": list(self.order)}

    def cache_layer(self, max_length: int | None) -> SpanLayer:
        return GrowingSpans(self.classes) if max_length is None else FixedSpans(self.classes, max_length)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        past: Any,
        scoring: Scoring,
        index: int,
    ) -> Tensor:
        if mask is not None and mask.shape[1] != 1:
            raise ValueError(
                f"layer {index}: its heads have spans, and a mask for each head [B, {mask.shape[1]}, S, T] "
                "besides; give one for all heads [B, 1, S, T]"
            )
        hands = self._hands(key, value, mask, past, index)
        repeats = query.shape[1] // key.shape[1]
        made, first = [], 0
        for hand, (_, count) in zip(hands, self.classes, strict=True):
            rows = slice(first * repeats, (first + count) * repeats)
            made.append(attend_spans(query[:, rows], hand, mask, scoring.of_heads(rows)))
            first += count
        return torch.cat(made, 2) if len(made) > 1 else made[0]

    def _counts(self) -> bool:
        """Whether it matters where a row begins."""
        plain = (Full(), *(Window(0, span.alpha) for span, _ in self.classes if isinstance(span, Window)))
        return any(span not in plain for span, _ in self.classes)

    def _hands(self, key: Tensor, value: Tensor, mask: Tensor | None, past: Any, index: int) -> list[AtHand]:
        layer = past.layers[index] if past is not None and index < len(getattr(past, "layers", ())) else None
        if isinstance(layer, SpanLayer):
            return layer.update(key, value, mask, self.classes)
        if past is None:
            return GrowingSpans(self.classes).update(key, value, mask, self.classes)
        return self._in_order(key, value, mask, past, index)

    def _in_order(self, key: Tensor, value: Tensor, mask: Tensor | None, past: Any, index: int) -> list[AtHand]:
        """With a cache that knows nothing of spans and holds every token of every head: right, but nothing is saved."""
        tokens = key.shape[2]
        before, first = past.get_seq_length(index), past.get_mask_sizes(tokens, index)[1]
        before = before.clone() if isinstance(before, Tensor) else before  # fixed caches count in place
        every_key, every_value = past.update(key, value, index)
        if isinstance(before, int) and before == 0:
            return GrowingSpans(self.classes).update(key, value, mask, self.classes)
        start = torch.zeros(key.shape[0], dtype=torch.long, device=key.device)
        if key.shape[0] > 1 and mask is not None:
            if getattr(past, "is_sliding", [False] * (index + 1))[index] and self._counts():
                raise ValueError(
                    f"layer {index}: a {type(past).__name__} with a window of its own does not know where the rows of "
                    "a batch begin, which are kept for good; pass past_key_values=latent.LatentCache(model)"
                )
            start = leading(mask)
        positions = first + torch.arange(every_key.shape[2], device=key.device) - start[:, None]
        queries = before + torch.arange(tokens, device=key.device) - start[:, None]
        hands, head = [], 0
        for span, count in self.classes:
            held = Keys(every_key[:, head : head + count], every_value[:, head : head + count], positions, None)
            hands.append(AtHand(span, queries, start - first, held, None, every_key.shape[2]))
            head += count
        return hands
