"""latent: finds every attention in a PyTorch model, proves what it does, and rewrites it.

torch.compile(model, backend="latent")         # or model.compile(backend="latent") for anything that generates
print(latent.explain(model)(*args, **kwargs))  # look, change nothing
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .rewriter.registry import pattern, rewrite

if TYPE_CHECKING:
    from .rewriter.custom import testing
    from .rewriter.custom.replacement import replace
    from .rewriter.explain import check, explain
    from .rewriter.history import reports
    from .rewriter.options import ExpectationFailed, OptionError
    from .rewriter.prologue import invalidate
    from .rewriter.report import Report

__all__ = [
    "ExpectationFailed",
    "OptionError",
    "Report",
    "check",
    "explain",
    "invalidate",
    "pattern",
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
    "check": ".rewriter.explain",
    "explain": ".rewriter.explain",
    "invalidate": ".rewriter.prologue",
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
