"""Generated C++ kernels against their definition in float64, for every instruction set that can run here."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent.kernels import cpp_library, generated, latent_attention
from latent.kernels.cpp_library import build, compiler, isa, kernel, library
from latent.kernels.cpp_source import ISAS, Isa, source
from latent.kernels.generated import kernel_for, kernel_for_forms, reference
from latent.kernels.self_check import KernelMismatch, check_once, random_call, small_calls
from latent.kernels.spec import Call, KernelSpec, spec_of
from torch import Tensor

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

BY_NAME = {level.name: level for level in ISAS}
EMULATED = BY_NAME["avx512_bf16" if isa().lanes == 16 else isa().name]._replace(
    name="emulated",
    bf16_dot=True,
    flags=tuple(f for f in isa().flags if f not in ("-mavx512bf16", "-mamx-tile", "-mamx-bf16")),
)
"""The algorithm of AVX512_BF16 with two products in the place of the instruction."""

FLOAT = KernelSpec(torch.float32, 20, 6, 12, "additive", torch.float32, capped=True, sinks=True)
LATENT = KernelSpec(torch.float32, 37, 11, None, "bool")
PLAIN = KernelSpec(torch.float32, 64, 0, 64)
BF16 = KernelSpec(torch.bfloat16, 40, 8, None, "bool")
BF16_VALUES = KernelSpec(torch.bfloat16, 32, 0, 21, "additive", torch.bfloat16)
WHOLE = KernelSpec(torch.float32, 64, 32)
"""Whole register tiles: float32 latents are read where they lie."""

WHOLE_BF16 = KernelSpec(torch.bfloat16, 64, 32, None, "bool")
FP16 = KernelSpec(torch.float16, 19, 0, 24, "additive", torch.float16, sinks=True)

BUILDS = [
    *((spec, isa()) for spec in (FLOAT, LATENT, PLAIN, WHOLE, BF16, WHOLE_BF16, FP16)),
    *((spec, BY_NAME["portable"]) for spec in (FLOAT, FP16)),
    *((spec, EMULATED) for spec in (BF16, BF16_VALUES)),
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the largest element. Half a unit of the result is 4e-3 in bfloat16; weights are rounded to it by EMULATED."""


@functools.cache
def built(spec: KernelSpec, level: Isa) -> Callable[[Call], Tensor]:
    return build(spec, level)[1]


def exact(call: Call) -> Tensor:
    """The definition with float64 scores and sums."""
    return reference(Call(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call)))


def error(call: Call, spec: KernelSpec, level: Isa) -> float:
    expected, actual = exact(call), built(spec, level)(call)
    assert actual.dtype == spec.dtype and actual.shape == expected.shape
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-2)).item()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------ numbers


def strided(x: Tensor, order: int) -> Tensor:
    """The same tensor with its first three dimensions in another order in memory, and a gap between rows."""
    layout = list(itertools.permutations(range(3)))[order % 6]
    inverse = [layout.index(d) for d in range(3)]
    wide = torch.cat((x, x[..., :1]), -1).permute(*layout, 3).contiguous()
    return wide.permute(*inverse, 3)[..., :-1]


@st.composite
def calls(draw: st.DrawFn, spec: KernelSpec) -> Call:
    B, K, G = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 21]))
    S = draw(st.sampled_from([1, 1, 2, 3, 7, 40]))
    T = draw(st.sampled_from([1, 5, 83, 96, 97, 200, 450]))
    H = K * G
    call = random_call(spec, "cpu", batch=B, heads=H, key_heads=K, queries=S, tokens=T, seed=draw(st.integers(0, 99)))
    changed: dict[str, Any] = dict(
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([0, 0, 1, 7, 100])),
        offset=draw(st.sampled_from([T - S, 0, -2, T + 3])),
        scale=draw(st.sampled_from([1.0, 0.2, -0.3])) * call.scale * 2,
    )
    if spec.capped:
        changed["cap"] = draw(st.sampled_from([0.5, 3.0, 50.0]))
    if call.mask is not None:
        shape = [draw(st.sampled_from([1, n])) for n in (B, H, S)] + [draw(st.sampled_from([T, T, T, 1]))]
        visible = torch.rand(shape) < draw(st.sampled_from([0.1, 0.7, 1.0]))
        if draw(st.booleans()):
            visible[..., T // 3 :] = False  # a static cache of which a third is filled
        changed["mask"] = visible
        if spec.mask == "additive":
            assert spec.mask_dtype is not None
            hidden = float("-inf")
            if spec.mask_dtype != torch.float16:  # float32 scores do not survive beside -65504
                hidden = draw(st.sampled_from([hidden, torch.finfo(spec.mask_dtype).min]))
            changed["mask"] = torch.where(visible, torch.randn(shape), hidden).to(spec.mask_dtype)
        if draw(st.booleans()):
            changed["mask"] = changed["mask"].transpose(-1, -2).contiguous().transpose(-1, -2)
    if draw(st.booleans()):
        order = draw(st.integers(0, 5))
        for name in ("query", "query_rope", "key", "key_rope", "value"):
            if (tensor := getattr(call, name)) is not None:
                changed[name] = strided(tensor, order)
    if not spec.totals and draw(st.booleans()):
        changed["used"] = torch.rand(B, H) < 0.5
    return call._replace(**changed)


@pytest.mark.parametrize(("spec", "level"), BUILDS, ids=lambda x: x.name)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_kernel_is_its_definition(spec: KernelSpec, level: Isa, data: st.DataObject) -> None:
    assert error(data.draw(calls(spec)), spec, level) <= TOLERANCE[spec.dtype]


@pytest.mark.parametrize("heads", [2, 16])
@pytest.mark.parametrize("base", [LATENT, FLOAT, BF16], ids=lambda spec: spec.name)
def test_totals_join_results_over_parts_of_the_keys(base: KernelSpec, heads: int) -> None:
    spec = replace(base, totals=True)
    call = random_call(spec, "cpu", heads=heads, key_heads=2, queries=3, tokens=300)
    assert call.mask is not None
    hidden = call.mask.clone()
    hidden[1, :, 2] = False if hidden.dtype == torch.bool else float("-inf")  # a row that sees nothing
    call = call._replace(mask=hidden)
    expected, actual = exact(call), built(spec, isa())(call)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert torch.equal(actual.isneginf(), expected.isneginf())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=TOLERANCE[spec.dtype])


@pytest.mark.parametrize("heads", [2, 16])
@pytest.mark.parametrize("queries", [1, 30])
def test_numbers_do_not_depend_on_threads(heads: int, queries: int) -> None:
    call = random_call(LATENT, "cpu", batch=1, heads=heads, key_heads=1, queries=queries, tokens=3000, causal=True)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert error(call, LATENT, isa()) <= TOLERANCE[torch.float32]
        results.append(built(LATENT, isa())(call))
        assert torch.equal(results[-1], built(LATENT, isa())(call))
    assert all(torch.allclose(results[0], other, atol=1e-6) for other in results[1:])


@pytest.mark.parametrize("spec", [PLAIN, WHOLE, WHOLE_BF16], ids=lambda spec: spec.name)
def test_nothing_is_read_past_the_keys(spec: KernelSpec) -> None:
    for heads, tokens in itertools.product((2, 16, 30), (131, 128, 144)):
        call = random_call(spec, "cpu", heads=heads, key_heads=1, queries=1, tokens=tokens)
        cache = {}
        for name in ("key", "key_rope", "value"):
            if (part := getattr(call, name)) is not None:
                whole = torch.full((2, 1, 150, part.shape[-1]), float("nan"), dtype=part.dtype)
                whole[:, :, :tokens] = part
                cache[name] = whole[:, :, :tokens]
        expected = built(spec, isa())(call)
        assert expected.isfinite().all() and torch.equal(built(spec, isa())(call._replace(**cache)), expected)


@pytest.mark.parametrize("spec", [LATENT, WHOLE_BF16], ids=lambda spec: spec.name)
@pytest.mark.parametrize("heads", [3, 9, 24])
def test_rows_that_see_all_stand_before_rows_that_do_not(spec: KernelSpec, heads: int) -> None:
    """The room for biases holds what an earlier call hid: rows before the first that hides a key are cleared."""
    torch.set_num_threads(1)
    call = random_call(spec, "cpu", heads=heads, key_heads=1, queries=2, tokens=300)
    visible = torch.rand(1, heads, 2, 300) < 0.5
    built(spec, isa())(call._replace(mask=visible & False | (torch.arange(300) == 299)))
    for first in (1, heads // 2, heads):
        rows = visible.clone()
        rows[:, :first, 0] = True
        rows[..., 0] = True
        assert error(call._replace(mask=rows), spec, isa()) < TOLERANCE[spec.dtype]


def test_hidden_blocks_are_not_read() -> None:
    """A static cache costs what is filled, and what lies beyond may be anything."""
    for heads in (2, 16):
        call = random_call(LATENT, "cpu", batch=1, heads=heads, key_heads=1, queries=1, tokens=2000)
        key, mask = call.key.clone(), torch.arange(2000).view(1, 1, 1, -1) < 192
        key[:, :, 400:] = float("nan")
        short = call._replace(key=call.key[:, :, :192], key_rope=call.key_rope[:, :, :192], mask=mask[..., :192])
        actual = built(LATENT, isa())(call._replace(key=key, mask=mask))
        torch.testing.assert_close(actual, exact(short).float(), atol=2e-6, rtol=0)


def test_keys_of_heads_that_are_not_used_are_not_read() -> None:
    call = random_call(PLAIN, "cpu", batch=2, heads=6, key_heads=3, queries=1, tokens=300)
    used = torch.tensor([[True, False, False, False, True, True], [False, False, True, True, False, False]])
    expected = exact(call._replace(used=used)).float()
    assert expected[0, 1:4].abs().max() == 0 and expected[0, 0].abs().max() > 0
    key, value = call.key.clone(), call.value.clone()  # type: ignore[union-attr]
    for tensor in (key, value):
        tensor[0, 1] = tensor[1, 0] = tensor[1, 2] = float("nan")
    actual = built(PLAIN, isa())(call._replace(key=key, value=value, used=used))
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match="used"):
        torch.ops.latent.generated_attention(*call._replace(used=used[:, :3]))


def test_rows_that_see_only_the_least_bias_are_means() -> None:
    for heads in (2, 16):
        call = random_call(FLOAT, "cpu", batch=1, heads=heads, key_heads=1, queries=4, tokens=1500)
        mask = torch.full((1, 1, 4, 1500), torch.finfo(torch.float32).min)
        mask[:, :, 1:, 1400:] = 0.0
        call = call._replace(mask=mask, sinks=torch.full((heads,), float("-inf")))
        assert error(call, FLOAT, isa()) <= TOLERANCE[torch.float32]
        mean = call.value.mean(2)[0].expand(heads, -1)
        torch.testing.assert_close(built(FLOAT, isa())(call)[0, :, 0], mean, atol=1e-6, rtol=0)


def test_nan_is_not_hidden() -> None:
    for heads in (2, 16):
        call = random_call(PLAIN, "cpu", batch=1, heads=heads, key_heads=1, queries=1, tokens=50)
        call.key[0, 0, 7, 3] = float("nan")
        assert built(PLAIN, isa())(call).isnan().all()


def test_no_keys_no_batch() -> None:
    call = random_call(PLAIN, "cpu", heads=4, key_heads=2, queries=3, tokens=20)
    run = built(PLAIN, isa())
    assert (run(call._replace(key=call.key[:, :, :0], value=call.value[:, :, :0])) == 0).all()
    assert run(call._replace(query=call.query[:0], key=call.key[:0], value=call.value[:0])).shape == (0, 4, 3, 64)
    before = call._replace(causal=True, offset=-10)
    assert (run(before) == 0).all()


def test_offsets_beyond_32_bits() -> None:
    """Keys 2^30 elements apart, in an address range of which only the touched pages exist."""
    apart = 2**30 + 64
    call = random_call(PLAIN, "cpu", batch=1, heads=2, key_heads=1, queries=1, tokens=4)
    sparse = torch.empty(3 * apart + 64)
    key = sparse.as_strided((1, 1, 4, 64), (64, 64, apart, 1))
    key.copy_(call.key)
    assert torch.equal(built(PLAIN, isa())(call._replace(key=key)), built(PLAIN, isa())(call))


def test_heads_that_do_not_divide_are_refused() -> None:
    call = random_call(PLAIN, "cpu", heads=4, key_heads=2, queries=1, tokens=20)
    with pytest.raises(ValueError, match="do not fit"):
        spec_of(call._replace(query=call.query[:, :3]))


# ------------------------------------------------------------------ instruction sets, building


@pytest.mark.parametrize("level", [level for level in ISAS if level.lanes == 16], ids=lambda x: x.name)
def test_sources_for_other_cpus_compile(level: Isa) -> None:
    spec = KernelSpec(torch.bfloat16, 64, 16, None)
    try:
        library(source(spec, level), (*level.flags, "-O1"))
    except RuntimeError as failure:
        if "unrecognized" in str(failure) or "unknown argument" in str(failure):
            pytest.skip("the compiler does not know the instruction set")
        raise


def test_instruction_set_can_be_forced_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_ISA", "portable")
    assert isa().lanes == 4
    monkeypatch.setenv("LATENT_ISA", "vax")
    with pytest.raises(RuntimeError, match="vax"):
        isa()


def test_sources_say_what_they_compute() -> None:
    text = source(FLOAT, BY_NAME["avx2"])
    assert "cap · tanh(scale · (q·k + q_rope·k_rope) / cap) + mask" in text and "constexpr int WIDTH = 20;" in text
    assert text == source(FLOAT, BY_NAME["avx2"]) != source(FLOAT, BY_NAME["portable"])


def test_libraries_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = build(PLAIN)[0]
    monkeypatch.setattr(cpp_library.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    library(text, isa().flags)


def test_a_wrong_kernel_is_replaced_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    text = source(PLAIN, isa())
    wrong = text.replace("(float)a.scale * LOG2E", "(float)a.scale")
    assert wrong != text
    run = kernel(PLAIN, library(wrong, isa().flags))
    with pytest.raises(KernelMismatch, match="relative error"):
        check_once(small_calls(PLAIN, "cpu"), PLAIN.dtype, wrong, "cpu", run, reference, tmp_path)
    monkeypatch.setattr(generated, "_build", lambda *_: (wrong, run))
    _falls_back_with_one_warning("relative error", caplog)


def test_without_a_compiler_the_definition_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        build(PLAIN)
    _falls_back_with_one_warning("no C++ compiler", caplog)


def _falls_back_with_one_warning(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    kernel_for.cache_clear()
    kernel_for_forms.cache_clear()
    call = random_call(PLAIN, "cpu", heads=4, key_heads=2, queries=1, tokens=20)
    with caplog.at_level(logging.WARNING, "latent"):
        for _ in range(2):
            assert torch.equal(torch.ops.latent.generated_attention(*call), reference(call))
    kernel_for.cache_clear()
    kernel_for_forms.cache_clear()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and reason in messages[0] and PLAIN.name in messages[0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_one_openmp_runtime() -> None:
    call = random_call(PLAIN, "cpu", heads=16, key_heads=2, queries=20, tokens=2000)
    torch.mm(torch.ones(300, 300), torch.ones(300, 300))
    built(PLAIN, isa())(call)
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtime = re.compile(r"lib(g|i)?omp")
    assert len({line.split()[-1] for line in maps if runtime.match(Path(line.split()[-1]).name)}) == 1


def test_absorbed_results_of_a_batch_have_the_strides_that_compiled_code_expects():
    generator = torch.Generator().manual_seed(0)
    query, latent, up = (torch.randn(shape, generator=generator) for shape in ((2, 6, 1, 4), (2, 1, 40, 5), (2, 4, 5)))
    arguments = (query, None, latent, None, None, up, up, None, None, None, 0.5, 0.0, False, 0)
    found = latent_attention.either(*arguments)
    assert latent_attention.threshold_of(latent_attention.LatentCall(*arguments)) > 1
    assert found.stride() == latent_attention.shape_of_result(*arguments).stride()
