"""Work on weights alone, hoisted (placeholder until the real one lands)."""
from __future__ import annotations
from dataclasses import dataclass
from typing import Any
from torch import fx

@dataclass
class Hoisted:
    gm: fx.GraphModule
    extra_inputs: list[Any]
    def wrap(self, compiled: Any) -> Any:
        return compiled

def hoist(gm: fx.GraphModule, example_inputs: Any) -> Hoisted:
    return Hoisted(gm, [])
