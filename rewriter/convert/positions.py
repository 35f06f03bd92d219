"""What a model makes of positions, found by running that part of its graph for every position it knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..provenance import is_learned
from .linear_maps import part_of

__all__ = ["by_position", "of_own_tokens", "positions_in"]

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

    None where it is made of anything besides counted tokens and weights, cannot be run for other positions than those
    of the graph's own tokens, or differs in another dimension.
    """
    leaves = _leaves(made)
    if leaves is None or len(leaves) != 1 or not _counts(leaves[0]):
        return None
    like = leaves[0].meta["val"]
    every = torch.arange(-(-positions // len(like)) * len(like), dtype=like.dtype, device=like.device)
    try:
        run = torch.vmap(part_of(gm, leaves[0], made, given))
        found = run(every.clamp(max=positions - 1).view(-1, len(like)))
    except IndexError:  # a table that was cut to the length of the text
        return None
    rows = _rows(found, len(like), dim)
    return None if rows is None else rows[:positions]


def of_own_tokens(
    gm: fx.GraphModule, made: fx.Node, given: Mapping[fx.Node, Any], tokens: int, dim: int
) -> Tensor | None:
    """The same for the graph's own tokens, which stand at 0, 1, 2, ..., whatever counts them."""
    if not (leaves := _leaves(made)):
        return None
    leaf = leaves[0]
    value = leaf.target(*leaf.args, **leaf.kwargs)  # type: ignore[operator]
    return _rows(part_of(gm, leaf, made, given)(value)[None], tokens, dim)


def _rows(found: Tensor, tokens: int, dim: int | None) -> Tensor | None:
    """[n, ...] with a dimension of `tokens` as [n tokens, width]; None where others than `dim` matter."""
    kept = None if dim is None else dim % (found.ndim - 1) + 1
    along = [n for n in range(1, found.ndim) if n != kept and found.shape[n] == tokens]
    if len(along) != 1:
        return None
    others = [n for n in range(1, found.ndim) if n not in (*along, kept)]
    rows = found.permute(0, along[0], *others, *([] if kept is None else [kept])).flatten(0, 1)
    rows = rows.reshape(len(rows), -1, 1 if kept is None else rows.shape[-1])
    return rows[:, 0] if torch.equal(rows, rows[:, :1].expand_as(rows)) else None


def _leaves(node: fx.Node) -> list[fx.Node] | None:
    """Every count that a tensor is made of, besides weights and numbers; None where anything else is given."""
    pending, seen, leaves = [node], {node}, []
    while pending:
        one = pending.pop()
        if one.op == "placeholder" and not is_learned(one):
            return None
        if one.target in _ARANGE:
            if one.all_input_nodes:
                return None
            leaves.append(one)
        pending.extend(set(one.all_input_nodes) - seen)
        seen.update(one.all_input_nodes)
    return leaves


def _counts(leaf: fx.Node) -> bool:
    """Whether it is 0, 1, 2, ..."""
    counts = leaf.target(*leaf.args, **leaf.kwargs)  # type: ignore[operator]
    return torch.equal(counts, torch.arange(len(counts)).to(counts))
