"""Prints the Triton kernels of a specification: `attend`, and `split` with `combine`.

Rows are pairs (token, head of the group), so that one read of a key serves every query head that shares it. `attend`
gives a tile of rows all their keys; `split` gives it one share of them and leaves a partial sum for `combine`:

    maximum[p] = max over the share of the scores,  sum[p] = Σ 2^(score - maximum[p]),  partial[p] = Σ 2^(…) value

Scores are in base 2. A row that saw no key has sum 0; the maximum is finite even then, so no exponent is ∞ - ∞.
What a specification leaves out leaves no trace in the text; widths are numbers in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from .spec import KernelSpec

Kind = Literal["attend", "split", "combine"]

LEAST = -3.4e38
"""Below every score, and finite: the maximum of no scores."""

LOG2E = math.log2(math.e)


class Chunk(NamedTuple):
    """Columns start..start + size of a row, size a power of two; those from `width` on are padding."""

    start: int
    size: int
    width: int

    @property
    def columns(self) -> str:
        return f"c_{self.start}_{self.start + self.size}"

    @property
    def padding(self) -> str:
        """The condition of a load or a store: empty if no column is padding."""
        return f"({self.columns} < {self.width})" if self.start + self.size > self.width else ""


class Part(NamedTuple):
    """A tensor read row by row: q and k for the first part of the keys, qr and kr for the second, v for values."""

    tensor: str
    short: str
    width: int

    @property
    def chunks(self) -> list[tuple[str, Chunk]]:
        return [(f"{self.short}{n}", chunk) for n, chunk in enumerate(chunks(self.width))]


def chunks(width: int) -> list[Chunk]:
    """The powers of two that add up to a width, from 16 up: 576 = 512 + 64, 80 = 64 + 16, 40 = 32 + 16 padded."""
    found: list[Chunk] = []
    start = 0
    while start < width:
        rest = width - start
        size = 1 << (rest.bit_length() - 1)
        if rest < 16:
            size = 16  # the narrowest operand of a tensor core
        found.append(Chunk(start, size, width))
        start += size
    return found


def source_of(spec: KernelSpec) -> str:
    """The module of a specification. Its text is its identity: the same specification prints the same."""
    lines = [f'"""{spec.name}, printed by torch-latent."""', "", "import triton", "import triton.language as tl", ""]
    for kind in ("attend", "split", "combine"):
        lines += ["", *kernel_lines(spec, kind), ""]
    if spec.capped:
        lines += ["", *TANH, ""]
    return "\n".join(lines).rstrip() + "\n"


def tensors(spec: KernelSpec, kind: Kind) -> list[str]:
    """The names of a kernel's tensors, those it writes last."""
    sinks = ["sinks"] if spec.sinks else []
    if kind == "combine":
        return ["partial", "maxima", "sums", *sinks, "out"]
    read = [part.tensor for part in (*query_parts(spec), *key_parts(spec), *value_parts(spec))]
    read += [] if spec.mask == "none" else ["mask"]
    return [*read, *sinks, "out"] if kind == "attend" else [*read, "partial", "maxima", "sums"]


def scalars(spec: KernelSpec, kind: Kind) -> list[str]:
    """The names of a kernel's numbers. Strides are named for tensor and dimension: key_b, key_h, key_t."""
    if kind == "combine":
        return ["S", "H", "splits"]
    numbers = ["scale", *["cap"] * spec.capped]
    numbers += [f"{part.tensor}_{dim}" for part in query_parts(spec) for dim in "bhs"]
    numbers += [f"{part.tensor}_{dim}" for part in (*key_parts(spec), *value_parts(spec)) for dim in "bht"]
    numbers += [f"mask_{dim}" for dim in "bhst"] if spec.mask != "none" else []
    return [*numbers, "K", "G", "S", "T", "after", "upto", *["splits"] * (kind == "split")]


def blocks(kind: Kind) -> list[str]:
    """The names of the tile sizes, fixed at launch."""
    return ["BLOCK_P", "BLOCK_E"] if kind == "combine" else ["BLOCK_M", "BLOCK_N"]


def query_parts(spec: KernelSpec) -> list[Part]:
    rope = [Part("query_rope", "qr", spec.rope_width)] if spec.rope_width else []
    return [Part("query", "q", spec.width), *rope]


def key_parts(spec: KernelSpec) -> list[Part]:
    rope = [Part("key_rope", "kr", spec.rope_width)] if spec.rope_width else []
    return [Part("key", "k", spec.width), *rope]


def value_parts(spec: KernelSpec) -> list[Part]:
    return [] if spec.value_width is None else [Part("value", "v", spec.value_width)]


def value_chunks(spec: KernelSpec) -> list[tuple[str, Chunk]]:
    """What the weights multiply: the chunks of the values, or those of the first part of the keys, already there."""
    return [pair for part in value_parts(spec) or key_parts(spec)[:1] for pair in part.chunks]


def kernel_lines(spec: KernelSpec, kind: Kind) -> list[str]:
    groups = (tensors(spec, kind), scalars(spec, kind), [f"{name}: tl.constexpr" for name in blocks(kind)])
    names = [line for group in groups for line in wrapped(group)]
    body = combine_lines(spec) if kind == "combine" else attention_lines(spec, kind)
    return ["@triton.jit", f"def {kind}(", *indented(names), "):", *indented(body)]


def attention_lines(spec: KernelSpec, kind: Kind) -> Iterator[str]:
    """`attend` and `split`: the same rows and the same loop, other bounds and another end."""
    yield from row_lines()
    yield from bound_lines(kind)
    yield from query_lines(spec)
    yield ""
    yield f"m = tl.full([BLOCK_M], {LEAST}, tl.float32)"
    yield "l = tl.zeros([BLOCK_M], tl.float32)"
    for n, (_, chunk) in enumerate(value_chunks(spec)):
        yield f"acc{n} = tl.zeros([BLOCK_M, {chunk.size}], tl.float32)"
    yield "for n in range(lo, hi, BLOCK_N):"
    yield from indented(block_lines(spec))
    yield ""
    yield from attend_end(spec) if kind == "attend" else split_end(spec)


def row_lines() -> Iterator[str]:
    yield "# rows (token i, head h), h = kh * G + g; the last rows come first: under a causal mask they are the longest"
    yield "tiles = tl.cdiv(S * G, BLOCK_M)"
    yield "bk = tl.program_id(0) // tiles"
    yield "tile = tiles - 1 - tl.program_id(0) % tiles"
    yield "b = tl.cast(bk // K, tl.int64)"
    yield "kh = tl.cast(bk % K, tl.int64)"
    yield "row = tile * BLOCK_M + tl.arange(0, BLOCK_M)"
    yield "live = row < S * G"
    yield "i = row // G"
    yield "h = kh * G + row % G"
    yield ""


def bound_lines(kind: Kind) -> Iterator[str]:
    yield "# a row sees the keys begin <= j < end, the tile those from lo to hi"
    yield "begin = i + after + 1"
    yield "end = tl.where(live, tl.minimum(i + upto + 1, T), 0)"
    yield "first = tile * BLOCK_M // G"
    yield "last = (tl.minimum((tile + 1) * BLOCK_M, S * G) - 1) // G"
    yield "lo = tl.maximum(first + after + 1, 0) // BLOCK_N * BLOCK_N"
    yield "hi = tl.minimum(last + upto + 1, T)"
    if kind == "split":
        yield "share = tl.cdiv(tl.maximum(hi - lo, 0), splits * BLOCK_N) * BLOCK_N"
        yield "p = tl.program_id(1)"
        yield "lo += p * share"
        yield "hi = tl.minimum(hi, lo + share)  # whole blocks, so none reaches into the next share"
    yield ""


def query_lines(spec: KernelSpec) -> Iterator[str]:
    yield "scale = tl.cast(scale, tl.float32)"
    if spec.capped:
        yield "cap = tl.cast(cap, tl.float32)"
    yield "t = tl.arange(0, BLOCK_N)"
    parts = [*query_parts(spec), *value_parts(spec)]
    for chunk in sorted({chunk for part in parts for _, chunk in part.chunks}):
        yield f"{chunk.columns} = {f'{chunk.start} + ' if chunk.start else ''}tl.arange(0, {chunk.size})"
    for part in query_parts(spec):
        name = part.tensor
        yield f"{name} += b * {name}_b + h * {name}_h + i * tl.cast({name}_s, tl.int64)"
        for short, chunk in part.chunks:
            yield f"{short} = {loaded(f'{name}[:, None]', chunk, 'live[:, None]')}"
    for part in (*key_parts(spec), *value_parts(spec)):
        yield f"{part.tensor} += b * {part.tensor}_b + kh * {part.tensor}_h"
    if spec.mask != "none":
        yield "mask += b * mask_b + h * mask_h + i * tl.cast(mask_s, tl.int64)"


def block_lines(spec: KernelSpec) -> Iterator[str]:
    """One block of keys: scores, the running maximum and sum of each row, the weighted values."""
    yield "j = n + t"
    yield "block = tl.cast(n, tl.int64)"
    yield "near = tl.minimum(t, hi - 1 - n)  # past the last key that key is read again, for a weight of 0"
    for part in (*key_parts(spec), *value_parts(spec)):
        name = part.tensor
        yield f"{name}_rows = {name} + block * {name}_t + near[:, None] * {name}_t"
        for short, chunk in part.chunks:
            yield f"{short} = {loaded(f'{name}_rows', chunk)}"
    so_far = ""
    for query, key in zip(query_parts(spec), key_parts(spec), strict=True):
        for (q, _), (k, _) in zip(query.chunks, key.chunks, strict=True):
            yield f's = tl.dot({q}, tl.trans({k}){so_far}, input_precision="ieee")'
            so_far = ", s"
    yield "s = tanh(s * scale) * cap" if spec.capped else "s *= scale"
    yield "visible = (j[None, :] >= begin[:, None]) & (j[None, :] < end[:, None])"
    if spec.mask != "none":
        yield "mask_rows = mask[:, None] + block * mask_t + t[None, :] * mask_t"
    if spec.mask == "bool":
        yield "visible &= tl.load(mask_rows, mask=visible, other=0) != 0"
    elif spec.mask == "additive":
        yield 'bias = tl.load(mask_rows, mask=visible, other=float("-inf")).to(tl.float32)'
        yield 'visible &= bias > float("-inf")'
        yield "# the least number of a dtype is finite in base e; in base 2 it has to be made so"
        yield f"s += tl.maximum(bias * {LOG2E}, {LEAST})"
    yield 's = tl.where(visible, s, float("-inf"))'
    yield "m_new = tl.maximum(m, tl.max(s, 1))"
    yield "alpha = tl.exp2(m - m_new)"
    yield "w = tl.exp2(s - m_new[:, None])"
    yield "l = l * alpha + tl.sum(w, 1)"
    yield "m = m_new"
    for n, (value, _) in enumerate(value_chunks(spec)):
        yield f'acc{n} = tl.dot(w.to({value}.dtype), {value}, acc{n} * alpha[:, None], input_precision="ieee")'


def attend_end(spec: KernelSpec) -> Iterator[str]:
    if spec.sinks:
        yield f"sink = tl.load(sinks + h, mask=live, other=0.0).to(tl.float32) * {LOG2E}"
        yield "m_new = tl.maximum(m, sink)"
        yield "alpha = tl.exp2(m - m_new)"
        yield "l = l * alpha + tl.exp2(sink - m_new)"
    yield f"out += ((tl.cast(bk, tl.int64) * G + row % G) * S + i) * {spec.out_width + spec.totals}"
    if spec.totals:
        yield f"tl.store(out + {spec.out_width}, {_log_of_total('m_new' if spec.sinks else 'm')}, mask=live)"
    yield "l = tl.where(l > 0.0, l, 1.0)"
    yield f"share = {'alpha' if spec.sinks else '1.0'} / l"
    for n, (_, chunk) in enumerate(value_chunks(spec)):
        yield stored("out[:, None]", chunk, f"(acc{n} * share[:, None]).to(out.dtype.element_ty)")


def _log_of_total(top: str) -> str:
    return f'tl.where(l > 0.0, ({top} + tl.log2(l)) * {1 / LOG2E}, float("-inf"))'


def split_end(spec: KernelSpec) -> Iterator[str]:
    yield "at = ((tl.cast(bk, tl.int64) * G + row % G) * S + i) * splits + p"
    yield "tl.store(maxima + at, m, mask=live)"
    yield "tl.store(sums + at, l, mask=live)"
    yield "if lo < hi:"
    for n, (_, chunk) in enumerate(value_chunks(spec)):
        yield "    " + stored(f"partial + at[:, None] * {spec.out_width}", chunk, f"acc{n}")


def combine_lines(spec: KernelSpec) -> Iterator[str]:
    width = spec.out_width
    yield "row = tl.cast(tl.program_id(0), tl.int64)"
    yield "c = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)"
    if spec.sinks:
        yield f"m = tl.maximum(tl.load(sinks + row // S % H).to(tl.float32) * {LOG2E}, {LEAST})"
        yield "l = tl.full([], 1.0, tl.float32)"
    else:
        yield f"m = tl.full([], {LEAST}, tl.float32)"
        yield "l = tl.full([], 0.0, tl.float32)"
    yield "acc = tl.zeros([BLOCK_E], tl.float32)"
    yield "for p0 in range(0, splits, BLOCK_P):"
    yield "    p = p0 + tl.arange(0, BLOCK_P)"
    yield "    at = row * splits + p"
    yield f"    m_p = tl.load(maxima + at, mask=p < splits, other={LEAST})"
    yield "    l_p = tl.load(sums + at, mask=p < splits, other=0.0)"
    yield "    seen = l_p > 0.0"
    at = f"partial + at[:, None] * {width} + c[None, :]"
    yield f"    acc_p = tl.load({at}, mask=seen[:, None] & (c < {width})[None, :], other=0.0)"
    yield "    m_new = tl.maximum(m, tl.max(m_p, 0))"
    yield "    w = tl.exp2(m_p - m_new)"
    yield "    alpha = tl.exp2(m - m_new)"
    yield "    l = l * alpha + tl.sum(w * l_p, 0)"
    yield "    acc = acc * alpha + tl.sum(w[:, None] * acc_p, 0)"
    yield "    m = m_new"
    if spec.totals:
        at = f"out + row * {width + 1} + {width}"
        yield f"tl.store({at}, {_log_of_total('m')}, mask=tl.program_id(1) == 0)"
    yield "l = tl.where(l > 0.0, l, 1.0)"
    yield f"tl.store(out + row * {width + spec.totals} + c, (acc / l).to(out.dtype.element_ty), mask=c < {width})"


TANH = (
    "@triton.jit",
    "def tanh(x):",
    "    # a polynomial near 0, where 1 - 2 / (e^2x + 1) cancels (the coefficients of Cephes)",
    "    y = x * x",
    "    p = ((-5.70498872745e-3 * y + 2.06390887954e-2) * y - 5.37397155531e-2) * y + 1.33314422036e-1",
    "    near = x + x * y * (p * y - 3.33332819422e-1)",
    f"    far = 1.0 - 2.0 / (tl.exp2(x * {2 * LOG2E}) + 1.0)",
    "    return tl.where(y < 0.390625, near, far)",
)


def loaded(rows: str, chunk: Chunk, *conditions: str) -> str:
    conditions += (f"{chunk.padding}[None, :]",) if chunk.padding else ()
    mask = f", mask={' & '.join(conditions)}, other=0.0" if conditions else ""
    return f"tl.load({rows} + {chunk.columns}[None, :]{mask})"


def stored(rows: str, chunk: Chunk, what: str) -> str:
    padding = f" & {chunk.padding}[None, :]" if chunk.padding else ""
    return f"tl.store({rows} + {chunk.columns}[None, :], {what}, mask=live[:, None]{padding})"


def indented(lines: Iterable[str]) -> Iterator[str]:
    return (f"    {line}" if line else "" for line in lines)


def wrapped(names: list[str], width: int = 100) -> Iterator[str]:
    """A list of names with commas, as many on a line as fit."""
    line = ""
    for name in names:
        if len(line) + len(name) > width:
            yield line.rstrip()
            line = ""
        line += f"{name}, "
    yield line.rstrip()
