"""Builds the C++ of a GemvSpec and calls it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cpp_library import isa, library
from .cpp_source import Isa, common, part

MOST_ROWS = 4


class GemvSpec(NamedTuple):
    """What is fixed when a kernel is generated. Numbers of matrices, inputs and outputs, and strides are arguments."""

    dtype: torch.dtype
    """Of rows, matrices, biases and results: float32, bfloat16 or float16. Sums are float32."""

    rows: int
    """1 to MOST_ROWS."""

    by_columns: bool
    """Whether the outputs of one input lie side by side in a matrix, instead of the inputs of one output."""

    skips: bool = False
    """Whether heads that are not used are left out."""

    @property
    def name(self) -> str:
        """Legible and unique: gemv_bf16_1, gemv_f32_4_by_columns_of_used."""
        short = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
        return f"gemv_{short}_{self.rows}" + "_by_columns" * self.by_columns + "_of_used" * self.skips


class Products(NamedTuple):
    """One call: rows [..., K] times weights [N, K] each, or rows [H, M, K] times one weight [H, N, K]; biases [N].

    With `used` [heads] lines of a weight [N, K] are those of its heads in turn. What unused heads have is not read and
    taken for 0: the outputs, or where the weight lies by columns the inputs.
    """

    rows: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    used: Tensor | None = None


Kernel = Callable[[Products], list[Tensor]]


def source(spec: GemvSpec, level: Isa) -> str:
    """The whole text. Equal specifications and instruction sets have equal texts."""
    dot = level.bf16_dot and spec.dtype == torch.bfloat16 and not spec.by_columns
    lines = (
        f"// {spec.name} for {' '.join((level.name, *level.flags))}",
        "//",
        "//   out[b m n] = sum over k of rows[b m k] matrix[b n k] + bias[n]",
        "",
        common(spec.dtype, level, dot, spec.dtype == torch.float16),
        f"constexpr int ROWS = {spec.rows};",
        f"constexpr bool BY_COLUMNS = {str(spec.by_columns).lower()};",
        f"constexpr bool SKIPS = {str(spec.skips).lower()};",
        "",
    )
    return "\n".join((*lines, part("vectors.h"), part("gemv.h")))


def build(spec: GemvSpec, level: Isa | None = None) -> tuple[str, Kernel]:
    """The source of a specification, for this CPU if no level is given, and the kernel built from it."""
    level = level or isa()
    text = source(spec, level)
    function = ctypes.CDLL(str(library(text, level.flags))).latent_gemv
    function.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
    function.restype = None
    lines, inner = (-1, -2) if spec.by_columns else (-2, -1)
    pack, count = struct.Struct("=15q").pack, spec.rows

    def run(products: Products) -> list[Tensor]:
        rows, packed, made, kept = products.rows, b"", [], []
        *outer, K = rows.shape
        row_b, row_m = count * K, K
        if not rows.is_contiguous():
            if products.weights[0].ndim == 3 and rows.stride(2) == 1:
                row_b, row_m, _ = rows.stride()
            else:
                rows = rows.contiguous()
        numel, at = rows.numel(), rows.data_ptr()
        used = None if products.used is None else products.used.contiguous()
        skipping = 0 if used is None else used.data_ptr()
        for weight, bias in zip(products.weights, products.biases, strict=True):
            strides = weight.stride()
            if strides[inner] != 1:
                weight = weight.mT.contiguous().mT if spec.by_columns else weight.contiguous()
                strides = weight.stride()
            bias = None if bias is None else bias.contiguous()
            *heads, N, inputs = weight.shape
            H = heads[0] if heads else 1
            if inputs != K or numel != H * count * K:
                raise ValueError(
                    f"rows {tuple(rows.shape)} and a weight {tuple(weight.shape)} do not fit: [.. K], [.. N K]"
                )
            width = 0 if used is None else (K if spec.by_columns else N) // len(used)
            out = torch.empty((*outer, N), dtype=rows.dtype)
            packed += pack(
                *(at, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()),
                *(H, K, N, row_b, row_m, strides[0], strides[lines], count * N, N, skipping, width),
            )
            made.append(out)
            kept.append((weight, bias))
        function(packed, len(made), torch.get_num_threads())
        return made

    return text, run
