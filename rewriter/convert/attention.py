"""The module that stands where an attention stood: the same call, the same result where nothing was changed.

    q = turn(W_q x)     k, v = memory(x)     o = softmax(scale · q k + mask) v     out = W_o (o · gate(x))

Plain PyTorch throughout: what the compiler makes fast, it finds here as in any other model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factored import Factored, attend_to_factors, formed
from .layers import Affine, AttentionLayer, CallForm, ConversionRefused, Rotary
from .memory import FullMemory, Memory, heads_of
from .norms import HeadNorm, turned_and_normed
from .output_gate import OutputGate
from .own_angles import OwnAngles
from .positions import positions_in
from .query_scale import QueryScale
from .reach import Reach
from .rotation import Turns, turns_of
from .scoring import Scoring, Sinks

__all__ = ["AttentionForm", "ConvertedAttention", "Given", "HeadGate", "attend"]

CACHES = ("past_key_values", "layer_past", "past_key_value")
"""The parameters under which transformers' models hand a cache to their attention."""


@dataclass(frozen=True)
class AttentionForm:
    """What an attention computes besides its weights. `rotary` is the queries', `turns` tells whose angles it takes."""

    hidden: int
    heads: int
    query_width: int
    value_width: int
    scale: float
    cap: float | None
    bias: tuple[bool, bool]
    """Of the query's projection, and of the output's."""

    rotary: Rotary | None
    call: CallForm
    turns: int = 0

    @classmethod
    def of(cls, layer: AttentionLayer) -> AttentionForm:
        return cls(
            layer.output.weight.shape[0],
            layer.heads,
            layer.key_width,
            layer.value_width,
            layer.scale,
            layer.cap,
            (layer.query.bias is not None, layer.output.bias is not None),
            layer.rotary,
            layer.call,
            layer.turns,
        )


@dataclass(frozen=True)
class Given:
    """What a model hands to an attention in one call."""

    hidden: Tensor
    """[B, S, C]"""
    turns: Turns | None
    """Angles of its tokens."""
    mask: Tensor | None
    past: Any
    """The cache, if there is one."""
    scale: Tensor | None = None
    """What the queries of its tokens are multiplied by, [B or 1, 1, S, 1]."""


class ConvertedAttention(nn.Module):
    """Attention with a memory of its own; called as the module it replaces."""

    def __init__(self, form: AttentionForm, memory: Memory, query_norm: HeadNorm | None = None) -> None:
        super().__init__()
        self.form = form
        self.query = nn.Linear(form.hidden, form.heads * form.query_width, form.bias[0])
        self.output = nn.Linear(form.heads * form.value_width, form.hidden, form.bias[1])
        self.query_norm = query_norm
        self.own_angles: OwnAngles | None = None
        self.query_scale: QueryScale | None = None
        self.sinks: Sinks | None = None
        self.output_gate: OutputGate | None = None
        self.memory = memory
        self.gate: HeadGate | None = None
        self.reach: Reach | None = None
        self.stands_for: str | None = None

    @classmethod
    def of(cls, layer: AttentionLayer, memory: Memory | None = None) -> ConvertedAttention:
        """The layer as it is, or with another memory."""
        with torch.device("meta"):
            made = cls(AttentionForm.of(layer), memory or FullMemory.of(layer), HeadNorm.of(layer.query_norm))
        made.query = layer.query.linear()
        made.replace_output(layer.output)
        made.own_angles, made.query_scale = OwnAngles.of(layer.own_angles), QueryScale.of(layer.query_scale)
        made.sinks, made.output_gate = Sinks.of(layer.sinks), OutputGate.of(layer.gate)
        return made

    def stand_for(self, weight: str) -> None:
        """Keep the name of a weight of the attention that was here, with nothing in it: "q_proj.weight".

        A saved conversion that is loaded into the original architecture then fails for its size, where a library would
        else warn of weights that it leaves random.
        """
        self.stands_for = weight
        *path, name = weight.split(".")
        owner: nn.Module = self
        for part in path:
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(name, torch.empty(0))

    def replace_memory(self, memory: Memory, recipe: str) -> None:
        """Raises ConversionRefused where another recipe was here before."""
        if not isinstance(self.memory, FullMemory):
            held = type(self.memory).__name__
            raise self._refused(recipe, f"an earlier recipe put in a {held}; an attention has one memory")
        if self.memory.key_norm is not None and not memory.after_norm:
            raise self._refused(
                recipe,
                "a norm stands between the projection of the keys and the scores; low rank does not commute with it",
            )
        if self.memory.value_norm is not None:
            raise self._refused(recipe, "a norm stands between the projection of the values and the attention")
        if self.memory.key_norm is not None and self.memory.key_norm.after_rope:
            raise self._refused(recipe, "a norm of the keys follows their rotation")
        if self.reach is not None:
            raise self._refused(recipe, "an earlier recipe gave its heads spans, which need a cache for each head")
        self.memory = memory

    def _refused(self, recipe: str, reason: str) -> ConversionRefused:
        return ConversionRefused(f"{recipe}, layer {self.form.call.index}", reason)

    def replace_query(self, query: Affine, rotary: Rotary | None, recipe: str) -> None:
        """Queries [H, d, C] of any width, and which of their columns are turned; the scale stays.

        Raises ConversionRefused where the queries have a norm.
        """
        if self.query_norm is not None:
            raise self._refused(recipe, "a norm stands between the projection of the queries and the scores")
        self.query = query.linear()
        bias = (query.bias is not None, self.form.bias[1])
        self.form = replace(self.form, query_width=query.weight.shape[1], rotary=rotary, bias=bias)

    def replace_output(self, output: Affine) -> None:
        """What reads the heads, [C, H, e]; e is the width of the values that the memory gives.

        Raises ConversionRefused where other columns would meet a gate for each of them.
        """
        if self.output_gate is not None and self.output_gate.width != 1:
            raise self._refused("its output", "a gate for every column stands between the heads and their projection")
        self.output = Affine(output.weight.flatten(1), output.bias).linear()
        bias = (self.form.bias[0], output.bias is not None)
        self.form = replace(self.form, value_width=output.weight.shape[2], bias=bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self.given(*args, **kwargs)
        output = self.output(self.attention(given)) if self.gate is None else self.gate(self, given)
        returns = self.form.call.returns
        return (output, *(None,) * (returns - 1)) if returns else output

    def given(self, *args: Any, **kwargs: Any) -> Given:
        """What is in the arguments of a call of the module."""
        named = dict(zip(self.form.call.parameters, args, strict=False)) | kwargs
        hidden = named[self.form.call.parameters[0]]
        past = next((named[name] for name in CACHES if named.get(name) is not None), None)
        rotary, angles, scale = self.form.rotary, named.get("position_embeddings"), None
        if self.own_angles is not None or self.query_scale is not None:
            handed = named["position_ids"] if self.form.call.positions else None
            positions = positions_in(hidden, handed, past, self.form.call.index)
            angles = angles if self.own_angles is None else self.own_angles(positions)
            scale = None if self.query_scale is None else self.query_scale(positions)
        turns = None if rotary is None else turns_of(angles, rotary)
        return Given(hidden, turns, named.get("attention_mask"), past, scale)

    def attention(self, given: Given) -> Tensor:
        """What the heads give, side by side: [B, S, H·e]."""
        query, scoring, mask = self.queries(given), self.scoring, given.mask
        if self.reach is not None:
            new = self.memory.new(given.hidden, given.turns)
            out: Tensor = self.reach(query, *new, mask, given.past, scoring, self.form.call.index)
        else:
            out = attend(query, *self.remember(given), mask, scoring)
        return out.flatten(2) if self.output_gate is None else self.output_gate(out, given.hidden).flatten(2)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.form.scale, self.form.cap, None if self.sinks is None else self.sinks.score)

    def queries(self, given: Given, projected: Tensor | None = None) -> Tensor:
        """[B, H, S, d], at their positions; from their projection [B, S, H·d] where it is there already."""
        query = heads_of(self.query(given.hidden) if projected is None else projected, self.form.heads)
        query = turned_and_normed(query, given.turns, self.form.rotary, self.query_norm)
        return query if given.scale is None else (query * given.scale).to(query.dtype)

    def remember(self, given: Given) -> tuple[Tensor | Factored, Tensor | Factored]:
        """Keys and values of earlier calls and of this one, factored where the cache keeps factors.

        Caches that know nothing of memories get keys and values as of any other model where the memory would need the
        angles of earlier calls.
        """
        turns, past = given.turns, given.past
        first, second = self.memory.new(given.hidden, turns)
        index = self.form.call.index
        if past is None:
            return self.memory.read(first, second, turns)
        if hasattr(past, "keep"):
            first, second, turns = past.keep(first, second, turns, given.mask, index)
            return self.memory.read(first, second, turns)
        if self.memory.turns_late:
            return past.update(*self.memory.read(first, second, turns), index)  # type: ignore[no-any-return]
        first, second = past.update(first, second, index)
        return self.memory.read(first, second, turns)


class HeadGate(nn.Module):
    """Base: weighs what the heads give before they are joined, and may leave out those of weight 0."""

    def forward(self, attention: ConvertedAttention, given: Given) -> Tensor:
        """Σ_h g_h W_o,h o_h + b_o, [B, S, C]; keys and values of all heads go into the cache."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """The arguments that build it again, without its weights; plain JSON."""
        raise NotImplementedError

    def placed(self, attention: ConvertedAttention) -> None:
        """Called when it stands in an attention whose weights are there, so that it may order them in memory."""


def attend(
    query_BHSd: Tensor,
    key_BGTd: Tensor | Factored,
    value_BGTe: Tensor | Factored,
    mask: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    """Attention of H heads to G, [B, S, H, e]. Without a mask queries see the keys up to their own.

    `mask` [B, 1 or H, S, T]: true where a key is seen, or numbers that are added.
    """
    if isinstance(key_BGTd, Factored) and isinstance(value_BGTe, Factored) and query_BHSd.shape[2] == 1:
        return attend_to_factors(query_BHSd, key_BGTd, value_BGTe, mask, scoring)
    key_BGTd, value_BGTe = formed(key_BGTd), formed(value_BGTe)
    batch, heads, queries, _ = query_BHSd.shape
    groups = key_BGTd.shape[1]
    if mask is not None and mask.shape[-1] != key_BGTd.shape[-2]:
        mask = mask[..., : key_BGTd.shape[-2]]
    if scoring.cap is not None or scoring.sinks is not None:
        return _spelled_out(query_BHSd, key_BGTd, value_BGTe, mask, scoring).transpose(1, 2)
    one = queries == 1 and (mask is None or mask.shape[1] == 1)
    if one and not torch.compiler.is_compiling():  # heads of a group are rows that read the same keys
        rows = query_BHSd.view(batch, groups, heads // groups, -1)
        out = F.scaled_dot_product_attention(rows, key_BGTd, value_BGTe, mask, scale=scoring.scale)
        return out.reshape(batch, 1, heads, -1)
    causal, grouped = mask is None, False
    if queries == 1:  # no expressions of the sizes, which would be symbols where those are dynamic
        causal = False
    if heads != groups:
        grouped = True
    out = F.scaled_dot_product_attention(
        query_BHSd, key_BGTd, value_BGTe, mask, is_causal=causal, scale=scoring.scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _spelled_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """What scaled_dot_product_attention does not have: soft caps and sinks."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    products = query @ key.transpose(-1, -2)
    if mask is None:
        mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).tril()
    return scoring.weights(products, mask) @ value
