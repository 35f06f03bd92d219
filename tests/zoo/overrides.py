"""What the rules cannot know: one model type a row, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Override:
    """`start` goes into the large configuration before it is shrunk, `changes` into the tiny one afterwards."""

    reason: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, Any] = field(default_factory=dict)


OVERRIDES: dict[str, Override] = {}
