"""One token of each sequence through a few heads of an attention: what the others have is not read.

    q_h = W_q,h x    o_h = softmax(scale · q_h k_g + mask) v_g    out = Σ_h W_o,h o_h    over the heads that are used

Heads keep their places, with zeros for those that are not used. Generated kernels are told which are used. Without
them a CPU reads the heads of a single sequence piece by piece: heads side by side are one view, nothing is copied.
The operators have no gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..rewriter.autocast import in_own_dtypes
from ..rewriter.convert.attention import attend
from ..rewriter.convert.scoring import Scoring
from ..rewriter.nodes import args_of, argument
from ..rewriter.registry import LibraryCall, lowering
from .gemv import by_columns, gemv_of_used, suits
from .generated import DTYPES, unavailable

__all__ = ["attend_used", "columns_of_used", "rows_of_used"]

LARGE = 8 << 20
"""Bytes of a weight of which it pays to read parts."""

torch.library.define(
    "latent::attend_used",
    "(Tensor query, Tensor used, Tensor key, Tensor value, Tensor? mask, float scale, float? cap, "
    "Tensor? sinks=None, bool generated=False) -> Tensor",
)
_PRODUCT = "(Tensor rows, Tensor weight, Tensor? bias, Tensor used, bool generated=False) -> Tensor"
torch.library.define("latent::rows_of_used", _PRODUCT)
torch.library.define("latent::columns_of_used", _PRODUCT)


def rows_of_used(
    x_BSC: Tensor, weight: Tensor, bias: Tensor | None, used_BSH: Tensor, generated: bool = False
) -> Tensor:
    """x Wᵀ + b of the heads that are used: weight [H·d, C] -> [B, S, H·d], anything for the others."""
    if generated:
        return gemv_of_used(x_BSC, weight, bias, used_BSH)
    x = x_BSC.to(weight.dtype)
    if not _in_pieces(x, weight):
        return F.linear(x, weight, bias).to(x_BSC.dtype)
    out, width = x.new_zeros(len(weight)), len(weight) // used_BSH.shape[2]
    for first, end in runs(used_BSH[0, 0].tolist()):
        rows = slice(first * width, end * width)
        torch.mv(weight[rows], x[0, 0], out=out[rows])
    out = out if bias is None else out + bias
    return out.view(1, 1, -1).to(x_BSC.dtype)


def columns_of_used(
    x_BSE: Tensor, weight: Tensor, bias: Tensor | None, used_BSH: Tensor, generated: bool = False
) -> Tensor:
    """x Wᵀ + b where x is 0 for heads that are not used: weight [C, H·e] -> [B, S, C]. Its columns are contiguous."""
    if generated:
        return gemv_of_used(x_BSE, weight, bias, used_BSH)
    x = x_BSE.to(weight.dtype)
    if not _in_pieces(x, weight):
        return F.linear(x, weight, bias).to(x_BSE.dtype)
    out, width = x.new_zeros(len(weight)) if bias is None else bias.clone(), weight.shape[1] // used_BSH.shape[2]
    for first, end in runs(used_BSH[0, 0].tolist()):
        columns = slice(first * width, end * width)
        out.addmv_(weight[:, columns], x[0, 0, columns])
    return out.view(1, 1, -1).to(x_BSE.dtype)


def _in_pieces(x: Tensor, weight: Tensor) -> bool:
    """Whether to multiply by parts of a weight. Only a CPU knows without waiting which they are."""
    return x.is_cpu and x.shape[:2].numel() == 1 and weight.nbytes >= LARGE


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

    `mask` [B or 1, H or 1, 1, T]. With `generated` by a generated kernel; else the groups of a single sequence on a CPU
    are read if one of their heads is used, and all groups otherwise.
    """
    tokens, groups = key_BGTD.shape[2], key_BGTD.shape[1]
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
    query: Tensor = query_BH1D.unflatten(1, (groups, -1))
    pieces = [(0, groups)]
    if len(query) == 1 and query.is_cpu:
        pieces = runs(used_BH.view(groups, -1).any(1).tolist())
    out = query.new_zeros(*query.shape[:-1], value_BGTE.shape[3])
    for first, end in pieces:
        some = slice(first, end)
        seen = mask if mask is None or mask.shape[1] == 1 else mask.unflatten(1, (groups, -1))[:, some].flatten(1, 2)
        scoring = Scoring(scale, cap, None if sinks_H is None else sinks_H.view(groups, -1)[some].flatten())
        part = attend(query[:, some].flatten(1, 2), key_BGTD[:, some], value_BGTE[:, some], seen, scoring)
        out[:, some] = part.view(len(query), end - first, -1, 1, value_BGTE.shape[3])
    return out.flatten(1, 2).masked_fill(~used_BH[:, :, None, None], 0)


def runs(used: list[bool]) -> list[tuple[int, int]]:
    """Where heads that are used lie side by side: [True, True, False, True] -> [(0, 2), (3, 4)]."""
    found: list[tuple[int, int]] = []
    for head, is_used in enumerate(used):
        if is_used and found and found[-1][1] == head:
            found[-1] = (found[-1][0], head + 1)
        elif is_used:
            found.append((head, head + 1))
    return found


@lowering("latent::attend_used")
def choose_attention(node: fx.Node, gradients: bool) -> tuple[LibraryCall, str]:
    """The form for one node of a compiled graph and the reason in words."""
    value, given = node.meta["val"], args_of(node)
    query, used, key, kept, mask, scale, cap = given[:7]
    sinks = argument(node, 7, "sinks", None)
    if value.dtype not in DTYPES or gradients or unavailable(value.device.type):
        operator = torch.ops.latent.attend_used.default
        return LibraryCall(operator, (*given[:7], sinks, False), {}), "scaled_dot_product_attention of used heads"
    reason = "generated kernel: keys split over cores"
    if any(node.meta["val"].dtype != value.dtype for node in (key, kept)):
        return LibraryCall(torch.ops.latent.attend_used.default, (*given[:7], sinks, True), {}), reason
    call = (query, None, key, None, kept, mask, sinks, scale, cap or 0.0, False, 0, 0, False, used)
    return LibraryCall(torch.ops.latent.generated_attention.default, call, {}), reason


@lowering("latent::rows_of_used")
def choose_rows(node: fx.Node, gradients: bool) -> tuple[LibraryCall, str]:
    """A kernel of its own where it saves more than a product together with others of the same rows."""
    weight = args_of(node)[1].meta["val"]
    return _product(node, gradients, not by_columns(weight) and weight.nbytes >= LARGE)


@lowering("latent::columns_of_used")
def choose_columns(node: fx.Node, gradients: bool) -> tuple[LibraryCall, str]:
    """A kernel where the columns of a head are one piece."""
    return _product(node, gradients, by_columns(args_of(node)[1].meta["val"]))


def _product(node: fx.Node, gradients: bool, pays: bool) -> tuple[LibraryCall, str]:
    rows, weight, bias, used = args_of(node)[:4]
    if pays and not gradients and suits(rows.meta["val"], [weight.meta["val"]]):
        return LibraryCall(node.target, (rows, weight, bias, used, True), {}), "generated kernel: weights of used heads"
    if rows.meta["val"].dtype != weight.meta["val"].dtype:
        return LibraryCall(node.target, (rows, weight, bias, used, False), {}), "linear in the weight's dtype"
    return LibraryCall(torch.ops.aten.linear.default, (rows, weight, bias), {}), "linear, all heads"


for name, body in (
    ("rows_of_used", rows_of_used),
    ("attend_used", attend_used),
    ("columns_of_used", columns_of_used),
):
    torch.library.impl(f"latent::{name}", "CompositeExplicitAutograd", in_own_dtypes(body))


def _attend_shape(query: Tensor, used: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


def _product_shape(rows: Tensor, weight: Tensor, *_: object) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


torch.library.register_fake("latent::attend_used", _attend_shape)
torch.library.register_fake("latent::rows_of_used", _product_shape)
torch.library.register_fake("latent::columns_of_used", _product_shape)
