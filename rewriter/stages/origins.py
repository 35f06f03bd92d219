"""Which nodes of the stage before a node stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .view import Node, Stage

__all__ = ["Replacement", "link"]


@dataclass(frozen=True)
class Replacement:
    """What a node's maker noted: the operator that it was lowered from, and the nodes that its rewrite replaced."""

    lowered_from: str = ""
    region: tuple[str, ...] = ()


def link(before: Stage, after: Stage, notes: Mapping[str, Replacement]) -> Stage:
    """`after` with origins.

    A node of the same name is the same node. What a rewrite emitted stands for the region it replaced, and for what
    nobody reads any more since: the masks and the repeated heads that led only there.
    """
    known = before.by_name
    gone = _gone_with(before, after, {note.region for note in notes.values() if note.region})

    def origins(node: Node) -> tuple[str, ...]:
        note = notes.get(node.name, Replacement())
        if node.name in known:
            return (node.name,)
        if note.lowered_from in known:
            return (note.lowered_from,)
        region = {name for name in note.region if name in known} | gone.get(note.region, set())
        return tuple(name for name in known if name in region) if region else ()

    return replace(after, nodes=tuple(replace(node, origins=origins(node)) for node in after.nodes))


def _gone_with(before: Stage, after: Stage, regions: set[tuple[str, ...]]) -> dict[tuple[str, ...], set[str]]:
    """The nodes that are gone although no rewrite named them, by the regions whose nodes alone read them."""
    stayed = after.by_name
    causes: dict[str, set[tuple[str, ...]]] = {}
    for region in regions:
        for name in region:
            causes.setdefault(name, set()).add(region)
    named = set(causes)
    gone: dict[tuple[str, ...], set[str]] = {}
    for node in reversed(before.nodes):
        if node.name not in stayed:
            for region in causes.get(node.name, ()):
                if node.name not in named:
                    gone.setdefault(region, set()).add(node.name)
            for name in node.reads:
                if name not in stayed and name not in named:
                    causes.setdefault(name, set()).update(causes.get(node.name, ()))
    return gone
