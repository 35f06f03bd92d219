"""One token through a few heads of an attention: the weights, keys and values of the others are not read.

    q_h = W_q,h x    o_h = softmax(scale · q_h k_g + mask) v_g    out = Σ_h W_o,h o_h    over the heads h in `heads`

`heads` [n] are sorted. Heads side by side are one product with a slice of a weight, heads of a group one product with
its keys: nothing is copied, as indexing would. Which heads they are must be known on the host: a device waits for it.
A generated kernel needs no host: it is told which heads are used, and skips the keys of groups without one. The
operators have no gradients.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor, fx

from ..rewriter.autocast import in_own_dtypes
from ..rewriter.convert.attention import attend
from ..rewriter.convert.scoring import Scoring
from ..rewriter.nodes import args_of, argument
from ..rewriter.registry import LibraryCall, lowering
from .generated import DTYPES, unavailable

__all__ = ["attend_used", "columns_of_heads", "rows_of_heads"]

torch.library.define(
    "latent::rows_of_heads", "(Tensor x, Tensor weight, Tensor? bias, Tensor heads, int width) -> Tensor"
)
torch.library.define(
    "latent::attend_used",
    "(Tensor query, Tensor used, Tensor key, Tensor value, Tensor? mask, float scale, float? cap, "
    "Tensor? sinks=None, bool generated=False) -> Tensor",
)
torch.library.define(
    "latent::columns_of_heads", "(Tensor x, Tensor weight, Tensor? bias, Tensor heads, int width) -> Tensor"
)


def rows_of_heads(x_C: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, width: int) -> Tensor:
    """W_h x + b_h of the heads: weight [H·width, C] -> [n, width]."""
    made, wide = [], x_C.to(weight.dtype)
    for first, end in _runs(heads.tolist()):
        rows = slice(first * width, end * width)
        part = torch.mv(weight[rows], wide)
        made.append(part if bias is None else part + bias[rows])
    return torch.cat(made).view(-1, width).to(x_C.dtype)


def columns_of_heads(x_nE: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, width: int) -> Tensor:
    """Σ W_h x_h + b over the heads: weight [C, H·width] -> [C]. Faster where its columns are contiguous in memory."""
    out = weight.new_zeros(weight.shape[0]) if bias is None else bias.clone()
    done = 0
    for first, end in _runs(heads.tolist()):
        part = x_nE[done : done + end - first].flatten().to(weight.dtype)
        out.addmv_(weight[:, first * width : end * width], part)
        done += end - first
    return out.to(x_nE.dtype)


def attend_used(
    query_BH1D: Tensor,
    used_BH: Tensor,
    key_BGTD: Tensor,
    value_BGTE: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float | None,
    sinks_H: Tensor | None = None,
    generated: bool = False,
) -> Tensor:
    """Attention of one token of each sequence by the heads that are used, zeros for the others: [B, H, 1, E].

    `mask` [B or 1, H or 1, 1, T]. With `generated` by a generated kernel; else the groups of a single sequence are
    read if one of their heads is used, and those of several sequences anyway.
    """
    tokens = key_BGTD.shape[2]
    mask = mask if mask is None else mask[..., :tokens]
    kept = torch.promote_types(key_BGTD.dtype, value_BGTE.dtype)
    if kept != query_BH1D.dtype or kept != key_BGTD.dtype:  # under autocast: the one query follows the many keys
        bias = mask if mask is None or mask.dtype == torch.bool else mask.to(kept)
        given = (query_BH1D.to(kept), used_BH, key_BGTD.to(kept), value_BGTE.to(kept), bias)
        return attend_used(*given, scale, cap, sinks_H, generated).to(query_BH1D.dtype)
    if generated:
        call = (query_BH1D, None, key_BGTD, None, value_BGTE, mask, sinks_H, scale, cap or 0.0, False, 0, 0, False)
        made: Tensor = torch.ops.latent.generated_attention(*call, used_BH)
        return made
    scoring = Scoring(scale, cap, sinks_H)
    if len(query_BH1D) > 1:
        every = attend(query_BH1D, key_BGTD, value_BGTE, mask, scoring).transpose(1, 2)
        return every.masked_fill(~used_BH[:, :, None, None], 0)
    heads, total = used_BH[0].nonzero()[:, 0], used_BH.shape[1]
    groups = [head // (total // key_BGTD.shape[1]) for head in heads.tolist()]
    out, done = query_BH1D.new_zeros(1, total, 1, value_BGTE.shape[3]), 0
    for _, alike in groupby(sorted(set(groups)), groups.count):  # one call where groups side by side have as many heads
        for first, end in _runs(list(alike)):
            rows = heads[done : done + sum(first <= group < end for group in groups)]
            seen = mask if mask is None or mask.shape[1] == 1 else mask[:, rows]
            some = key_BGTD[:, first:end], value_BGTE[:, first:end]
            part = attend(query_BH1D[:, rows], *some, seen, scoring.of_heads(rows))
            out[:, rows] = part.transpose(1, 2)
            done += len(rows)
    return out


@lowering("latent::attend_used")
def choose(node: fx.Node, gradients: bool) -> tuple[LibraryCall, str]:
    """The form for one node of a compiled graph and the reason in words."""
    value, given = node.meta["val"], args_of(node)
    generated = value.dtype in DTYPES and not gradients and not unavailable(value.device.type)
    reason = "keys split over cores" if generated else "scaled_dot_product_attention of the heads that are used"
    operator, sinks = torch.ops.latent.attend_used.default, argument(node, 7, "sinks", None)
    return LibraryCall(operator, (*given[:7], sinks, generated), {}), f"{'generated kernel: ' * generated}{reason}"


def _runs(heads: list[int]) -> list[tuple[int, int]]:
    """Sorted numbers as ranges: [0, 1, 4] -> [(0, 2), (4, 5)]."""
    found: list[tuple[int, int]] = []
    for head in heads:
        if found and found[-1][1] == head:
            found[-1] = (found[-1][0], head + 1)
        else:
            found.append((head, head + 1))
    return found


for name, body in (
    ("rows_of_heads", rows_of_heads),
    ("attend_used", attend_used),
    ("columns_of_heads", columns_of_heads),
):
    torch.library.impl(f"latent::{name}", "CompositeExplicitAutograd", in_own_dtypes(body))


def _rows_shape(x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, width: int) -> Tensor:
    return x.new_empty(heads.shape[0], width)


def _attend_shape(query: Tensor, used: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


def _columns_shape(x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, width: int) -> Tensor:
    return x.new_empty(weight.shape[0])


torch.library.register_fake("latent::rows_of_heads", _rows_shape)
torch.library.register_fake("latent::attend_used", _attend_shape)
torch.library.register_fake("latent::columns_of_heads", _columns_shape)
