"""What a model makes of positions, found by running that part of its graph for every position it knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..provenance import is_learned
from .linear_maps import part_of

__all__ = ["by_position", "positions_in"]

_ARANGE = {torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step}


def positions_in(hidden: Tensor, position_ids: Tensor | None, past: Any, layer_idx: int) -> Tensor:
    """[B or 1, S] of the tokens `hidden` [B, S, C]: as they were handed over, or counted from those in the cache."""
    if position_ids is not None:
        return position_ids
    held = 0 if past is None else past.get_seq_length(layer_idx)
    return (torch.arange(hidden.shape[1], device=hidden.device) + held).unsqueeze(0)


def by_position(
    gm: fx.GraphModule, made: fx.Node, given: Mapping[fx.Node, Any], positions: int, dim: int | None
) -> Tensor | None:
    """What `made` is for each position: [positions, width] of its dimension `dim`, [positions, 1] without it.

    None where it is made of anything besides counted tokens and weights, or differs in another dimension.
    """
    counted = _counted(made)
    if counted is None:
        return None
    like, rank = counted.meta["val"], made.meta["val"].ndim
    tokens, kept = len(like), None if dim is None else dim % rank
    along = [n for n, size in enumerate(made.meta["val"].shape) if n != kept and int(size) == tokens]
    if len(along) != 1:
        return None
    every = torch.arange(-(-positions // tokens) * tokens, dtype=like.dtype, device=like.device)
    found = torch.vmap(part_of(gm, counted, made, given))(every.clamp(max=positions - 1).view(-1, tokens))
    order = [n + 1 for n in range(rank) if n not in (*along, kept)]
    rows = found.permute(0, along[0] + 1, *order, *([] if kept is None else [kept + 1])).flatten(0, 1)[:positions]
    rows = rows.reshape(len(rows), -1, 1 if kept is None else rows.shape[-1])
    return rows[:, 0] if torch.equal(rows, rows[:, :1].expand_as(rows)) else None


def _counted(node: fx.Node) -> fx.Node | None:
    """The one 0, 1, 2, ... that a tensor is made of, besides weights and numbers."""
    pending, seen, leaves = [node], {node}, []
    while pending:
        one = pending.pop()
        if one.target in _ARANGE or (one.op == "placeholder" and not is_learned(one)):
            leaves.append(one)
        pending.extend(set(one.all_input_nodes) - seen)
        seen.update(one.all_input_nodes)
    if len(leaves) != 1 or leaves[0].op == "placeholder" or leaves[0].all_input_nodes:
        return None
    (leaf,) = leaves
    counts = leaf.target(*leaf.args, **leaf.kwargs)  # type: ignore[operator]
    return leaf if torch.equal(counts, torch.arange(len(counts)).to(counts)) else None
