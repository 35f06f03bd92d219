"""The cost model of attention over latents: its formulas, the published crossovers, and the choice by time."""

import json
import math

import pytest
import sympy
import torch
from latent.kernels import crossover as model
from latent.kernels import machine
from latent.kernels.crossover import ABSORB, EXPAND, NEVER, Cost, Widths, crossover, explain, threshold
from latent.kernels.machine import Machine, measure, quick

V3 = Widths(512, 128, 128, rope=64)
ARITHMETIC_ONLY = Machine(math.inf, 1.0)


SYMBOLS = (model.d_c, model.d_n, model.d_v, model.d_r, model.H, model.T, model.S, model.e)
expand_cost, absorb_cost = (sympy.lambdify(SYMBOLS, tuple(cost)) for cost in (EXPAND, ABSORB))


# ** the formula **


def test_the_formula_is_where_both_forms_take_the_same_operations():
    at = {model.S: model.CROSSOVER}
    assert sympy.simplify(EXPAND.flops.subs(at) - ABSORB.flops.subs(at)) == 0
    assert not model.CROSSOVER.has(model.H, model.d_r)
    (solved,) = sympy.solve(sympy.Eq(EXPAND.flops, ABSORB.flops), model.S)
    assert sympy.simplify(solved - model.CROSSOVER) == 0


def test_the_limit_of_the_formula():
    c, made = model.d_c, model.d_n + model.d_v
    assert sympy.simplify(sympy.limit(model.CROSSOVER, model.T, sympy.oo) - c * made / (2 * c - made)) == 0


@pytest.mark.parametrize(
    ("widths", "limit"),
    [(V3, 170.67), (Widths(256, 64, 128), 153.6), (Widths(512, 64, 128), 118.15), (Widths(128, 32, 64), 76.8)],
)
def test_published_limits(widths, limit):
    assert crossover(widths) == pytest.approx(limit, abs=0.01)


@pytest.mark.parametrize(("tokens", "expected"), [(128, 73), (1024, 146), (10**9, 171)])
def test_deepseek_v3_over_the_length(tokens, expected):
    assert round(crossover(V3, tokens)) == expected
    values = dict(zip((model.d_c, model.d_n, model.d_v), V3[:3], strict=True)) | {model.T: tokens}
    assert crossover(V3, tokens) == pytest.approx(float(model.CROSSOVER.subs(values)))
    assert threshold(V3, 128, tokens) == math.floor(crossover(V3, tokens)) + 1


def test_smollm2_as_latent_attention():
    assert crossover(Widths(192, 64, 64)) == pytest.approx(96)


def test_a_wide_head_is_always_absorbed():
    widths = Widths(64, 64, 64)
    assert crossover(widths) == math.inf == crossover(Widths(32, 64, 64))
    for tokens in (1, 100, 100_000):
        assert crossover(widths, tokens) == pytest.approx(tokens) and threshold(widths, 8, tokens) > tokens
    assert "2·d_c ≤ d_n+d_v" in explain(widths, 8, 100, 100) and explain(widths, 8, 100, 100).endswith("absorbed")


def test_a_prefill_without_a_cache_expands():
    for tokens in (1, 7, 512, 32768):
        assert crossover(V3, tokens) < tokens


# ** the choice by time **


@pytest.mark.parametrize("device", [Machine(40e9, 700e9), Machine(3.35e12, 990e12), Machine(30e9, 50e9), None])
@pytest.mark.parametrize("widths", [V3, Widths(128, 32, 64, 16), Widths(48, 64, 16, 8), Widths(16, 64, 64)])
@pytest.mark.parametrize("tokens", [5, 100, 4096])
def test_the_threshold_is_the_first_of_those_that_pay(device, widths, tokens):
    def pays(queries):
        costs = [Cost(*cost(*widths, 16, tokens, queries, 2)) for cost in (expand_cost, absorb_cost)]
        expand, absorb = (model.time(cost, device or ARITHMETIC_ONLY) for cost in costs)
        return expand < absorb * (1 - 1e-12)

    least = threshold(widths, 16, tokens, device, 2)
    if least == NEVER:
        assert not pays(10**9)
        return
    assert pays(least)
    assert least == 1 or not pays(least - 1)
    assert all(pays(queries) for queries in range(least + 1, least + 2000, 37))


def test_a_memory_bound_machine_absorbs_longer():
    slow, fast = Machine(1e9, 1e15), Machine(1e15, 1e9)
    assert threshold(V3, 16, 4096, slow) > threshold(V3, 16, 4096, fast) == threshold(V3, 16, 4096)


def test_the_explanation():
    text = explain(V3, 128, 1024, 1)
    assert text == (
        "absorbed below S* = d_c·(d_n+d_v)·T / ((2·d_c−d_n−d_v)·T + d_c·(d_n+d_v)) = 146 query tokens at T = 1024; "
        "here S = 1: absorbed"
    )
    assert explain(V3, 128, 1024, 512).endswith("here S = 512: expanded")
    second = explain(V3, 128, 1024, 512, Machine(40e9, 700e9)).splitlines()[1]
    assert second.startswith("by time (40 GB/s, 700 GFLOP/s, ridge 18 FLOP/byte): absorbed below ")
    assert second.endswith("here S = 512: expanded")


# ** the machine **


def test_measuring_is_plausible_and_keeps_to_itself():
    before = torch.get_rng_state()
    found = measure("cpu", torch.float32, copied=4 << 20, width=128, rounds=2, budget=0.5)
    assert torch.equal(before, torch.get_rng_state())
    assert 1e6 < found.bandwidth_bytes_per_s < 1e13 and 1e6 < found.flops_per_s < 1e15
    assert found.ridge == found.flops_per_s / found.bandwidth_bytes_per_s


def test_the_quick_version_is_kept_if_nobody_disturbed_it(tmp_path, monkeypatch):
    made = []

    def measured(*_, **__):
        made.append(Machine(len(made) + 1e9, 1e9))
        return made[-1], len(made) > 1

    monkeypatch.setattr(machine, "_measure", measured)
    quick("cpu", torch.float32, tmp_path)
    assert not list(tmp_path.iterdir()), "the first one was disturbed"
    quick.cache_clear()
    second = quick("cpu", torch.float32, tmp_path)
    (file,) = tmp_path.iterdir()
    quick.cache_clear()
    assert quick("cpu", torch.float32, tmp_path) == second == made[1] and len(made) == 2
    for damage in ("", "[]", "{}"):
        file.write_text(damage)
        quick.cache_clear()
        assert quick("cpu", torch.float32, tmp_path) == made[-1]
        assert json.loads(file.read_text())["bandwidth_bytes_per_s"] == made[-1].bandwidth_bytes_per_s
    quick.cache_clear()
