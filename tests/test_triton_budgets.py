"""Registers, spills, shared memory and loads of the generated Triton kernels, compiled ahead of time.

Which tile a kernel gets is a promise about these numbers; a change of the source or of Triton may break it.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from benchmarks.triton_budgets import CALLS, usages
from latent.kernels.spec import KernelSpec
from latent.kernels.triton_library import Target, launches, load, splits_for, tile_for
from latent.kernels.triton_report import TARGETS, example_call, usage
from latent.kernels.triton_source import chunks, source_of, tensors

pytest.importorskip("triton")

DECODE = [name for name in CALLS if "prefill" not in name]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_CACHE", str(tmp_path_factory.mktemp("latent")))
        yield


used_on = functools.cache(usages)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_and_everything_fits(target: str) -> None:
    bad = {key: used for key, used in used_on(target).items() if used.spilled or not used.fits}
    assert not bad
    assert {used.kernel for used in used_on(target).values()} == {"attend", "split", "combine"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", DECODE)
def test_decode_keeps_two_programs_on_a_processor_and_streams_its_keys(target: str, name: str) -> None:
    used = used_on(target)[name, "split"]
    wide = name == "latent 512+64, 128 heads"  # 32 rows: the sums of one program are half of the registers
    assert used.resident >= (1 if wide else 2)
    assert used.shared <= 65536 or wide
    assert used.wide_loads > 0 and used.narrow_async == 0 and used.matrix > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_budget_of_the_latent(target: str) -> None:
    for name in ("latent 512+64, 16 heads", "latent 512+64, bool mask", "latent 512+64, additive mask"):
        used = used_on(target)[name, "split"]
        assert used.registers <= 192 and used.shared <= 57344 and used.resident >= 2
        assert used.wide_loads == 36, "the latent is read once, for keys and values"


def test_budget_of_the_latent_on_amd() -> None:
    used = used_on("gfx942")["latent 512+64, 16 heads", "split"]
    assert used.registers <= 256 and used.shared <= 16384 and used.matrix > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_prefill_keeps_two_programs_on_a_processor(target: str) -> None:
    used = used_on(target)["prefill D=128, G=4", "attend"]
    assert used.resident >= 2 and used.wide_loads > 0 and used.narrow_async == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("spec", "heads", "key_heads", "queries"),
    [
        (KernelSpec(torch.float32, 512, 64), 16, 1, 1),
        (KernelSpec(torch.float32, 128, value_width=128), 8, 2, 64),
        (KernelSpec(torch.float16, 256, 64, capped=True, sinks=True), 16, 1, 8),
        (KernelSpec(torch.bfloat16, 192, value_width=128), 16, 16, 512),
        (KernelSpec(torch.bfloat16, 96, value_width=96), 16, 16, 512),
        (KernelSpec(torch.bfloat16, 80, value_width=80), 8, 8, 1),
        (KernelSpec(torch.bfloat16, 256, value_width=256), 8, 4, 512),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_other_widths_and_types(target: str, spec: KernelSpec, heads: int, key_heads: int, queries: int) -> None:
    for used in usage(spec, example_call(spec, heads=heads, key_heads=key_heads, queries=queries), target):
        assert used.fits and used.spilled == 0, used


def test_features_that_are_off_leave_no_trace() -> None:
    plain = source_of(KernelSpec(torch.bfloat16, 128, value_width=128))
    assert not [word for word in ("rope", "mask_", "sink", "cap", "tanh", "bias") if word in plain]
    full = KernelSpec(torch.bfloat16, 128, 64, mask="bool", capped=True, sinks=True)
    assert not [word for word in ("rope", "mask_", "sink", "cap", "tanh") if word not in source_of(full)]


def test_chunks_cover_a_width() -> None:
    for width in range(1, 700):
        found = chunks(width)
        assert all(chunk.size & (chunk.size - 1) == 0 and chunk.size >= 16 for chunk in found)
        assert [chunk.start for chunk in found[1:]] == [chunk.start + chunk.size for chunk in found[:-1]]
        assert 0 <= found[-1].start + found[-1].size - width < 16
    assert [chunk.size for chunk in chunks(576)] == [512, 64]


def test_splits_fill_the_machine_but_never_for_a_few_keys() -> None:
    spec = KernelSpec(torch.bfloat16, 512, 64)
    machine = Target("cuda", 90, 132)

    def splits(tokens: int, batch: int = 1, heads: int = 16, queries: int = 1) -> int:
        call = example_call(spec, batch=batch, heads=heads, key_heads=1, queries=queries, tokens=tokens)
        return splits_for(spec, call, machine, tile_for(spec, call, machine))

    assert splits(128) == 1
    assert splits(4096) == 21
    assert splits(1 << 20) == 256
    assert splits(1 << 20, batch=64) == 5
    assert splits(1 << 20, batch=512) == 1
    assert splits(8192, queries=4096) == 1


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("splits", [1, 4])
def test_a_kernel_writes_what_it_declares(
    mask: Any, splits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch takes a kernel it cannot analyse to write every tensor, and then copies the cache at every call."""
    from torch._higher_order_ops.triton_kernel_wrap import identify_accessed_tensors  # 2.13

    driver = pytest.importorskip("triton").runtime.driver
    monkeypatch.setattr(driver, "_active", NoDriver())
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where an analysis does not say
    spec = KernelSpec(
        torch.bfloat16,
        80,
        32,
        mask=mask,
        mask_dtype=torch.bfloat16 if mask == "additive" else None,
        capped=True,
        sinks=True,
    )
    call = example_call(spec, heads=8, key_heads=2, tokens=256)
    call = type(call)(*(torch.empty_like(x, device="cpu") if isinstance(x, torch.Tensor) else x for x in call))
    machine = TARGETS["sm_90"]
    _, plan = launches(spec, call, machine, tile_for(spec, call, machine), splits)
    module = load(spec, source_of(spec))
    written = {"attend": ["out"], "split": ["partial", "maxima", "sums"], "combine": ["out"]}
    for launch in plan:
        kernel = getattr(module, launch.kind)
        assert kernel.arg_names == list(launch.arguments), "every argument is given"
        found = identify_accessed_tensors(kernel, dict(launch.arguments), {}).read_writes
        assert sorted(dep.name for dep in found.writes) == sorted(written[launch.kind])
        assert set(tensors(spec, launch.kind)) - set(written[launch.kind]) <= {dep.name for dep in found.reads}


class NoDriver:
    """Stands for the driver of a GPU that is not there, for analyses that ask Triton only for its target."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0
