"""What torch's caches on disk do not see: the bodies of operators that are opened behind their back.

Their keys hold the rewritten graph, in which `latent::attention` or an operator of a rewrite is a name alone.
AOTAutograd opens such an operator into its body, or its backward, and a body that has changed would meet what the old
one left.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
from torch import fx

from .compat import is_opened_while_compiling


@functools.cache
def own_tag() -> str:
    """A digest of this package's operators, for `torch.compiler.config.cache_key_tag`."""
    sources = sorted((Path(__file__).parent.parent / "kernels").rglob("*.py"))
    return "latent " + hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def is_cacheable(gm: fx.GraphModule) -> bool:
    """Whether no rewrite put in an operator of its own whose body gets into what is compiled."""
    gradients = torch.is_grad_enabled()
    added = (node.target for node in gm.graph.nodes if "latent_rewrite" in node.meta)
    return not any(is_opened_while_compiling(target, gradients) for target in added)
