"""The sources of the generated kernels that a graph runs, found from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .registry import source_printers

__all__ = ["KernelSource", "kernel_sources"]


@dataclass(frozen=True)
class KernelSource:
    """One generated kernel: its name, which is that of its specification, the suffix of its language, its text."""

    name: str
    suffix: str
    text: str
    use: str = ""
    """When it runs, where an operator has several: "absorbed", "expanded"."""

    @property
    def file(self) -> str:
        return f"{self.name}{self.suffix}"


def kernel_sources(graph: fx.Graph) -> dict[str, tuple[KernelSource, ...]]:
    """By the names of the nodes that run them."""
    printers, found = source_printers(), {}
    for node in graph.nodes:
        name = str(node.target).removesuffix(".default").replace(".", "::", 1)
        if node.op == "call_function" and name in printers:
            found[node.name] = tuple(printers[name](node))
    return found
