"""What an attention remembers of its tokens, and how keys and values are made of that.

`new` makes of hidden states the two tensors that a cache keeps, `read` makes keys and values of what it kept. A memory
whose keys are turned after they were read (`turns_late`) keeps nothing that depends on a position; the cache keeps the
angles beside it, once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .layers import Affine, AttentionLayer, Rotary
from .norms import HeadNorm, turned_and_normed
from .rotation import Turns, rotate

__all__ = ["FullMemory", "Memory", "heads_of", "unturned_keys"]


class Memory(nn.Module):
    """Base: how keys [B, G, T, d] and values [B, G, T, e] come from hidden states [B, S, C]."""

    turns_late: ClassVar[bool] = False
    after_norm: ClassVar[bool] = False
    """Where keys have a norm, it keeps what comes out of it."""

    def __init__(self, rotary: Rotary | None) -> None:
        super().__init__()
        self.rotary = rotary

    def new(self, hidden: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        """Two tensors [B, N, S, width], one row per token; widths may be 0."""
        raise NotImplementedError

    def read(self, first: Tensor, second: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens [B, N, T, width] that are kept; `turns` are theirs."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """The arguments that build it again, without its weights; plain JSON."""
        raise NotImplementedError

    def cache_layer(self, make: Callable[[], Any]) -> Any:
        """The layer of a cache that keeps it; `make` gives one that keeps two tensors as they come."""
        return make()

    def turned(self, x_BNSd: Tensor, turns: Turns | None) -> Tensor:
        """Keys at their positions."""
        return x_BNSd if self.rotary is None or turns is None else rotate(x_BNSd, turns, self.rotary)


class FullMemory(Memory):
    """Keys and values themselves: nothing is changed."""

    def __init__(
        self,
        hidden: int,
        groups: int,
        key_width: int,
        value_width: int,
        bias: tuple[bool, bool],
        rotary: Rotary | None,
        key_norm: dict[str, Any] | None = None,
        value_norm: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(rotary)
        self.groups, self.key_width, self.value_width = groups, key_width, value_width
        self.key = nn.Linear(hidden, groups * key_width, bias[0])
        self.value = nn.Linear(hidden, groups * value_width, bias[1])
        self.key_norm = HeadNorm(**key_norm) if key_norm else None
        self.value_norm = HeadNorm(**value_norm) if value_norm else None

    @classmethod
    def of(cls, layer: AttentionLayer) -> FullMemory:
        with torch.device("meta"):
            made = cls(
                layer.key.weight.shape[-1],
                layer.groups,
                layer.key_width,
                layer.value_width,
                (layer.key.bias is not None, layer.value.bias is not None),
                layer.rotary,
            )
        made.key, made.value = layer.key.linear(), layer.value.linear()
        made.key_norm, made.value_norm = HeadNorm.of(layer.key_norm), HeadNorm.of(layer.value_norm)
        return made

    def settings(self) -> dict[str, object]:
        return {
            "hidden": self.key.in_features,
            "groups": self.groups,
            "key_width": self.key_width,
            "value_width": self.value_width,
            "bias": [self.key.bias is not None, self.value.bias is not None],
            "key_norm": self.key_norm.settings() if self.key_norm is not None else None,
            "value_norm": self.value_norm.settings() if self.value_norm is not None else None,
        }

    def new(self, hidden: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        key, value = heads_of(self.key(hidden), self.groups), heads_of(self.value(hidden), self.groups)
        key = turned_and_normed(key, turns, self.rotary, self.key_norm)
        return key, value if self.value_norm is None else self.value_norm(value)

    def read(self, first: Tensor, second: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        return first, second


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads·d] -> [B, heads, S, d]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def unturned_keys(hidden: Tensor, key: Affine | nn.Linear, norm: HeadNorm | None, groups: int) -> Tensor:
    """Keys [B, G, S, d] before rope: without their bias or, where there is a norm, after it."""
    weight = key.flat if isinstance(key, Affine) else key.weight
    if norm is None:
        return heads_of(nn.functional.linear(hidden, weight), groups)
    bias = key.bias if key.bias is None else key.bias.flatten()
    normed: Tensor = norm(heads_of(nn.functional.linear(hidden, weight, bias), groups))
    return normed
