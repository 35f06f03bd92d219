"""Which keys the heads of an attention see, where that is less than all: base of what recipes put into `reach`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .scoring import Scoring

__all__ = ["Reach"]


class Reach(nn.Module):
    """Attention of some heads to some keys; it also says what a cache holds for it."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        past: Any,
        scoring: Scoring,
        index: int,
    ) -> Tensor:
        """[B, S, H, e], from the queries [B, H, S, d], keys [B, G, S, d] and values of this call, in layer `index`."""
        raise NotImplementedError

    def cache_layer(self, max_length: int | None) -> Any:
        """The layer of a cache that keeps what the heads will see; None: one that grows."""
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """The arguments that build it again; plain JSON."""
        raise NotImplementedError
