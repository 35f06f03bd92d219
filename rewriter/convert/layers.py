"""An attention layer as weights, whatever code computes it.

    q_h = W_q,h x + b_q,h      k_g = W_k,g x + b_k,g      v_g = W_v,g x + b_v,g      out = Σ_h W_o,h o_h + b_o

with q and k turned by the angles of their positions, and the scores scaled and perhaps capped. Where a model has them:
norms of q, k and v, a score without a value for each head (`sinks`), and a gate on o_h. Shapes: C hidden, H
query heads, G key heads (H a multiple of G, the heads of a group side by side), d key width, e value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "Affine",
    "AngleFacts",
    "AttentionLayer",
    "CallForm",
    "ConversionRefused",
    "Decoder",
    "GateFacts",
    "HeadNormFacts",
    "QueryScaleFacts",
    "Rotary",
]


class ConversionRefused(ValueError):
    """A model or a layer that a recipe cannot change: where, why, and what to do about it."""

    def __init__(self, where: str, reason: str, todo: str = "") -> None:
        super().__init__(f"{where}: {reason}." + (f" {todo}" if todo else ""))
        self.where, self.reason = where, reason


@dataclass(frozen=True)
class Affine:
    """weight · x + bias; the weight's last dimension is that of x, the bias has the others (None: no bias)."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def flat(self) -> Tensor:
        """[outputs, inputs]."""
        return self.weight.flatten(0, -2)

    def linear(self) -> nn.Linear:
        """As a module; the weights are copied, row by row, as they will be when they are loaded."""
        outputs, inputs = self.flat.shape
        made = nn.Linear(inputs, outputs, self.bias is not None, device="meta").to(self.weight.dtype)
        weight = self.flat.detach().clone(memory_format=torch.contiguous_format)
        made.weight = nn.Parameter(weight, requires_grad=self.weight.dtype.is_floating_point)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().flatten().clone())
        return made


@dataclass(frozen=True)
class Rotary:
    """Columns `first` to `first + width` are turned in pairs (RoPE).

    half: the pairs are [i, i + width/2]; interleaved: [2i, 2i + 1]. `given` says how the model hands the angles of the
    width/2 pairs to its attention: each "once", in two "halves" or in "pairs". Pair i turns with angle
    `frequencies[i]` of them; empty: with its own. Where it is `backwards` the angles are negative.
    """

    form: Literal["half", "interleaved"]
    width: int
    first: int = 0
    given: Literal["once", "halves", "pairs"] = "halves"
    frequencies: tuple[int, ...] = ()
    backwards: bool = False


@dataclass(frozen=True)
class HeadNormFacts:
    """A norm after a projection: its weight and bias [heads, width], over each head or all of them together."""

    kind: Literal["rms", "layer"]
    weight: Tensor
    together: bool
    eps: float
    after_rope: bool = False
    bias: Tensor | None = None


@dataclass(frozen=True)
class GateFacts:
    """What the heads give is multiplied by function(W x + b): weight [H, e, C], or [H, 1, C] for one number a head."""

    made: Affine
    function: str


@dataclass(frozen=True)
class AngleFacts:
    """The angles of position p are p · frequencies; cosines and sines are multiplied by `factor`."""

    frequencies: tuple[float, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class QueryScaleFacts:
    """Queries are multiplied by a number for each position: by factors[n] from position starts[n] on."""

    starts: tuple[int, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True)
class CallForm:
    """How the model calls its attention: the names of the parameters in order, and what is given back."""

    parameters: tuple[str, ...]
    returns: int
    """Length of the tuple that is returned, whose first entry is the output; 0: the output alone."""

    index: int
    """Which layer of a cache it is."""

    positions: bool = False
    """Whether it is handed the positions of its tokens; else they are counted from the tokens in the cache."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention of a decoder.

    query [H, d, C], key [G, d, C], value [G, e, C], output [C, H, e]. `turns` tells apart layers whose angles differ.
    """

    path: str
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    rotary: Rotary | None
    scale: float
    cap: float | None
    call: CallForm
    turns: int = 0
    query_norm: HeadNormFacts | None = None
    key_norm: HeadNormFacts | None = None
    value_norm: HeadNormFacts | None = None
    sinks: Tensor | None = None
    gate: GateFacts | None = None
    query_scale: QueryScaleFacts | None = None
    own_angles: AngleFacts | None = None

    @property
    def heads(self) -> int:
        return self.query.weight.shape[0]

    @property
    def groups(self) -> int:
        return self.key.weight.shape[0]

    @property
    def key_width(self) -> int:
        return self.key.weight.shape[1]

    @property
    def value_width(self) -> int:
        return self.value.weight.shape[1]

    @property
    def cached(self) -> int:
        """Numbers that are cached for a token: G(d + e)."""
        return self.groups * (self.key_width + self.value_width)


@dataclass(frozen=True)
class Decoder:
    """A model and its attention layers, in the order of a cache."""

    model: nn.Module
    layers: tuple[AttentionLayer, ...]

    @property
    def cached(self) -> int:
        """Numbers that are cached for a token, over all layers."""
        return sum(layer.cached for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].key.weight.dtype
