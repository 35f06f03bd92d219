"""latent: finds every attention in a PyTorch model, proves what it does, and rewrites it.

torch.compile(model, backend="latent")         # or model.compile(backend="latent") for anything that generates
print(latent.explain(model)(*args, **kwargs))  # look, change nothing
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .rewriter.registry import pattern, rewrite

if TYPE_CHECKING:
    from .passes.recipes.cross_layer_svd import CrossLayerSVD
    from .passes.recipes.head_spans import HeadSpans
    from .passes.recipes.joint_latent import JointLatent
    from .passes.recipes.routed_heads import RoutedHeads, balance_loss
    from .passes.recipes.separate_latent import SeparateLatent
    from .passes.recipes.transmla import TransMLA
    from .passes.recipes.weight_svd import WeightSVD
    from .rewriter.convert.cache import LatentCache
    from .rewriter.convert.convert import convert
    from .rewriter.convert.recipe import recipes
    from .rewriter.convert.store import load
    from .rewriter.custom import testing
    from .rewriter.custom.replacement import replace
    from .rewriter.explain import check, explain
    from .rewriter.history import reports
    from .rewriter.options import ExpectationFailed, OptionError
    from .rewriter.prologue import invalidate
    from .rewriter.report import Report

__all__ = [
    "CrossLayerSVD",
    "ExpectationFailed",
    "HeadSpans",
    "JointLatent",
    "LatentCache",
    "OptionError",
    "Report",
    "RoutedHeads",
    "SeparateLatent",
    "TransMLA",
    "WeightSVD",
    "balance_loss",
    "check",
    "convert",
    "explain",
    "invalidate",
    "load",
    "pattern",
    "recipes",
    "replace",
    "reports",
    "rewrite",
    "testing",
]

# Imported when first used: they need torch, and `latent --help` does not.
_LATER = {
    "CrossLayerSVD": ".passes.recipes.cross_layer_svd",
    "HeadSpans": ".passes.recipes.head_spans",
    "JointLatent": ".passes.recipes.joint_latent",
    "RoutedHeads": ".passes.recipes.routed_heads",
    "SeparateLatent": ".passes.recipes.separate_latent",
    "TransMLA": ".passes.recipes.transmla",
    "WeightSVD": ".passes.recipes.weight_svd",
    "ExpectationFailed": ".rewriter.options",
    "OptionError": ".rewriter.options",
    "Report": ".rewriter.report",
    "balance_loss": ".passes.recipes.routed_heads",
    "check": ".rewriter.explain",
    "explain": ".rewriter.explain",
    "LatentCache": ".rewriter.convert.cache",
    "convert": ".rewriter.convert.convert",
    "invalidate": ".rewriter.prologue",
    "load": ".rewriter.convert.store",
    "recipes": ".rewriter.convert.recipe",
    "replace": ".rewriter.custom.replacement",
    "reports": ".rewriter.history",
}


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module(".rewriter.custom.testing", __name__)
    if name not in _LATER:
        raise AttributeError(f"module 'latent' has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
