"""The corpus through the backend: every spelling found, no look-alike taken, every output right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from corpus import EXTRA, MORE, MORE_LOOK_ALIKES, NOT_ATTENTION, SPELLINGS
from corpus.base import Program
from latent.rewriter import history
from latent.rewriter.report import Report

BEYOND = {
    "mask_on_exponentials": "the mask multiplies the exponentials",
    "einsum_with_output_projection": "one einsum of three tensors is the value product and the projection",
    "baddbmm_residual": "the value product adds a residual",
    "value_product_over_slices": "the value product is a sum over slices of the keys",
    "two_sources_one_softmax": "one softmax over the scores of two sources",
    "ones_beside_values": "the row sums come out of the value product",
    "online_softmax": "the softmax is accumulated block by block",
}
"""Spellings that are left alone, knowingly."""

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 2e-2}


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def compiled(program: Program, *, dynamic: bool) -> tuple[Report, float]:
    """The report about a program, and its largest error relative to the size of the eager result."""
    torch._dynamo.reset()
    options = {"inner": "eager", "strict": program.name not in UNCAPTURED}
    with torch.no_grad():
        expected = tensors(program.fn(*program.inputs()))
        actual = tensors(
            torch.compile(program.fn, backend="latent", dynamic=dynamic, options=options)(*program.inputs())
        )
    errors = [
        (a.double() - b.double()).abs().max().item() / max(1.0, a.double().abs().max().item())
        for a, b in zip(expected, actual, strict=True)
        if a.is_floating_point() and a.numel()
    ]
    return history.reports(), max(errors, default=0.0)


UNCAPTURED = {"two_under_checkpoint"}
"""Programs whose graph cannot be captured again; they run untouched."""


def check(program: Program, dynamic: bool) -> None:
    report, error = compiled(program, dynamic=dynamic)
    half = {t.dtype for t in tensors(program.inputs())} & set(TOLERANCE)
    narrow = 1e-2 if "autocast" in program.name else 1e-5
    assert error <= max([TOLERANCE[dtype] for dtype in half], default=narrow), f"{error:.1e}\n{report}"
    if program.name not in BEYOND and program.name not in UNCAPTURED:
        assert len(report.sites) == program.sites, str(report)


def cases(*lists: list[Program], every: int = 1) -> list[Any]:
    """All programs as parameters; those that are not the n-th are slow."""
    programs = [program for programs in lists for program in programs]
    return [
        pytest.param(program, id=program.name, marks=[] if i % every == 0 else [pytest.mark.slow])
        for i, program in enumerate(programs)
    ]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("program", cases(SPELLINGS, NOT_ATTENTION, EXTRA))
def test_the_published_corpus(program: Program, dynamic: bool) -> None:
    check(program, dynamic)


@pytest.mark.parametrize("program", cases(MORE, MORE_LOOK_ALIKES))
def test_more_spellings(program: Program) -> None:
    check(program, dynamic=False)


@pytest.mark.parametrize("program", cases(MORE, MORE_LOOK_ALIKES, every=9))
def test_more_spellings_with_dynamic_shapes(program: Program) -> None:
    if not program.dynamic_ok:
        pytest.skip(program.reason)
    check(program, dynamic=True)


@pytest.mark.parametrize("name", sorted(BEYOND))
def test_what_is_beyond_is_still_beyond(name: str) -> None:
    """A spelling that has come within reach leaves the list."""
    (program,) = (p for p in MORE if p.name == name)
    report, _ = compiled(program, dynamic=False)
    assert len(report.sites) < program.sites


@pytest.mark.parametrize("program", cases(NOT_ATTENTION))
def test_a_look_alike_is_refused_with_the_axis_named(program: Program) -> None:
    report, _ = compiled(program, dynamic=False)
    (miss,) = report.near_misses
    assert "axis" in miss.reason and miss.line.startswith("look_alikes.py:")
