"""`latent.testing`: checks of rewrites and patterns, for tests."""

from .check import CheckReport, RewriteCheckFailed, check_rewrite
from .check_pattern import PatternCheckFailed, PatternReport, check_pattern

__all__ = [
    "CheckReport",
    "PatternCheckFailed",
    "PatternReport",
    "RewriteCheckFailed",
    "check_pattern",
    "check_rewrite",
]
