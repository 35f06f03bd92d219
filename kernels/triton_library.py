"""Builds and launches the Triton kernels of a specification.

The printed source is a file in the cache, so that it can be read and debugged. A launch is planned from shapes alone
(`launches`), which lets the same plan run, be interpreted on a CPU, or be compiled ahead of time for another machine.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .spec import Call, KernelSpec, digest, of_used
from .store import folder, write
from .triton_source import LOG2E, Kind, blocks, scalars, source_of, tensors


class Target(NamedTuple):
    """What the choice of tiles depends on."""

    backend: Literal["cuda", "hip"]
    arch: int | str
    """As Triton spells it: 80, 90, "gfx942"."""

    processors: int


class Tile(NamedTuple):
    """The rows and keys of one program, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int
    """The programs that fit a processor by registers and shared memory, at the least."""


TILES = {
    ("cuda", 2): (
        (Tile(16, 64, 4, 2, 4), Tile(64, 64, 4, 2, 2)),
        (Tile(16, 64, 4, 2, 3), Tile(64, 64, 8, 2, 1)),
        (Tile(16, 32, 4, 2, 2), Tile(32, 32, 8, 2, 1)),
    ),
    ("cuda", 4): (
        (Tile(16, 32, 8, 1, 3), Tile(16, 32, 8, 1, 3)),
        (Tile(16, 16, 4, 1, 2), Tile(16, 16, 4, 1, 2)),
        (Tile(16, 16, 8, 1, 1), Tile(16, 16, 8, 1, 1)),
    ),
    ("hip", 2): (
        (Tile(16, 32, 4, 1, 2), Tile(64, 32, 4, 1, 2)),
        (Tile(16, 32, 4, 1, 2), Tile(64, 32, 8, 1, 1)),
        (Tile(16, 16, 4, 1, 2), Tile(32, 16, 4, 1, 2)),
    ),
    ("hip", 4): (
        (Tile(16, 32, 4, 1, 2), Tile(32, 32, 4, 1, 2)),
        (Tile(16, 16, 4, 1, 1), Tile(16, 16, 4, 1, 1)),
        (Tile(16, 16, 4, 1, 1), Tile(16, 16, 4, 1, 1)),
    ),
}
"""By backend and bytes of an element: narrow, medium and wide keys, each for few and for many rows.

Found by compiling ahead of time (triton_report). On AMD a second stage multiplies the reads of shared memory by ten.
"""


class Launch(NamedTuple):
    kind: Kind
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """Every argument by name: torch takes a kernel with an argument left out to write everything it is given."""

    options: dict[str, Any]


def build(spec: KernelSpec) -> tuple[str, Callable[[Call], Tensor]]:
    """The source of a specification and what runs it."""
    source = source_of(spec)
    module = load(spec, source)

    def kernel(call: Call) -> Tensor:
        target = target_of(call.query.device)
        tile = tile_for(spec, call, target)
        out, plan = launches(spec, call, target, tile, splits_for(spec, call, target, tile))
        if call.query.device.type == "cuda":
            with torch.cuda.device(call.query.device):
                run(module, plan)
        else:
            run(module, plan)
        return of_used(out, call.used)

    return source, kernel


def load(spec: KernelSpec, source: str) -> ModuleType:
    """Import a source from the file in the cache that its content names."""
    path = folder("triton") / f"{spec.name}_{digest(source)}.py"
    name = f"latent_generated_{path.stem}"
    if name not in sys.modules:
        if not path.exists():
            write(path, source)
        found = importlib.util.spec_from_file_location(name, path)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def run(module: ModuleType, plan: list[Launch]) -> None:
    for launch in plan:
        getattr(module, launch.kind)[launch.grid](**launch.arguments, **launch.options)


@functools.cache
def target_of(device: torch.device) -> Target:
    """The processor behind a device. A CPU stands for a small sm_80: Triton's interpreter runs there."""
    if device.type == "cpu":
        return Target("cuda", 80, 8)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target("cuda", properties.major * 10 + properties.minor, properties.multi_processor_count)


def tile_for(spec: KernelSpec, call: Call, target: Target) -> Tile:
    """A tile for one or for several groups of 16 rows, by what a key and a row of sums take."""
    small, medium, wide = TILES[target.backend, spec.dtype.itemsize]
    columns = key_columns(spec)
    few, many = small if columns <= 256 and spec.out_width <= 128 else medium if columns <= 320 else wide
    return few if call.query.shape[2] * (call.query.shape[1] // call.key.shape[1]) <= 16 else many


def key_columns(spec: KernelSpec) -> int:
    """What is read for one key: both its parts and its value."""
    return spec.width + spec.rope_width + (spec.value_width or 0)


def splits_for(spec: KernelSpec, call: Call, target: Target, tile: Tile) -> int:
    """In how many shares the keys of a tile of rows are given to different programs: min(to fill, by length).

    To fill the machine: one program for every place that no tile of rows takes. By length: a share writes and reads
    8 E bytes for each row, which stay in the second level cache; up to 30 % of the traffic of its keys, they are cheap.
    """
    B, H, S, _ = call.query.shape
    K, T = call.key.shape[1], call.key.shape[2]
    rows = S * (H // K)
    seen = min(T, S + call.offset) if call.causal else T
    if call.window > 0:
        seen = min(seen, call.window + S)
    to_fill = -(-target.processors * tile.resident // (B * K * -(-rows // tile.rows)))
    least = max(tile.keys, 8 * min(rows, tile.rows) * spec.out_width / (0.3 * key_columns(spec) * spec.dtype.itemsize))
    return max(1, min(to_fill, int(seen / least), 256))


def launches(spec: KernelSpec, call: Call, target: Target, tile: Tile, splits: int) -> tuple[Tensor, list[Launch]]:
    """The result, still to be written, and the launches that write it: `attend`, or `split` and `combine`."""
    B, H, S, _ = call.query.shape
    K, T = call.key.shape[1], call.key.shape[2]
    E = spec.out_width
    out = call.query.new_empty((B, H, S, E + spec.totals), dtype=torch.float32 if spec.totals else spec.dtype)
    values: dict[str, Any] = {"out": out, "sinks": call.sinks, "splits": splits}
    values |= {"K": K, "G": H // K, "S": S, "T": T, "H": H}
    values |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_P": 16, "BLOCK_E": min(128, next_power(E))}
    # key j is visible to query i if i + after < j <= i + upto; numbers beyond any index stand for no bound
    upto = max(-S, min(call.offset, T)) if call.causal else T
    after = max(-S - T, min(call.offset - call.window, T)) if call.window > 0 else -S - T
    values |= {"after": after, "upto": upto}
    scale, cap = call.scale * LOG2E, call.cap * LOG2E
    values |= {"scale": call.scale / call.cap if spec.capped else scale, "cap": cap}
    for name in ("query", "query_rope", "key", "key_rope", "value"):
        tensor: Tensor | None = getattr(call, name)
        if tensor is not None:
            token = "s" if name.startswith("query") else "t"
            values[name] = tensor
            values |= dict(zip((f"{name}_b", f"{name}_h", f"{name}_{token}"), tensor.stride(), strict=False))
    if call.mask is not None:
        values["mask"] = call.mask
        values |= dict(
            zip(("mask_b", "mask_h", "mask_s", "mask_t"), call.mask.expand(B, H, S, T).stride(), strict=True)
        )

    def launch(kind: Kind, grid: tuple[int, ...], options: dict[str, Any]) -> Launch:
        names = [*tensors(spec, kind), *scalars(spec, kind), *blocks(kind)]
        return Launch(kind, grid, {name: values[name] for name in names}, options)

    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if target.backend == "hip":
        options |= {"waves_per_eu": 1, "matrix_instr_nonkdim": 16}
    programs = B * K * -(-S * (H // K) // tile.rows)
    if splits == 1:
        return out, [launch("attend", (programs,), options)]
    values["partial"] = out.new_empty((B * H * S, splits, E), dtype=torch.float32)
    values["maxima"], values["sums"] = out.new_empty((2, B * H * S, splits), dtype=torch.float32)
    combined = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    pieces = -(-E // values["BLOCK_E"])
    return out, [
        launch("split", (programs, splits), options),
        launch("combine", (B * H * S, pieces), combined),
    ]


def next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()
