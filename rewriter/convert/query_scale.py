"""Queries times a number for their position, so that attention stays sharp in long texts (Llama 4, Ministral 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .layers import QueryScaleFacts
from .linear_maps import part_of

__all__ = ["QueryScale", "read_steps"]

_ARANGE = {torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step}

STEPS = 4096
"""What changes more often goes in no steps: config.json would hold a number for every position."""


class QueryScale(nn.Module):
    """factors[n] from position starts[n] on; positions after the last that a model knows keep its factor."""

    def __init__(self, starts: Sequence[int], factors: Sequence[float], handed: bool) -> None:
        super().__init__()
        self.starts, self.factors, self.handed = tuple(starts), tuple(factors), handed

    @classmethod
    def of(cls, facts: QueryScaleFacts | None) -> QueryScale | None:
        return None if facts is None else cls(facts.starts, facts.factors, facts.handed)

    def settings(self) -> dict[str, object]:
        return {"starts": list(self.starts), "factors": list(self.factors), "handed": self.handed}

    def forward(self, hidden: Tensor, position_ids: Tensor | None, past: Any, layer_idx: int) -> Tensor:
        """[B or 1, 1, S, 1] for the tokens of `hidden` [B, S, C], in float32."""
        if self.handed:
            assert position_ids is not None
            positions = position_ids.contiguous()
        else:
            held = 0 if past is None else past.get_seq_length(layer_idx)
            positions = (torch.arange(hidden.shape[1], device=hidden.device) + held).unsqueeze(0)
        starts = torch.tensor(self.starts, device=hidden.device)
        factors = torch.tensor(self.factors, dtype=torch.float32, device=hidden.device)
        return factors[torch.bucketize(positions, starts, right=True) - 1][:, None, :, None]


def read_steps(
    gm: fx.GraphModule, by: fx.Node, given: Mapping[fx.Node, Any], positions: int
) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Where the number that a graph makes of a position changes, and what it is from there on.

    `positions` is how many a model knows. None where it is not made of counted tokens alone, or not in steps.
    """
    counted = _counted(by)
    tokens = by.meta["val"].numel()
    if counted is None or tuple(counted.meta["val"].shape) != (tokens,):
        return None
    like = counted.meta["val"]
    every = torch.arange(-(-positions // tokens) * tokens, dtype=like.dtype, device=like.device).view(-1, tokens)
    found = torch.vmap(part_of(gm, counted, by, given))(every).flatten().cpu()
    starts = torch.cat((torch.zeros(1, dtype=torch.long), (found[1:] != found[:-1]).nonzero().flatten() + 1))
    return (tuple(starts.tolist()), tuple(found[starts].tolist())) if len(starts) <= STEPS else None


def _counted(node: fx.Node) -> fx.Node | None:
    """The one 0, 1, 2, ... that a tensor is made of."""
    pending, seen, leaves = [node], {node}, []
    while pending:
        one = pending.pop()
        if one.target in _ARANGE or (one.op == "placeholder" and isinstance(one.meta.get("val"), Tensor)):
            leaves.append(one)
        pending.extend(set(one.all_input_nodes) - seen)
        seen.update(one.all_input_nodes)
    if len(leaves) != 1 or leaves[0].op == "placeholder" or leaves[0].all_input_nodes:
        return None
    (leaf,) = leaves
    counts = leaf.target(*leaf.args, **leaf.kwargs)  # type: ignore[operator]
    return leaf if torch.equal(counts, torch.arange(len(counts)).to(counts)) else None
