"""What recognition returns: attention sites, and softmaxes that are not attention, as plain values.

Nothing here edits a graph. A site holds nodes of the graph it was found in, each with the layout (see `axes`) that says
what its dimensions mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from .axes import Axis, AxisSpace, Dim, Layout, Size
from .masks.terms import MaskProof


@dataclass(frozen=True)
class Operand:
    """A tensor with the meaning of its dimensions, and where it came from through layout operations alone.

    `chain` starts at the tensor itself and goes up against the data: every entry holds the same elements in another
    layout. Axes of the first entry that the last one lacks are repetitions (`expand`, `repeat_kv`).
    """

    chain: tuple[tuple[fx.Node, Layout], ...]

    @property
    def node(self) -> fx.Node:
        return self.chain[0][0]

    @property
    def layout(self) -> Layout:
        return self.chain[0][1]

    @property
    def root(self) -> fx.Node:
        return self.chain[-1][0]


# ------------------------------------------------------------------ steps from q·k to the softmax


@dataclass(frozen=True)
class ScoreStep:
    """One operation between the score product and the softmax."""

    node: fx.Node


@dataclass(frozen=True)
class Scale(ScoreStep):
    """scores * factor; with `by`, scores * by or scores / by for a tensor that is not a known number."""

    factor: float = 1.0
    by: fx.Node | None = None
    divide: bool = False
    layout: Layout = ()


@dataclass(frozen=True)
class Tanh(ScoreStep):
    """tanh(scores): the inside of a soft cap."""


@dataclass(frozen=True)
class Bias(ScoreStep):
    """scores + factor * bias; `bias` may be a number, which softmax ignores."""

    bias: fx.Node | float = 0.0
    factor: float = 1.0
    layout: Layout = ()


@dataclass(frozen=True)
class Fill(ScoreStep):
    """scores where the key is visible, `value` elsewhere; `keep` says whether `condition` marks the visible ones."""

    condition: fx.Node
    keep: bool
    value: float
    layout: Layout = ()


@dataclass(frozen=True)
class Blend(ScoreStep):
    """scores * m + c (1 - m): a mask of numbers that need not be zeros and ones."""

    mask: fx.Node
    layout: Layout = ()


@dataclass(frozen=True)
class Sink(ScoreStep):
    """cat([scores, sink]), pad(scores): scores without a value that take part in the softmax.

    `dim`, `first` and `count` say where they are joined; they stay None where no tensor is joined (off by one).
    """

    sink: fx.Node | float
    dim: int | None = None
    first: bool = False
    count: Size = 1
    layout: Layout = ()


@dataclass(frozen=True)
class Cast(ScoreStep):
    """The scores change their dtype."""

    dtype: torch.dtype


# ------------------------------------------------------------------ steps from the weights to the value product


@dataclass(frozen=True)
class Gate:
    """Weights times a tensor. Without the key axis it commutes with the value product."""

    node: fx.Node
    by: fx.Node
    layout: Layout = ()


@dataclass(frozen=True)
class Dropout:
    node: fx.Node
    p: float


@dataclass(frozen=True)
class Changed:
    """Weights changed in a way that plain attention does not express."""

    node: fx.Node
    reason: str


@dataclass(frozen=True)
class Rehidden:
    """Weights set to `value` where `condition` (its opposite, without `hide`) holds: usually the mask once more."""

    node: fx.Node
    condition: fx.Node
    hide: bool
    value: float | None


@dataclass(frozen=True)
class Inexact:
    """The weights are a softmax only nearly."""

    node: fx.Node
    reason: str


@dataclass(frozen=True)
class NanToZero:
    """nan_to_num, or weights set to 0 where a mask hides everything."""

    node: fx.Node


WeightStep = Gate | Dropout | Changed | Rehidden | Inexact | NanToZero | Cast


# ------------------------------------------------------------------ the site


@dataclass(frozen=True)
class SoftmaxSpelling:
    """A softmax, however written: `weights` = exp(scores) / sum over `dim`.

    With `divided_later` the weights are the exponents and the value product is divided by `divided_later` afterwards.
    """

    anchor: fx.Node
    scores: fx.Node
    dim: int
    weights: fx.Node
    dtype: torch.dtype | None = None
    divided_later: fx.Node | None = None
    total: fx.Node | None = None
    """The row sums that `divided_later` was made from."""

    sink: float | None = None
    """The score of one more term in the denominator that has no value."""

    base: float = 1.0
    """Powers of two are exponentials of the scores times log 2."""

    inexact: str | None = None
    """Why the weights are not exactly a softmax (a small number keeps the denominator from zero)."""


@dataclass(frozen=True)
class AttentionCall:
    """A node that is attention by contract: sdpa, flex_attention, latent::attention.

    Labels as in `contractions`: one per dimension of query, key, value and output; "t" is the key axis.
    """

    anchor: fx.Node
    name: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float | fx.Node | None
    causal: bool = False
    mask: fx.Node | None = None
    dropout: float = 0.0
    grouped: bool = False
    sinks: fx.Node | None = None
    cap: float = 0.0
    window: int = 0
    opaque: str | None = None
    """What else the call does that is not expressed here (a score_mod)."""


@dataclass(frozen=True)
class ScoreTerm:
    """factor * q·k; the scores are the sum of one or more."""

    query: Operand
    key: Operand
    factor: float = 1.0


@dataclass(frozen=True)
class SiteAxes:
    """The role of every axis: rows are read by the query alone, shared ones index keys or values too."""

    batch: Dim
    heads: Dim
    groups: Dim
    queries: Dim
    keys: Dim
    value_width: Dim

    def roles(self) -> dict[Axis, str]:
        """A letter for every axis: b h g i j e."""
        named = zip(
            "bhgije",
            (self.batch, self.heads, self.groups, self.queries, self.keys, self.value_width),
            strict=True,
        )
        return {
            axis: letter if len(dim) == 1 else f"{letter}{n}" for letter, dim in named for n, axis in enumerate(dim)
        }


@dataclass(frozen=True)
class AttentionSite:
    """softmax_j( score steps of sum_n q_n·k_n ) · v, found at `anchor` and ending at `output`."""

    anchor: fx.Node
    output: fx.Node
    output_layout: Layout
    spelling: str
    terms: tuple[ScoreTerm, ...]
    value: Operand
    steps: tuple[ScoreStep, ...]
    weight_steps: tuple[WeightStep, ...]
    weights: fx.Node | None
    weight_readers: tuple[fx.Node, ...]
    axes: SiteAxes
    region: tuple[fx.Node, ...]
    """The nodes from the score products to the output, in graph order."""
    space: AxisSpace = field(compare=False, repr=False)
    call: AttentionCall | None = None
    masks: tuple[MaskProof, ...] = ()
    """What the tensors that mask or bias the scores were proven to do, in the order of the steps."""

    @property
    def query(self) -> Operand:
        return self.terms[0].query

    @property
    def key(self) -> Operand:
        return self.terms[0].key


@dataclass(frozen=True)
class Miss:
    """A softmax that is no attention site, with the reason in words and the node it is about.

    `reached` grades how far it got: 0 nothing, 1 a score product, 2 a value product too. Those above 0 are near misses.
    """

    anchor: fx.Node
    reason: str
    node: fx.Node
    reached: Literal[0, 1, 2] = 0


@dataclass(frozen=True)
class Recognition:
    """Every softmax of a graph is in exactly one of the two; misses also hold products that no softmax lies between."""

    sites: tuple[AttentionSite, ...]
    misses: tuple[Miss, ...]

    @property
    def near_misses(self) -> tuple[Miss, ...]:
        return tuple(sorted((m for m in self.misses if m.reached), key=lambda m: -m.reached))

    def __iter__(self) -> Iterator[AttentionSite]:
        return iter(self.sites)
