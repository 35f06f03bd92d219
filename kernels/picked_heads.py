"""One token through a few heads of an attention: the weights, keys and values of the others are not read.

    q_h = W_q,h x    o_h = softmax(scale · q_h k_g + mask) v_g    out = Σ_h W_o,h o_h    over the heads h in `heads`

`heads` [n] are sorted. Heads side by side are one product with a slice of a weight, heads of a group one product with
its keys: nothing is copied, as indexing would. Which heads they are must be known on the host: a device waits for it.
The operators have no gradients.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from ..rewriter.convert.attention import attend

__all__ = ["attend_picked", "columns_of_heads", "rows_of_heads"]

torch.library.define(
    "latent::rows_of_heads", "(Tensor x, Tensor weight, Tensor? bias, Tensor heads, int width) -> Tensor"
)
torch.library.define(
    "latent::attend_picked",
    "(Tensor query, Tensor heads, int total, Tensor key, Tensor value, Tensor? mask, float scale, float? cap)"
    " -> Tensor",
)
torch.library.define(
    "latent::columns_of_heads", "(Tensor x, Tensor weight, Tensor? bias, Tensor heads, int width) -> Tensor"
)


def rows_of_heads(x_C: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, width: int) -> Tensor:
    """W_h x + b_h of the heads: weight [H·width, C] -> [n, width]."""
    made = []
    for first, end in _runs(heads.tolist()):
        rows = slice(first * width, end * width)
        part = torch.mv(weight[rows], x_C)
        made.append(part if bias is None else part + bias[rows])
    return torch.cat(made).view(-1, width)


def columns_of_heads(x_nE: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, width: int) -> Tensor:
    """Σ W_h x_h + b over the heads: weight [C, H·width] -> [C]."""
    out = weight.new_zeros(weight.shape[0]) if bias is None else bias.clone()
    done = 0
    for first, end in _runs(heads.tolist()):
        part = x_nE[done : done + end - first].flatten()
        out.addmv_(weight[:, first * width : end * width], part)
        done += end - first
    return out


def attend_picked(
    query_nD: Tensor,
    heads: Tensor,
    total: int,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Attention of `heads` out of `total`, [n, E]; `mask` [1, 1 or total, 1, T]. Groups without a head are not read."""
    repeats = total // key_1GTD.shape[1]
    made, done = [], 0
    for group, members in groupby(heads.tolist(), lambda head: head // repeats):
        picked = list(members)
        query = query_nD[None, done : done + len(picked), None]
        seen = mask if mask is None or mask.shape[1] == 1 else mask[:, picked]
        one = slice(group, group + 1)
        made.append(attend(query, key_1GTD[:, one], value_1GTE[:, one], seen, scale, cap)[0, 0])
        done += len(picked)
    return torch.cat(made)


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
    ("attend_picked", attend_picked),
    ("columns_of_heads", columns_of_heads),
):
    torch.library.impl(f"latent::{name}", "CompositeExplicitAutograd", body)


@torch.library.register_fake("latent::rows_of_heads")
def _rows_shape(x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, width: int) -> Tensor:
    return x.new_empty(heads.shape[0], width)


@torch.library.register_fake("latent::attend_picked")
def _attend_shape(query: Tensor, heads: Tensor, total: int, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(heads.shape[0], value.shape[-1])


@torch.library.register_fake("latent::columns_of_heads")
def _columns_shape(x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, width: int) -> Tensor:
    return x.new_empty(weight.shape[0])
