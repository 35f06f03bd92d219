"""latent: finds every attention in a PyTorch model, proves what it does, and rewrites it.

    torch.compile(model, backend="latent")        # or model.compile(backend="latent") for anything that generates
    print(latent.explain(model)(*args, **kwargs))  # look, change nothing
"""

from .rewriter.registry import pattern, rewrite

__all__ = ["pattern", "rewrite"]
