"""What a kernel takes of a GPU, read from the binary that Triton compiles for it: no GPU is needed.

Registers and spills decide whether the chosen tile runs at all well; the 16-byte asynchronous copies tell whether
keys stream past the registers; the programs per processor bound how much memory latency is hidden.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .spec import Call, KernelSpec
from .triton_library import Launch, Target, launches, load, splits_for, tile_for
from .triton_source import blocks, source_of

TARGETS = {"sm_80": Target("cuda", 80, 108), "sm_90": Target("cuda", 90, 132), "gfx942": Target("hip", "gfx942", 304)}

SHARED = {80: (164, 163), 90: (228, 227), "gfx942": (64, 64)}
"""KiB of shared memory of a processor, and the most that one program can have."""

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
}


class Usage(NamedTuple):
    """Counts are of instructions in the binary, not of those executed."""

    kernel: str
    target: str
    registers: int
    spilled: int
    """Bytes of stack or scratch, and registers kept there."""

    shared: int
    matrix: int
    """Matrix instructions: HMMA, HGMMA or v_mfma."""

    wide_loads: int
    """Loads of 16 bytes: cp.async, on AMD dwordx4."""

    narrow_async: int
    resident: int
    """Programs per processor; on AMD waves per SIMD."""

    fits: bool


def usage(spec: KernelSpec, call: Call, target: str, splits: int | None = None) -> list[Usage]:
    """The usage of every kernel that a call launches on a target; the tensors of the call may be on device meta."""
    machine = TARGETS[target]
    tile = tile_for(spec, call, machine)
    _, plan = launches(spec, call, machine, tile, splits or splits_for(spec, call, machine, tile))
    module = load(spec, source_of(spec))
    return [_usage(launch, compiled(module, launch, machine), target) for launch in plan]


def compiled(module: ModuleType, launch: Launch, target: Target) -> Any:
    """The kernel of a launch compiled as the runtime would: numbers 1 are constants, those divisible by 16 known."""
    compiler: Any = importlib.import_module("triton.compiler")
    backend: Any = importlib.import_module("triton.backends.compiler")
    kernel = getattr(module, launch.kind)
    signature: dict[str, str] = {}
    constants: dict[str, int] = {}
    divisible: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif name in blocks(launch.kind) or value == 1:
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (signature[name][0] == "i" and value % 16 == 0):
            divisible[(position,)] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    gpu = backend.GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    return compiler.compile(source, target=gpu, options=launch.options)


def _usage(launch: Launch, binary: Any, target: str) -> Usage:
    machine = TARGETS[target]
    read = _amd if machine.backend == "hip" else _nvidia
    return read(launch.kind, target, binary, launch.options["num_warps"])


def _nvidia(kind: str, target: str, binary: Any, warps: int) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        used = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", file.name))
        assembly = _tool("nvdisasm", "-c", file.name)
    assert used is not None
    registers, stack = int(used[1]), int(used[2])
    shared = int(binary.metadata.shared)
    processor, program = (1024 * kib for kib in SHARED[TARGETS[target].arch])
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    copies = re.findall(r"\bLDGSTS[A-Z0-9_.]*", assembly)
    wide = sum(".128" in copy for copy in copies)
    return Usage(
        kind,
        target,
        registers,
        stack,
        shared,
        len(re.findall(r"\bHG?MMA\.", assembly)),
        wide,
        len(copies) - wide,
        min(by_registers, processor // (shared + 1024), 64 // warps),
        shared <= program,
    )


def _amd(kind: str, target: str, binary: Any, warps: int) -> Usage:
    assembly = binary.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None
        return int(found[1])

    registers, shared = field("vgpr_count"), int(binary.metadata.shared)
    return Usage(
        kind,
        target,
        registers,
        field("vgpr_spill_count") + field("private_segment_fixed_size"),
        shared,
        assembly.count("v_mfma_"),
        assembly.count("_load_dwordx4"),
        0,
        min(8, 512 // (-(-registers // 8) * 8)),
        shared <= 1024 * SHARED["gfx942"][1],
    )


def _tool(name: str, *arguments: str) -> str:
    triton = importlib.import_module("triton")
    assert triton.__file__ is not None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def example_call(
    spec: KernelSpec, *, batch: int = 1, heads: int, key_heads: int, queries: int = 1, tokens: int = 4096
) -> Call:
    """A call without data (device meta): contiguous tensors, the two parts of a latent in one row, a padding mask."""
    B, H, K, S, T, R = batch, heads, key_heads, queries, tokens, spec.rope_width

    def tensor(*shape: int, dtype: torch.dtype = spec.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    joint = tensor(B, K, T, spec.width + R)
    mask_dtype = torch.bool if spec.mask_dtype is None else spec.mask_dtype
    return Call(
        tensor(B, H, S, spec.width),
        tensor(B, H, S, R) if R else None,
        joint[..., : spec.width],
        joint[..., spec.width :] if R else None,
        None if spec.value_width is None else tensor(B, K, T, spec.value_width),
        None if spec.mask == "none" else tensor(B, 1, S, T, dtype=mask_dtype),
        tensor(H, dtype=torch.float32) if spec.sinks else None,
        (spec.width + R) ** -0.5,
        50.0 if spec.capped else 0.0,
        queries > 1,
        0,
        T - S,
    )
