"""Pictures of span plans for `latent masks`: what heads see, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..report_text import grouped
from .targets import TargetError

if TYPE_CHECKING:
    from ..convert.spans.plan import SpanPlan
    from ..effective_masks import EffectiveMask

__all__ = ["plan_classes", "plan_of_target"]


def plan_of_target(target: str) -> SpanPlan | None:
    """The plan in a YAML file or in the folder of a model that was converted to spans; None for other targets."""
    path = Path(target)
    if path.suffix not in (".yaml", ".yml") and not path.is_dir():
        return None
    from ..convert.spans.plan import PlanError, SpanPlan

    try:
        return SpanPlan.load(path)
    except PlanError:
        if path.is_dir():
            return None
        raise


def plan_classes(plan: SpanPlan, layer: int | None, length: int) -> list[list[EffectiveMask]]:
    """The masks of the heads; equal heads of equal layers together. Raises TargetError."""
    import torch

    from ..convert.spans.span import Full, seen
    from ..effective_masks import EffectiveMask

    if layer is not None and layer >= len(plan.layers):
        raise TargetError(f"--layer {layer}: the plan has {len(plan.layers)} layers.", "They are counted from 0.")
    at = torch.arange(length)
    heads = [(n, g, span) for n, g, span in plan.heads if layer in (None, n)]
    classes = grouped(heads, lambda head: (plan.layers[head[0]], head[2]))
    return [
        [
            EffectiveMask(
                path=f"layers.{n}.heads.{g}",
                line="",
                words="causal" if span == Full() else f"causal, {span}",
                visible=seen(span, at[:, None], at[None]),
                proven=True,
                data=False,
                heads=1,
                varies=False,
            )
            for n, g, span in same
        ]
        for same in classes
    ]
