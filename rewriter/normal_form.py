"""Normal form: the few spellings that tracing leaves are resolved once, so that no later stage meets them.

- a buffer filled piece by piece is a `cat` (`filled_buffers`);
- `alias`, `detach`, `lift_fresh` and slices that take everything are gone where nobody can tell;
- what nobody reads is gone, and nothing else: a write, a random number that eager would draw, and an operator that is
  not known to be pure stay.

Numbers behind `dynamic=True` (torch 2.13). A Python float becomes a 0-d float64 input and an `aten.item` whose value
is a symbol. Where the program needs a number, as for `scaled_dot_product_attention(scale=)`, the trace has guarded it
and the operator holds the literal; `item` is left without a reader. Where tensor arithmetic takes it
(`scores * scale`, `var + eps`) it stays a symbol without a guard: the next call may bring another value, and
`read_scalar` answers None. Inductor either keeps such an input or makes Dynamo start over with the value guarded; then
the graph arrives a second time with the literal.

`check_normal_form` is the specification, as a table of rules.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from .compat import expr_of, statically_known_true
from .filled_buffers import resolve_filled_buffers
from .invariants import Contract, NormalFormError, check_normal_form
from .mutations import Mutations, base_of, mutations, writes
from .purity import is_needless_detach, is_pure
from .scalars import read_scalar

__all__ = [
    "Contract",
    "Mutations",
    "NormalFormError",
    "check_normal_form",
    "is_pure",
    "mutations",
    "normalise",
    "read_scalar",
    "remove_dead_code",
]

aten = torch.ops.aten


def normalise(gm: fx.GraphModule) -> fx.GraphModule:
    """Bring a captured graph to normal form, in place, and return it."""
    _read_back_literals(gm.graph)
    _drop_identities(gm.graph)
    resolve_filled_buffers(gm)
    _read_written_results(gm.graph)
    remove_dead_code(gm)
    return gm


def _read_written_results(graph: fx.Graph) -> None:
    """What reads a tensor after an operator wrote all of it in place reads that operator's result.

    `s.masked_fill_(m, c); softmax(s)` then says in its data flow what it does. Inputs keep their own reads: there the
    write is what outlives the call.
    """
    for write in list(graph.nodes):
        written = write.args[0] if write.args and write.target not in _OTHER_RESULT else None
        if not isinstance(written, fx.Node) or writes(write) != (written,):
            continue
        if base_of(written).op != "call_function" or not _returns_self(write):
            continue
        for user in list(written.users):
            if user > write:
                user.replace_input_with(written, write)


_OTHER_RESULT: set[object] = {torch.ops.aten.index_copy_.default}
"""Writes into caches, which are found by their buffer."""


def _returns_self(write: fx.Node) -> bool:
    """Whether the schema says that the result is the first argument itself."""
    schema = getattr(write.target, "_schema", None)
    if schema is None or len(schema.returns) != 1 or schema.returns[0].alias_info is None:
        return False
    return bool(schema.returns[0].alias_info.before_set & schema.arguments[0].alias_info.before_set)


def _read_back_literals(graph: fx.Graph) -> None:
    """A symbol that the guards have pinned to one number is that number."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt | torch.SymFloat):
            continue
        if isinstance(expression := expr_of(value), sympy.Number):
            number = int(expression) if isinstance(value, torch.SymInt) else float(expression)
            node.replace_all_uses_with(number, propagate_meta=False)


def _drop_identities(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if _is_identity(node, graph):
            node.replace_all_uses_with(node.args[0], propagate_meta=False)
            graph.erase_node(node)


def _is_identity(node: fx.Node, graph: fx.Graph) -> bool:
    """Whether a node gives its input, and no reader can tell: not the caller, nor one who changes a shape in place."""
    if node.op != "call_function" or not node.args or not isinstance(source := node.args[0], fx.Node):
        return False
    if graph.output_node() in node.users or any(_changes_shape(user) for user in (*node.users, *source.users)):
        return False
    value = source.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    if node.target in (aten.alias.default, aten.lift_fresh.default) or is_needless_detach(node):
        return True
    if node.target is aten.slice.Tensor and (len(node.args) < 5 or node.args[4] == 1):
        dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        return statically_known_true(node.meta["val"].shape[dim] == value.shape[dim])
    return False


_RESHAPING = ("t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "resize_", "set_", "as_strided_")


def _changes_shape(node: fx.Node) -> bool:
    return getattr(node.target, "_opname", "") in _RESHAPING


def remove_dead_code(gm: fx.GraphModule) -> int:
    """Erase, in place, every pure node that nobody reads, and recompile; -> how many."""
    erased = 0
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and is_pure(node):
            gm.graph.erase_node(node)
            erased += 1
    gm.recompile()
    return erased
