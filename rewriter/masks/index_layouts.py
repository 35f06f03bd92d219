"""Elements of operators that move elements and of those that make constant tensors."""

from __future__ import annotations

import itertools

import sympy
import torch
from torch import fx

from .index_call import Call, Indices, is_tensor, position, reads, shape_of
from .index_numbers import exact, size_of
from .index_values import Const, UnreadError, Value, as_number, choose_value, compare, conjunction, disjunction, is_bool

# ** the same element elsewhere **


@reads("expand", "expand_as", "broadcast_to")
@reads("detach", "alias", "clone", "contiguous", "lift_fresh", "to", "_to_copy", "type_as", "copy")
def _aligned(call: Call) -> Value:
    if call.argument("src") is not None:  # copy(self, src)
        return call.value(call.argument("src"))
    return call.value(call.node.args[0])


@reads("lift_fresh_copy")
def _literal(call: Call) -> Value:
    """A tensor written out in the program: the tracer keeps it as a constant and copies it where it is used."""
    source = call.argument("self")
    module = call.node.graph.owning_module
    if isinstance(source, fx.Node) and source.op == "get_attr" and module is not None:
        held = getattr(module, str(source.target), None)
        if type(held) is torch.Tensor and held.numel() == 1 and not held.is_meta:
            if call.reader.storages.writes_before(source, None):
                raise UnreadError("is a constant that is written to")
            return exact(held.item())
    return call.value(source)


@reads("unsqueeze")
def _unsqueeze(call: Call) -> Value:
    dim = call.dim()
    return call.read(call.argument("self"), call.indices[:dim] + call.indices[dim + 1 :])


@reads("squeeze", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def _view(call: Call) -> Value:
    source = call.argument("self")
    return call.read(source, _unravelled(call, shape_of(source)))


def _unravelled(call: Call, into: tuple[sympy.Expr, ...]) -> Indices:
    """Indices in a view of another shape: runs of dimensions with equal products are read as one mixed-radix number."""
    result: list[sympy.Expr] = [sympy.S.Zero] * len(into)
    ours = [d for d, size in enumerate(call.shape) if size != 1]
    theirs = [d for d, size in enumerate(into) if size != 1]
    while ours or theirs:
        mine, other = _equal_runs([call.shape[d] for d in ours], [into[d] for d in theirs])
        flat = sympy.S.Zero
        for dim in ours[:mine]:
            flat = sympy.expand(flat * call.shape[dim] + call.indices[dim])
        for dim in reversed(theirs[:other]):
            if dim != theirs[0]:
                result[dim] = call.ranges.remainder(flat, into[dim])
                flat = call.ranges.quotient(flat, into[dim])
            else:
                result[dim] = flat
        ours, theirs = ours[mine:], theirs[other:]
    return tuple(result)


def _equal_runs(ours: list[sympy.Expr], theirs: list[sympy.Expr]) -> tuple[int, int]:
    """The shortest leading runs of both with the same product; all of both where sizes leave it open."""
    for mine, other in sorted(itertools.product(range(1, len(ours) + 1), range(1, len(theirs) + 1)), key=sum):
        if sympy.expand(sympy.prod(ours[:mine]) - sympy.prod(theirs[:other])) == 0:
            return mine, other
    return len(ours), len(theirs)


@reads("permute")
def _permute(call: Call) -> Value:
    inner = [sympy.S.Zero] * call.rank
    for index, dim in zip(call.indices, call.argument("dims"), strict=True):
        inner[dim % call.rank] = index
    return call.read(call.argument("self"), inner)


@reads("transpose", "t", "mT", "swapaxes", "swapdims", "adjoint", "numpy_T")
def _transpose(call: Call) -> Value:
    inner = list(call.indices)
    names = [name for name in ("dim0", "axis0") if name in call.arguments]
    first, second = (call.dim(names[0]), call.dim(names[0].replace("0", "1"))) if names else (-2, -1)
    if call.rank > 1:
        inner[first], inner[second] = inner[second], inner[first]
    return call.read(call.argument("self"), inner)


@reads("slice")
def _slice(call: Call) -> Value:
    source, dim = call.argument("self"), call.dim()
    start = position(call.argument("start", 0), shape_of(source)[dim], call.ranges)
    return call.read(source, call.at_dim(dim, start + size_of(call.argument("step", 1)) * call.indices[dim]))


@reads("narrow")
def _narrow(call: Call) -> Value:
    source, dim = call.argument("self"), call.dim()
    start = position(call.argument("start"), shape_of(source)[dim], call.ranges)
    return call.read(source, call.at_dim(dim, start + call.indices[dim]))


@reads("select")
def _select(call: Call) -> Value:
    source = call.argument("self")
    dim = call.dim(rank=call.rank + 1)
    index = position(call.argument("index"), shape_of(source)[dim], call.ranges)
    return call.read(source, (*call.indices[:dim], index, *call.indices[dim:]))


@reads("flip")
def _flip(call: Call) -> Value:
    inner = list(call.indices)
    for dim in call.argument("dims"):
        inner[dim] = call.shape[dim] - 1 - inner[dim]
    return call.read(call.argument("self"), inner)


@reads("repeat")
def _repeat(call: Call) -> Value:
    source = call.argument("self")
    sizes = shape_of(source)
    inner = call.indices[call.rank - len(sizes) :]
    return call.read(source, [call.ranges.remainder(k, size) for k, size in zip(inner, sizes, strict=True)])


@reads("getitem")
def _member(call: Call) -> Value:
    """One tensor of several: a part of a split, or a coordinate of a mesh."""
    several, which = call.node.args
    if not isinstance(several, fx.Node) or not isinstance(which, int):
        raise UnreadError("is a part of what is not followed")
    storages = call.reader.storages
    inner = Call(call.reader, several, call.indices, several if storages.alias(several) is None else call.at)
    name = storages.operator(several)
    if name in ("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split"):
        dim = inner.dim()
        start = sum((size_of(part.shape[dim]) for part in several.meta["val"][:which]), sympy.S.Zero)
        return inner.read(inner.argument("self"), call.at_dim(dim, start + call.indices[dim]))
    if name == "unbind":
        dim = inner.dim(rank=call.rank + 1)
        return inner.read(inner.argument("self"), (*call.indices[:dim], sympy.Integer(which), *call.indices[dim:]))
    if name == "meshgrid":
        source = inner.argument("tensors")[which]
        if storages.writes_before(source, None):
            raise UnreadError("may share memory with a tensor that is written to")
        axis = 1 - which if inner.argument("indexing", "ij") == "xy" and which < 2 else which
        return call.read(source, call.indices[axis : axis + 1] if shape_of(source) else ())
    raise UnreadError(f"is a part of {name}, which is not followed")


# ** elements chosen by tensors **


@reads("index")
def _index(call: Call) -> Value:
    """x[.., a, b, ..] with index tensors a, b, which are broadcast to one another."""
    source, given = call.argument("self"), call.argument("indices")
    tensors = [index for index in given if index is not None]
    if any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in tensors):
        raise UnreadError("is chosen by a boolean tensor")
    joint = max(len(index.meta["val"].shape) for index in tensors)
    places = [place for place, index in enumerate(given) if index is not None]
    adjacent = places == list(range(places[0], places[-1] + 1))
    first = places[0] if adjacent else 0
    chosen, kept = call.indices[first : first + joint], call.indices[:first] + call.indices[first + joint :]
    plain = iter(kept)
    inner: list[sympy.Expr] = []
    for dim, size in enumerate(shape_of(source)):
        index = given[dim] if dim < len(given) else None
        inner.append(next(plain) if index is None else _place(call, index, chosen, size))
    return call.read(source, inner)


@reads("index_select")
def _index_select(call: Call) -> Value:
    source, dim = call.argument("self"), call.dim()
    place = _place(call, call.argument("index"), call.indices[dim : dim + 1], shape_of(source)[dim])
    return call.read(source, call.at_dim(dim, place))


@reads("gather")
def _gather(call: Call) -> Value:
    source, dim = call.argument("self"), call.dim()
    place = _place(call, call.argument("index"), call.indices, shape_of(source)[dim])
    return call.read(source, call.at_dim(dim, place))


def _place(call: Call, index: fx.Node, indices: Indices, size: sympy.Expr) -> sympy.Expr:
    """The value of an index tensor. It lies inside of the dimension, or the program fails; negative ones wrap."""
    rank = len(shape_of(index))
    value = call.read(index, indices[len(indices) - rank :])
    if is_bool(value) or not isinstance(value, sympy.Expr):
        raise UnreadError("is chosen by a tensor with several cases")
    if call.ranges.nonnegative(value):
        return value
    if call.ranges.nonnegative(-value - 1):
        return sympy.expand(size + value)
    raise UnreadError("is chosen by positions whose sign is not known")


# ** several tensors as one **


@reads("cat", "concat", "concatenate")
def _cat(call: Call) -> Value:
    dim = call.dim()
    parts = [part for part in call.argument("tensors") if not _empty(part)]
    start = sum((shape_of(part)[dim] for part in parts[:-1]), sympy.S.Zero)
    value = call.read(parts[-1], call.at_dim(dim, call.indices[dim] - start))
    for part in reversed(parts[:-1]):
        end, start = start, start - shape_of(part)[dim]
        inside = call.compare("lt", call.indices[dim], sympy.expand(end))
        value = choose_value(inside, call.read(part, call.at_dim(dim, call.indices[dim] - start)), value)
    return value


def _empty(part: fx.Node) -> bool:
    return any(isinstance(size, int) and size == 0 for size in part.meta["val"].shape)


@reads("stack")
def _stack(call: Call) -> Value:
    dim, parts = call.dim(), call.argument("tensors")
    inner = call.indices[:dim] + call.indices[dim + 1 :]
    value = call.read(parts[-1], inner)
    for place, part in reversed(list(enumerate(parts[:-1]))):
        value = choose_value(call.compare("eq", call.indices[dim], sympy.Integer(place)), call.read(part, inner), value)
    return value


@reads("pad", "constant_pad_nd")
def _pad(call: Call) -> Value:
    """A constant outside of [before, before + size) in the last dimensions."""
    if call.argument("mode", "constant") != "constant":
        raise UnreadError("is padded with other elements")
    source, widths = call.argument("self"), call.argument("pad")
    sizes, inner, inside = shape_of(source), list(call.indices), []
    for place in range(len(widths) // 2):
        dim = call.rank - 1 - place
        inner[dim] = sympy.expand(inner[dim] - size_of(widths[2 * place]))
        inside.append(call.compare("ge", inner[dim], sympy.S.Zero))
        inside.append(call.compare("lt", inner[dim], sizes[dim]))
    value = call.read(source, inner)
    filler = exact(call.argument("value", 0))
    both = conjunction(*inside)
    return choose_value(both, value, compare("ne", filler, sympy.S.Zero) if is_bool(value) else filler)


@reads("diff")
def _diff(call: Call) -> Value:
    """x[k] - x[k - 1], where x[-1] is the prepended element."""
    source, first, dim = call.argument("self"), call.argument("prepend"), call.dim()
    if call.argument("n", 1) != 1 or call.argument("append") is not None:
        raise UnreadError("is a difference of higher order")
    index = call.indices[dim]

    def step(later: Value, earlier: Value) -> Value:
        if is_bool(later) or is_bool(earlier):
            return disjunction(*map(_never_bool, (later, earlier)))
        if not isinstance(later, sympy.Expr) or not isinstance(earlier, sympy.Expr):
            raise UnreadError("is a difference of several cases")
        return later - earlier

    if first is None:
        return step(call.read(source, call.at_dim(dim, index + 1)), call.read(source, call.at_dim(dim, index)))
    if shape_of(first)[dim] != 1:
        raise UnreadError("is a difference with several prepended elements")
    at_zero = call.at_dim(dim, sympy.S.Zero)
    start = step(call.read(source, at_zero), call.read(first, at_zero))
    rest = step(call.read(source, call.indices), call.read(source, call.at_dim(dim, index - 1)))
    return choose_value(call.compare("lt", index, sympy.S.One), start, rest)


def _never_bool(value: Value) -> Const:
    raise UnreadError("is a difference of truth values")


@reads("cumsum")
def _cumsum(call: Call) -> Value:
    """k + 1 times the same number; sums of other things are not followed."""
    dim = call.dim()
    anywhere = call.ranges.index("k", call.shape[dim])
    value = as_number(call.read(call.argument("self"), call.at_dim(dim, anywhere)))
    if not isinstance(value, sympy.Expr) or not value.is_Integer:
        raise UnreadError("is a running sum")
    return value * (call.indices[dim] + 1)


# ** constants **


@reads("zeros", "zeros_like", "new_zeros", "zero")
def _zeros(call: Call) -> Value:
    return sympy.S.Zero


@reads("ones", "ones_like", "new_ones")
def _ones(call: Call) -> Value:
    return sympy.S.One


@reads("full", "full_like", "new_full")
def _full(call: Call) -> Value:
    return exact(call.argument("fill_value"))


@reads("fill")
def _fill(call: Call) -> Value:
    value = call.argument("value")
    return call.read(value, ()) if is_tensor(value) else exact(value)


@reads("scalar_tensor")
def _scalar(call: Call) -> Value:
    return exact(call.argument("s"))


@reads("arange")
def _arange(call: Call) -> Value:
    return exact(call.argument("start", 0)) + exact(call.argument("step", 1)) * call.indices[0]


@reads("eye")
def _eye(call: Call) -> Value:
    return compare("eq", call.indices[0], call.indices[1])
