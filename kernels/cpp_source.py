"""C++ source of a KernelSpec: its constants, then the parts of kernels/cpp/ that compute with them.

One text serves every instruction set: vectors are a compiler extension whose length is one of the constants.
"""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import NamedTuple

import torch

from .spec import KernelSpec


class Isa(NamedTuple):
    """An instruction set that kernels are generated for."""

    name: str
    lanes: int
    """Floats in a vector."""
    registers: int
    """Vector registers: what the register tiles are made for."""
    bf16_dot: bool = False
    """Products of pairs of bfloat16, by an instruction if the flags have one and by two products otherwise."""
    tiles: bool = False
    """Products of 16 by 16 pairs of bfloat16."""
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    """Names in torch.cpu.get_capabilities()."""


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_AVX512_NEEDS = ("avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")

ISAS = (
    Isa(
        "amx_bf16",
        16,
        32,
        True,
        True,
        (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        (*_AVX512_NEEDS, "avx512_bf16", "amx_tile", "amx_bf16"),
    ),
    Isa("avx512_bf16", 16, 32, True, False, (*_AVX512, "-mavx512bf16"), (*_AVX512_NEEDS, "avx512_bf16")),
    Isa("avx512", 16, 32, False, False, _AVX512, _AVX512_NEEDS),
    Isa("avx2", 8, 16, False, False, _AVX2, ("avx2", "fma3", "f16c")),
    Isa("portable", 4, 16),
)
"""Best first."""

_CONSTANTS = Template("""\
// $name for $isa
//
//   out[b h i] = sum over j of p[b h i j] value[b k j]
//   p = softmax over j of  $scores
//
// B batch, K key heads, H = K · group query heads (group minor), i query tokens, j key tokens. $values

$common
enum class Mask { NONE, BOOL, ADDITIVE };

constexpr int WIDTH = $width;              // of the first part of queries and keys
constexpr int ROPE = $rope;                // of the second part
constexpr int VALUE_WIDTH = $value_width;
constexpr bool VALUES_ARE_KEYS = $latent;  // the first part of the keys
constexpr Mask MASK = Mask::$mask;
using MaskElement = $mask_element;
constexpr float LEAST_BIAS = $least_bias;  // a bias that hides a key from all rows that see another
constexpr bool CAPPED = $capped;
constexpr bool SINKS = $sinks;
constexpr bool TOTALS = $totals;           // the log of the sum of exponentials stands behind the values
using Out = $out;

constexpr int TILE = $tile;         // rows that share a widened block of keys
constexpr int BLOCK = $block;       // keys widened at a time
constexpr int I_OF_ONE = $i_of_one;    // register tile: that many scalars by one vector,
constexpr int I_OF_TWO = $i_of_two;     // or that many by two
constexpr int FEW = LANES / 2;      // up to here rows are not worth lanes
constexpr int FEW_BLOCK = $few_block;      // keys whose values stay in the first cache
constexpr int PREFETCH = 16;        // keys ahead
constexpr int64_t WORTH = 50'000;   // products that a thread is woken for

constexpr int KEY_STEPS = $key_steps;
constexpr int QUERY_STEPS = $query_steps;     // KEY_STEPS in whole tiles
constexpr int STEPS_IN_L1 = $steps_in_l1;     // of a group of queries
constexpr int VALUE_STEPS = BLOCK / STEP;
constexpr int COLUMNS = $columns;        // of a packed row of values
constexpr int OUT_ROWS = $out_rows;       // COLUMNS in whole register tiles
constexpr int OUT_STRIDE = $out_stride;
constexpr int KEY_STRIDE = $key_stride;     // no multiple of the cache's sets
constexpr int VALUE_STRIDE = $value_stride;
""")

_COMMON = Template("""\
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
$intrinsics
struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

using Element = $element;
constexpr int LANES = $lanes;
constexpr bool BF16_DOT = $bf16_dot;
using Operand = $operand;           // a float, or a pair of bfloat16
constexpr int STEP = $step;              // products in one operand
constexpr float LOG2E = 1.44269504088896341f;
""")

_INTRINSICS = """\
#if defined(__x86_64__)
#include <immintrin.h>
#define INTRINSICS
#endif
"""

_PARTS = ("vectors.h", "call.h", "many_rows.h", "by_vectors.h", "few_rows.h", "entry.h")


def source(spec: KernelSpec, isa: Isa) -> str:
    """The whole text. Equal specifications and instruction sets have equal texts."""
    names = ["by_tiles.h" if name == "by_vectors.h" and _by_tiles(spec, isa) else name for name in _PARTS]
    return "\n".join((_CONSTANTS.substitute(_constants(spec, isa)), *map(part, names)))


def common(dtype: torch.dtype, isa: Isa, dot: bool, halves: bool) -> str:
    """What every kernel starts with: elements of a dtype, vectors of an instruction set.

    With `dot` pairs of bfloat16 are multiplied as pairs; `halves`: float16 is read.
    """
    return _COMMON.substitute(
        intrinsics=_INTRINSICS if dot or halves else "",
        element=_ELEMENT[dtype],
        lanes=isa.lanes,
        bf16_dot=_bool(dot),
        operand="uint32_t" if dot else "float",
        step=2 if dot else 1,
    )


def part(name: str) -> str:
    """A file of kernels/cpp/."""
    return (Path(__file__).parent / "cpp" / name).read_text("utf-8")


def _by_dots(spec: KernelSpec, isa: Isa) -> bool:
    return isa.bf16_dot and spec.dtype == torch.bfloat16 and spec.width % 2 == 0 and spec.rope_width % 2 == 0


def _by_tiles(spec: KernelSpec, isa: Isa) -> bool:
    return isa.tiles and _by_dots(spec, isa)


def _constants(spec: KernelSpec, isa: Isa) -> dict[str, object]:
    widths = spec.width + spec.rope_width
    dot, tiles = _by_dots(spec, isa), _by_tiles(spec, isa)
    latent = spec.value_width is None
    steps = widths // 2 if dot else widths
    i_of_one, i_of_two = (16, 12) if isa.registers >= 32 else (12, 6)
    columns = _up(spec.out_width, 2 * isa.lanes) if dot else spec.out_width
    if tiles:
        query_steps, out_rows = _up(steps, 16), columns
        tile, block = 128, 128
    else:
        query_steps, out_rows = steps, max(_up(columns, i) for i in (i_of_one, i_of_two))
        tile, block = (32, 48) if widths >= 256 else (64, 96)
    key_stride = _up(max(query_steps, out_rows if latent and not dot else 0), 16) + 16
    product = "q·k + q_rope·k_rope" if spec.rope_width else "q·k"
    scores = f"scale · ({product})"
    if spec.capped:
        scores = f"cap · tanh({scores} / cap)"
    if spec.mask == "additive":
        scores += " + mask"
    return {
        "name": spec.name,
        "common": common(spec.dtype, isa, dot, torch.float16 in (spec.dtype, spec.mask_dtype)),
        "isa": " ".join((isa.name, *isa.flags)),
        "scores": f"visible({scores})" + ", and of the sink of the head" * spec.sinks,
        "values": "Values are the first part of the keys." if latent else "",
        "width": spec.width,
        "rope": spec.rope_width,
        "value_width": spec.out_width,
        "latent": _bool(latent),
        "mask": spec.mask.upper(),
        "mask_element": "uint8_t" if spec.mask != "additive" else _ELEMENT.get(spec.mask_dtype, "float"),
        "least_bias": "-65504.f" if spec.mask_dtype == torch.float16 else "-1e30f",
        "capped": _bool(spec.capped),
        "sinks": _bool(spec.sinks),
        "totals": _bool(spec.totals),
        "out": "float" if spec.totals else _ELEMENT[spec.dtype],
        "tile": tile,
        "block": block,
        "few_block": min(192, max(48, _up(24_000 // (spec.out_width * spec.dtype.itemsize), 16))),
        "i_of_one": i_of_one,
        "i_of_two": i_of_two,
        "key_steps": steps,
        "query_steps": query_steps,
        "steps_in_l1": -(-steps // -(-steps // 256)),
        "columns": columns,
        "out_rows": out_rows,
        "out_stride": _up(spec.out_width, isa.lanes),
        "key_stride": key_stride,
        "value_stride": key_stride if latent and not dot else _up(out_rows, 16) + 16,
    }


_ELEMENT: dict[torch.dtype | None, str] = {torch.float32: "float", torch.bfloat16: "Bf16", torch.float16: "Half"}


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _bool(value: bool) -> str:
    return "true" if value else "false"
