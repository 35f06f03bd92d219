"""What of a layer's values is read: errors count by what the output's projection makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import AttentionLayer

__all__ = ["value_roots"]


def value_roots(layer: AttentionLayer) -> Tensor:
    """R_g [G, e, e], float64, with |R_g v|² = Σ_h |W_o,h v|² over the heads h that read group g's values v.

    R_g can be inverted: directions that nobody reads count a little, 1e-8 of the most that any does.
    """
    groups = layer.groups
    read = layer.output.weight.double().view(-1, groups, layer.heads // groups, layer.value_width)
    energy, vectors = torch.linalg.eigh(torch.einsum("cghe,cghf->gef", read, read))
    roots = energy.clamp_min(1e-8 * float(energy.max())).sqrt()
    root: Tensor = (vectors * roots[:, None]) @ vectors.mT
    return root
