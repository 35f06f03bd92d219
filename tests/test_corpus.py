"""The corpus itself: programs run, repeat, agree with their references, and can be traced."""

import functools
from collections import Counter
from itertools import permutations, product

import pytest
import torch
from corpus import ALL, LISTS, MORE, MORE_LOOK_ALIKES, NOT_ATTENTION, Program
from corpus.base import Maker
from corpus.references import attend
from torch import Tensor

PROGRAMS = [pytest.param(entry, id=entry.name) for entry in ALL.values()]
REFERENCED = [pytest.param(entry, id=entry.name) for entry in ALL.values() if entry.reference]
LOOK_ALIKES = [pytest.param(entry, id=entry.name) for entry in MORE_LOOK_ALIKES]
EVERY = 8
"""One program in so many is traced by default; `pytest -m ""` traces all."""
TRACED = [
    pytest.param(entry, id=entry.name, marks=[pytest.mark.slow] if number % EVERY else [])
    for number, entry in enumerate(ALL.values())
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Largest error, relative to the size of the output."""


@pytest.fixture(autouse=True)
def one_thread():
    """The programs are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(entry: Program, seed: int = 0) -> tuple[Tensor, ...]:
    """The outputs as a tuple, from fresh inputs."""
    with torch.no_grad():
        return as_tuple(entry.fn(*entry.inputs(seed)))


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    size = expected.double().abs().max().clamp(min=1.0)
    return ((actual.double() - expected.double()).abs().max() / size).item()


def test_names_are_unique_and_documented():
    names = Counter(entry.name for programs in LISTS.values() for entry in programs)
    assert [name for name, count in names.items() if count > 1] == []
    assert [entry.name for entry in ALL.values() if not entry.fn.__doc__] == []


def test_lists_hold_what_they_promise():
    assert {entry.sites for entry in (*NOT_ATTENTION, *MORE_LOOK_ALIKES)} == {0}
    assert all(entry.sites >= 1 for name in ("SPELLINGS", "EXTRA", "MORE") for entry in LISTS[name])
    assert (len(LISTS["SPELLINGS"]), len(NOT_ATTENTION), len(LISTS["EXTRA"])) == (25, 5, 3)
    assert len(MORE) >= 45 and len(MORE_LOOK_ALIKES) >= 20
    assert all(entry.dynamic_ok or entry.reason for entry in ALL.values())


@pytest.mark.parametrize("entry", PROGRAMS)
def test_runs_and_repeats(entry):
    first, second, other = run(entry), run(entry), run(entry, seed=1)
    assert all(output.isfinite().all() for output in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("entry", REFERENCED)
def test_agrees_with_reference(entry):
    with torch.no_grad():
        expected = as_tuple(entry.reference(*entry.inputs()))
    for actual, output in zip(run(entry), expected, strict=True):
        assert actual.dtype == output.dtype
        assert relative_error(actual, output) < TOLERANCE[actual.dtype]


@functools.cache
def attentions(maker: Maker) -> list[Tensor]:
    """Attention of the inputs in any order of them, each as it is or transposed, scaled or not, and its transpose."""
    generator = torch.Generator().manual_seed(0)
    inputs = maker(functools.partial(torch.randn, generator=generator))[:3]
    if len({tensor.shape for tensor in inputs}) > 1:
        return []
    outputs = [
        attend(*(x.mT if transposed else x for x, transposed in zip(roles, layouts, strict=True)), scale=scale)
        for roles in permutations(inputs)
        for layouts in product((False, True), repeat=3)
        for scale in (1.0, inputs[0].shape[-1] ** -0.5)
    ]
    return [*outputs, *(output.mT for output in outputs)]


@pytest.mark.parametrize("entry", LOOK_ALIKES)
def test_look_alike_is_not_attention(entry):
    for output in run(entry):
        alike = [candidate for candidate in attentions(entry.maker) if candidate.shape == output.shape]
        assert all(relative_error(output, candidate) > 1e-2 for candidate in alike)


@pytest.mark.parametrize("entry", TRACED)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_traces(entry, dynamic):
    if dynamic and not entry.dynamic_ok:
        pytest.skip(entry.reason)
    torch.compiler.reset()
    compiled = torch.compile(entry.fn, backend="eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):  # it costs more than it saves
        actual = as_tuple(compiled(*entry.inputs()))
    for output, expected in zip(actual, run(entry), strict=True):
        assert relative_error(output, expected) < TOLERANCE[expected.dtype]
