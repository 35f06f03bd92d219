"""What of a layer's values is read: errors count by what the output's projection makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import AttentionLayer

__all__ = ["value_roots"]


def value_roots(layer: AttentionLayer) -> Tensor:
    """R_g [G, e, e], float64, with |R_g v|² = Σ_h |W_o,h v|² over the heads h that read group g's values v.

    Its inverse is as good in the dtype of the weights: directions that are read less than 1e-4 of the most, or than 8
    times the dtype's rounding, count as if they were read that much.
    """
    groups = layer.groups
    read = layer.output.weight.double().view(-1, groups, layer.heads // groups, layer.value_width)
    energy, vectors = torch.linalg.eigh(torch.einsum("cghe,cghf->gef", read, read))
    roots = energy.clamp_min(0).sqrt()
    most = float(roots.max()) or 1.0  # nothing is read of a layer whose output is zero
    roots = roots.clamp_min(max(1e-4, 8 * torch.finfo(layer.output.weight.dtype).eps) * most)
    root: Tensor = (vectors * roots[:, None]) @ vectors.mT
    return root
