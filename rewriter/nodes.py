"""Arguments of fx nodes, typed as what they are: anything."""

from __future__ import annotations

from typing import Any

from torch import fx


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments. fx types them as a union that no operator's schema fits."""
    return node.args


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument that may be given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
