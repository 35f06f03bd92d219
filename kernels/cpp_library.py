"""Builds the C++ of a KernelSpec into a library and calls it: compiler, instruction set, arguments."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..rewriter.compat import tiles_permitted
from . import store
from .cpp_source import ISAS, Isa, source
from .spec import Call, KernelSpec, digest

FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-strict-aliasing", "-Wno-psabi", "-Wno-ignored-attributes"),
)


def compiler() -> str | None:
    """The path of a C++ compiler: $CXX, g++, c++ or clang++, whichever is found first.

    clang++ comes last: it brings an OpenMP runtime of its own beside that of torch.
    """
    names = (os.environ.get("CXX"), "g++", "c++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def isa() -> Isa:
    """The best instruction set of this CPU, or the one that LATENT_ISA names if the CPU has it."""
    capabilities = torch.cpu.get_capabilities()
    possible = [
        level
        for level in ISAS
        if all(capabilities.get(need, False) for need in level.needs) and (not level.tiles or tiles_permitted())
    ]
    wanted = os.environ.get("LATENT_ISA")
    if not wanted:
        return possible[0]
    for level in possible:
        if level.name == wanted:
            return level
    raise RuntimeError(f"LATENT_ISA={wanted} is none of {', '.join(level.name for level in possible)} of this CPU")


def build(spec: KernelSpec, level: Isa | None = None) -> tuple[str, Callable[[Call], Tensor]]:
    """The source of a specification, for this CPU if no level is given, and the kernel built from it."""
    text = source(spec, level or isa())
    return text, kernel(spec, library(text, (level or isa()).flags))


def library(text: str, flags: tuple[str, ...]) -> Path:
    """A shared library built from a source, kept by the digest of source, flags and compiler."""
    path = compiler()
    if path is None:
        raise RuntimeError("no C++ compiler ($CXX, g++, c++ or clang++), which generated CPU kernels are built with")
    key = digest("\n".join((text, *FLAGS, *flags, _version(path))))
    built = store.folder("cpp") / f"{key}.so"
    if built.exists():
        return built
    written = built.with_suffix(".cpp")
    store.write(written, text)
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
        made = Path(scratch) / built.name
        command = [path, *FLAGS, *flags, str(written), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[:2000]}")
        made.replace(built)
    return built


@functools.cache
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


_ARGUMENTS = struct.Struct("=37q2d")
"""struct Arguments of kernels/cpp/call.h."""

_NONE = (None, (0, 0, 0))


def kernel(spec: KernelSpec, path: Path) -> Callable[[Call], Tensor]:
    """The function of a library as a function of calls."""
    function = ctypes.CDLL(str(path)).latent_attention
    function.argtypes = [ctypes.c_char_p]
    function.restype = None
    mask_dtype = spec.mask_dtype if spec.mask_dtype in (torch.bfloat16, torch.float16) else torch.float32
    out_width, out_dtype = spec.out_width + spec.totals, torch.float32 if spec.totals else spec.dtype

    def run(call: Call) -> Tensor:
        q, qr, k, kr, v, mask, sinks, scale, cap, causal, window, offset, _, used = call
        (q, q_strides), (k, k_strides) = _rows(q), _rows(k)
        qr, qr_strides = _rows(qr) if qr is not None else _NONE
        kr, kr_strides = _rows(kr) if kr is not None else _NONE
        v, v_strides = _rows(v) if v is not None else _NONE
        B, H, S, _ = q.shape
        _, K, T, _ = k.shape
        if mask is not None and mask.dtype is not torch.bool and mask.dtype is not mask_dtype:
            mask = mask.to(mask_dtype)
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        if used is not None:
            used = used.contiguous()
        out = torch.empty((B, H, S, out_width), dtype=out_dtype, device=q.device)
        function(
            _ARGUMENTS.pack(
                q.data_ptr(),
                0 if qr is None else qr.data_ptr(),
                k.data_ptr(),
                0 if kr is None else kr.data_ptr(),
                0 if v is None else v.data_ptr(),
                0 if mask is None else mask.data_ptr(),
                0 if sinks is None else sinks.data_ptr(),
                0 if used is None else used.data_ptr(),
                out.data_ptr(),
                *(B, K, H // K, S, T),
                *(*q_strides, *qr_strides, *k_strides, *kr_strides, *v_strides),
                *((0, 0, 0, 0) if mask is None else _broadcast_strides(mask)),
                *(causal, window, offset, torch.get_num_threads()),
                *(scale, cap),
            )
        )
        return out

    return run


def _broadcast_strides(mask: Tensor) -> list[int]:
    return [0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride(), strict=True)]


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The last dimension contiguous, as the kernels need it, and the strides of the others."""
    strides = x.stride()
    if strides[-1] != 1:
        x = x.contiguous()
        strides = x.stride()
    return x, strides[:-1]
