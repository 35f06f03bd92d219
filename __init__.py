"""latent: finds every attention in a PyTorch model, proves what it does, and rewrites it.

torch.compile(model, backend="latent")         # or model.compile(backend="latent") for anything that generates
print(latent.explain(model)(*args, **kwargs))  # look, change nothing
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .rewriter.registry import pattern, rewrite

if TYPE_CHECKING:
    from .passes.recipes.routed_heads import balance_loss
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
    "ExpectationFailed",
    "LatentCache",
    "OptionError",
    "Report",
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
