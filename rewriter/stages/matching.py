"""Which nodes of two stages are the same, whatever they are called.

Inputs are the same at the same place of the program, constants when they are equal. Calls are candidates within one
module path when they are alike (operator, numbers, weights, type). Forward, a candidate must share an operand with its
partner, the more the better; backward, what matched calls read at the same position is matched too. So a piece that
was replaced stays unmatched as a whole, and what stands around it is found again.
"""

from __future__ import annotations

from collections.abc import Mapping

from .nesting import text_of
from .view import Node, Stage

__all__ = ["key", "match", "place_of"]


def match(a: Stage, b: Stage) -> dict[str, str]:
    """Names of `a` -> names of `b`."""
    places = {(node.kind, place_of(node)): node.name for node in reversed(b.nodes) if place_of(node)}
    first = {n.name: places[n.kind, place_of(n)] for n in b.nodes if place_of(n)}  # equal constants count as one
    matched = {n.name: places[n.kind, place_of(n)] for n in a.nodes if (n.kind, place_of(n)) in places}
    free: dict[tuple[str, str], list[Node]] = {}
    for node in a.calls:
        free.setdefault((node.module, key(node, a)), []).append(node)
    for node in b.calls:
        candidates = free.get((node.module, key(node, b)), [])
        read = [first.get(name, name) for name in node.reads]
        score, place = max(((_shared(x, read, matched), -n) for n, x in enumerate(candidates)), default=(0, 0))
        if score:
            matched[candidates.pop(-place).name] = node.name
    _backward(a, b, matched)
    return matched


def _shared(x: Node, read: list[str], matched: Mapping[str, str]) -> int:
    """How much of what a node reads is matched with `read`: more in the same place than elsewhere."""
    if not read:
        return 1
    found = [matched.get(name, "") for name in x.reads]
    return 2 * sum(p == q for p, q in zip(found, read, strict=True)) + len(set(found) & set(read))


def _backward(a: Stage, b: Stage, matched: dict[str, str]) -> None:
    taken = set(matched.values())
    for node in reversed(a.calls):
        partner = b.by_name.get(matched.get(node.name, ""))
        if partner is None:
            continue
        for p, q in zip(node.reads, partner.reads, strict=True):
            x, y = a.by_name[p], b.by_name[q]
            alike = x.kind == y.kind == "call" and x.module == y.module and key(x, a) == key(y, b)
            if alike and p not in matched and q not in taken:
                matched[p] = q
                taken.add(q)


def key(node: Node, stage: Stage) -> str:
    """What a call is, whatever it reads: operator, numbers, weights, type."""

    def name(ref: str) -> str:
        given = stage.by_name[ref]
        return "·" if given.kind == "call" or (given.kind == "input" and not given.weight) else place_of(given)

    return f"{node.target}{text_of((*node.args, dict(node.kwargs)), name)} {node.type}"


def place_of(node: Node) -> str:
    """Where an input stands in the program, what a constant or a function is; "" for everything else."""
    if node.kind == "input":
        return node.target
    if node.body is not None:
        return "; ".join(f"{n.name} {n.target}{text_of((*n.args, dict(n.kwargs)))}" for n in node.body.nodes)
    return f"{node.fill} {node.type}" if node.kind == "constant" else ""
