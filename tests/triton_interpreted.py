"""The generated Triton kernels, interpreted on the CPU beside their definition in float64.

`test_triton_kernels.py` runs this file in a process of its own: TRITON_INTERPRET has to be set before Triton is
imported, and no graph can be compiled in a process where it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent.kernels import generated, self_check, triton_library
from latent.kernels.generated import reference
from latent.kernels.spec import Call, KernelSpec
from latent.kernels.triton_library import Target, Tile, launches, load, run
from latent.kernels.triton_source import source_of
from torch import Tensor
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "run by test_triton_kernels.py"

LIMIT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
TARGET = Target("cuda", 80, 4)


def interpret_bfloat16_as_the_hardware_does() -> None:
    """Triton's interpreter multiplies the bit patterns of bfloat16 in `dot` and truncates casts to it."""
    builder: Any = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(np.matmul(wide(a), wide(b)) + d.data, d.dtype.scalar)
        return dot(self, a, b, d, *rest)

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
            return interpreter.TensorHandle(bits.numpy(), tl.bfloat16)
        return cast(self, source, dtype)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


interpret_bfloat16_as_the_hardware_does()

specs = st.builds(
    KernelSpec,
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
    width=st.sampled_from([16, 24, 64, 80, 96]),
    rope_width=st.sampled_from([0, 8, 32]),
    value_width=st.sampled_from([None, 16, 40, 64]),
    mask=st.sampled_from(["none", "bool", "additive"]),
    mask_dtype=st.none(),
    capped=st.booleans(),
    sinks=st.booleans(),
).map(lambda spec: spec if spec.mask != "additive" else KernelSpec(**{**vars(spec), "mask_dtype": spec.dtype}))


def rows_of(draw: st.DrawFn, randn: Callable[..., Tensor], B: int, H: int, n: int, width: int) -> Tensor:
    """[B, H, n, width] in one of the layouts of caches and projections, with NaN wherever no kernel may look."""
    layout = draw(st.sampled_from(["heads first", "tokens first", "inside a wider row"]))
    values = randn(B, H, n, width)
    if layout == "heads first":
        room = values.new_full((B, H, n + 3, width), float("nan"))
        view = room[:, :, :n]
    elif layout == "tokens first":
        view = values.new_full((B, n + 3, H, width), float("nan"))[:, :n].transpose(1, 2)
    else:
        view = values.new_full((B, H, n, width + 5), float("nan"))[..., 3 : 3 + width]
    return view.copy_(values)


@st.composite
def calls(draw: st.DrawFn) -> tuple[KernelSpec, Call]:
    spec = draw(specs)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(spec.dtype)

    B, K = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]))
    G, S, T = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 90))
    mask: Tensor | None = None
    if spec.mask != "none":
        shape = [n if draw(st.booleans()) else 1 for n in (B, K * G, S, T)]
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9]))
        if spec.mask == "additive":
            hidden = draw(st.sampled_from([float("-inf"), -1e4 if spec.dtype == torch.float16 else -3.38e38]))
            mask = torch.where(mask, torch.randn(shape, generator=generator), hidden).to(spec.mask_dtype)
    R, E = spec.rope_width, spec.value_width
    call = Call(
        rows_of(draw, randn, B, K * G, S, spec.width),
        rows_of(draw, randn, B, K * G, S, R) if R else None,
        rows_of(draw, randn, B, K, T, spec.width),
        rows_of(draw, randn, B, K, T, R) if R else None,
        None if E is None else rows_of(draw, randn, B, K, T, E),
        mask,
        torch.randn(K * G, generator=generator) if spec.sinks else None,
        (spec.width + R) ** -0.5,
        draw(st.sampled_from([0.5, 3.0])) if spec.capped else 0.0,
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, 1, 9, 40])),
        draw(st.sampled_from([T - S, 0, -2, T + 9])),
    )
    return spec, call


def exact(call: Call) -> Tensor:
    """The definition on the same numbers in float64."""
    wide: list[Any] = [x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x for x in call]
    return reference(Call(*wide))


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls(), st.sampled_from([1, 1, 2, 3, 6]), st.sampled_from([16, 32]))
def test_every_kernel_computes_its_definition(given_call: tuple[KernelSpec, Call], splits: int, keys: int) -> None:
    spec, call = given_call
    out, plan = launches(spec, call, TARGET, Tile(16, keys, 4, 1, 1), splits)
    run(load(spec, source_of(spec)), plan)
    expected = exact(call)
    error = (out.double() - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    assert error < LIMIT[spec.dtype], f"{error:.1e}"


@pytest.mark.parametrize(
    ("spec", "splits"),
    [
        (KernelSpec(torch.float32, 512, 64), 3),
        (KernelSpec(torch.bfloat16, 512, 64, mask="bool"), 2),
        (KernelSpec(torch.float16, 192, value_width=128), 1),
        (KernelSpec(torch.float32, 576, value_width=512), 2),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_wide_rows(spec: KernelSpec, splits: int) -> None:
    call = self_check.random_call(spec, "cpu", heads=20, key_heads=1, queries=1, tokens=77)
    out, plan = launches(spec, call, TARGET, Tile(16, 32, 4, 1, 1), splits)
    run(load(spec, source_of(spec)), plan)
    assert (out.double() - exact(call)).abs().max().item() < LIMIT[spec.dtype]


def test_the_result_does_not_depend_on_splits_and_tiles() -> None:
    spec = KernelSpec(torch.float32, 64, 16)
    call = self_check.random_call(spec, "cpu", heads=8, key_heads=1, queries=3, tokens=130, causal=True)
    results = []
    for splits, keys, rows in ((1, 16, 16), (2, 32, 16), (8, 32, 32), (4, 64, 16)):
        out, plan = launches(spec, call, TARGET, Tile(rows, keys, 4, 1, 1), splits)
        run(load(spec, source_of(spec)), plan)
        results.append(out)
    assert max((out - results[0]).abs().max().item() for out in results) < 1e-6


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_hidden_by_the_least_number_are_means_and_by_infinity_zero(splits: int) -> None:
    """The least float32 is a finite bias: beside it no score counts. In base 2 it would be infinite."""
    spec = KernelSpec(torch.float32, 32, mask="additive", mask_dtype=torch.float32)
    call = self_check.random_call(spec, "cpu", heads=2, key_heads=1, queries=1, tokens=90)
    mask = torch.full((2, 1, 1, 90), torch.finfo(torch.float32).min)
    mask[1] = float("-inf")
    out, plan = launches(spec, call._replace(mask=mask), TARGET, Tile(16, 16, 4, 1, 1), splits)
    run(load(spec, source_of(spec)), plan)
    assert torch.allclose(out[0, :, 0], call.key[0].mean(1), atol=1e-6)
    assert not out[1].any()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("sinks", [False, True])
def test_totals_join_results_over_parts_of_the_keys(splits: int, sinks: bool) -> None:
    spec = KernelSpec(torch.float32, 32, 8, mask="bool", sinks=sinks, totals=True)
    call = self_check.random_call(spec, "cpu", heads=4, key_heads=2, queries=3, tokens=90)
    assert call.mask is not None
    call.mask[1, :, 2] = False  # a row that sees nothing
    out, plan = launches(spec, call, TARGET, Tile(16, 16, 4, 1, 1), splits)
    run(load(spec, source_of(spec)), plan)
    expected = exact(call)
    assert torch.equal(out.isneginf(), expected.isneginf())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


def test_a_cache_beyond_32_bit_offsets() -> None:
    """70 keys, 2^25 elements apart: the memory between them is never touched. A wrong offset is a crash."""
    spec, apart = KernelSpec(torch.float16, 64), (1 << 25) + 64
    call = self_check.random_call(spec, "cpu", heads=4, key_heads=1, queries=1, tokens=70, batch=1)
    far = torch.empty(70 * apart, dtype=torch.float16).as_strided(call.key.shape, (0, 0, apart, 1)).copy_(call.key)
    results = []
    for key in (call.key, far):
        out, plan = launches(spec, call._replace(key=key), TARGET, Tile(16, 32, 4, 1, 1), 2)
        run(load(spec, source_of(spec)), plan)
        results.append(out)
    assert torch.equal(*results)


def test_what_is_built_is_checked_and_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("LATENT_CACHE", str(tmp_path))
    spec = KernelSpec(torch.float32, 32, 16, mask="bool", sinks=True)
    seen = kinds_run(monkeypatch)
    source, kernel = triton_library.build(spec)
    check = (spec.dtype, source, "cpu", kernel, reference)
    self_check.check_once(self_check.small_calls(spec, "cpu"), *check)
    assert seen == {"attend", "split", "combine"}, "the check runs every kernel of the source"
    seen.clear()
    self_check.check_once(self_check.small_calls(spec, "cpu"), *check)
    assert not seen, "what held is remembered"


def test_a_broken_kernel_is_caught_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    monkeypatch.setenv("LATENT_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_library, "source_of", lambda spec: source_of(spec).replace("s *= scale", "s *= 1.0"))
    monkeypatch.setattr(generated, "_build", lambda spec, device: triton_library.build(spec))
    spec = KernelSpec(torch.float32, 48, value_width=32)
    call = self_check.random_call(spec, "cpu", heads=4, key_heads=2, queries=2, tokens=40)
    with caplog.at_level(logging.WARNING):
        results = [generated.kernel_for(spec, "cpu")(call) for _ in range(2)]
    assert all(torch.equal(result, reference(call)) for result in results)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "beside its reference body" in caplog.text


def kinds_run(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels that run from here on."""
    seen: set[str] = set()

    def noted(module: Any, plan: Any) -> None:
        seen.update(launch.kind for launch in plan)
        run(module, plan)

    monkeypatch.setattr(triton_library, "run", noted)
    return seen
