"""What masks are proven to be; every positive has a twin that differs in one thing and must not pass for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent.rewriter.masks.prove import Causal, Form, Keys, MaskProof, MaskReader, Window, materialise, prove_mask
from latent.rewriter.masks.terms import Flags
from mask_tools import Seen, prove, trace, visible
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

INF = float("-inf")

# ------------------------------------------------------------------ spellings

S, T = 5, 7


def q() -> torch.Tensor:
    return torch.arange(S)[:, None]


def k() -> torch.Tensor:
    return torch.arange(T)[None]


def square() -> torch.Tensor:
    return torch.nn.Transformer.generate_square_subsequent_mask(S)


def one_entry_changed() -> torch.Tensor:
    mask = torch.ones(S, T, dtype=torch.bool).tril()
    mask[3:4, 1:2] = False
    return mask


def filled_in_place(value: float) -> torch.Tensor:
    mask = torch.full((S, T), value)
    return mask.triu_(1)


def mutated_after_reading() -> torch.Tensor:
    mask = torch.ones(S, T, dtype=torch.bool)
    early = mask.tril()
    mask.fill_(False)
    return early


def mutated_before_reading() -> torch.Tensor:
    mask = torch.ones(S, T, dtype=torch.bool)
    mask.fill_(False)
    return mask.tril()


SPELLINGS: dict[str, tuple[Callable[..., torch.Tensor], Form, str]] = {
    # name: (mask, form, what it is)
    "tril": (lambda: torch.ones(S, T, dtype=torch.bool).tril(), "keep", "causal"),
    "tril of another diagonal": (lambda: torch.ones(S, T, dtype=torch.bool).tril(1), "keep", "causal from 1"),
    "tril is hidden": (lambda: torch.ones(S, T, dtype=torch.bool).tril(), "hide", "keys after i + 0"),
    "triu": (lambda: torch.ones(S, T, dtype=torch.bool).triu(1), "hide", "causal"),
    "triu with the diagonal": (lambda: torch.ones(S, T, dtype=torch.bool).triu(), "hide", "causal from -1"),
    "bottom right": (lambda: torch.ones(S, T).tril(T - S) != 0, "keep", "causal from 2"),
    "arange": (lambda: k() <= q(), "keep", "causal"),
    "arange strictly": (lambda: k() < q(), "keep", "causal from -1"),
    "arange reversed": (lambda: k() >= q(), "keep", "keys after i - 1"),
    "arange the other way round": (lambda: q() >= k(), "keep", "causal"),
    "difference": (lambda: ~(k() - q() > 0), "keep", "causal"),
    "difference off by one": (lambda: ~(k() - q() > 1), "keep", "causal from 1"),
    "doubled": (lambda: 2 * k() < 2 * q() + 1, "keep", "causal"),
    "doubled off by one": (lambda: 2 * k() < 2 * q() + 3, "keep", "causal from 1"),
    "halved": (lambda: k() / 2 <= q() / 2, "keep", "causal"),
    "three parts": (lambda: (k() < q()) | (k() == q()), "keep", "causal"),
    "three parts, one wrong": (
        lambda: (k() < q()) | (k() == q() + 1),
        "keep",
        "causal from 1, (causal from -1 or keys after i + 0)",
    ),
    "one entry changed": (one_entry_changed, "keep", "opaque"),
    "read before a write": (mutated_after_reading, "keep", "causal"),
    "read after a write": (mutated_before_reading, "keep", "keys before 0"),
    "everything": (lambda: k() - q() > -S, "keep", "none"),
    "everything but a corner": (lambda: k() - q() > 1 - S, "keep", f"keys after i{1 - S:+d}".replace("-", " - ")),
    "window": (lambda: (k() <= q()) & (k() > q() - 3), "keep", "causal, window 3"),
    "window off by one": (lambda: (k() <= q()) & (k() >= q() - 3), "keep", "causal, window 4"),
    "window longer than the keys": (lambda: (k() <= q()) & (k() > q() - S), "keep", "causal"),
    "window that just matters": (lambda: (k() <= q()) & (k() > q() - S + 1), "keep", f"causal, window {S - 1}"),
    "window by difference": (lambda: (q() - k() >= 0) * (q() - k() < 3), "keep", "causal, window 3"),
    "band": (lambda: (q() - k()).abs() < 3, "keep", "causal from 2, window 5"),
    "band of triangles": (lambda: torch.ones(S, T).tril().triu(-2).bool(), "keep", "causal, window 3"),
    "prefix": (lambda: (k() <= q()) | (k() < 3), "keep", "prefix 3 or causal"),
    "prefix reversed": (lambda: (k() <= q()) | (k() >= 3), "keep", "(causal or keys from 3)"),
    "chunks": (lambda: (k() <= q()) & (k() // 3 == q() // 3), "keep", "causal, chunks of 3"),
    "chunks of unequal size": (lambda: (k() <= q()) & (k() // 3 == q() // 2), "keep", "opaque"),
    "chunks one apart": (lambda: k() // 3 == q() // 3 + 1, "keep", "chunks of 3"),
    "chunk longer than the keys": (lambda: k() // 8 == q() // 8, "keep", "none"),
    "not one position": (lambda: k() < 2 * q(), "keep", "opaque"),
    "whole queries": (lambda: (k() * 0 + q()) < 3, "keep", "opaque"),
    "square subsequent": (square, "additive", "causal"),
    "square subsequent transposed": (lambda: square().t(), "additive", "keys after i - 1"),
    "square subsequent, small fill": (lambda: filled_in_place(-100.0), "additive", "opaque"),
    "filled in place": (lambda: filled_in_place(-1e4), "additive", "causal"),
    "sum of masks": (
        lambda: torch.full((S, T), INF).triu(1) + torch.zeros(S, T).masked_fill(k() <= q() - 3, -1e9),
        "additive",
        "causal, window 3",
    ),
    "difference of masks": (
        lambda: torch.full((S, T), INF).triu(1) - torch.zeros(S, T).masked_fill(k() <= q() - 3, -1e9),
        "additive",
        "opaque",
    ),
    "one minus mask": (lambda: (1.0 - torch.ones(S, T).tril()) * -1e4, "additive", "causal"),
    "mask itself scaled": (lambda: torch.ones(S, T).tril() * -1e4, "additive", "keys after i + 0"),
    "one minus mask, infinite": (lambda: (1.0 - torch.ones(S, T).tril()) * INF, "additive", "opaque"),  # 0·inf
    "chain of fills": (
        lambda: torch.ones(S, T).tril().masked_fill(torch.ones(S, T).tril() == 0, INF).masked_fill(k() <= q(), 0.0),
        "additive",
        "causal",
    ),
    "chain that forgets the ones": (
        lambda: torch.ones(S, T).tril().masked_fill(torch.ones(S, T).tril() == 0, INF),
        "additive",
        "opaque",
    ),
    "where": (lambda: torch.where(k() <= q(), 0.0, torch.finfo(torch.float32).min), "additive", "causal"),
    "where reversed": (lambda: torch.where(k() <= q(), INF, 0.0), "additive", "keys after i + 0"),
    "minimum times a boolean": (lambda: torch.full((S, T), -3e38) * (k() > q()), "additive", "causal"),
    "alibi": (lambda: (k() - q()) * 0.5, "additive", "opaque"),
    "alibi with a mask": (lambda: (k() - q()) * 0.25 + torch.full((S, T), INF).triu(1), "additive", "opaque"),
    "half precision": (lambda: torch.where(k() <= q(), 0.0, -1e30).to(torch.float16), "additive", "causal"),
    "cat of masks": (
        lambda: torch.cat([torch.ones(S, 2, dtype=torch.bool), torch.ones(S, S, dtype=torch.bool).tril()], 1),
        "keep",
        "causal from 2",
    ),
    "cat of masks with a gap": (
        lambda: torch.cat([torch.zeros(S, 2, dtype=torch.bool), torch.ones(S, S, dtype=torch.bool).tril()], 1),
        "keep",
        "causal from 2, keys from 2",
    ),
    "one query": (lambda: k() <= torch.arange(1)[:, None] + T - 1, "keep", "none"),
    "one query but one key": (lambda: k() <= torch.arange(1)[:, None] + T - 2, "keep", f"keys before {T - 1}"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    function, form, want = SPELLINGS[name]
    said = prove(function, form).describe()
    assert said == want or (want == "opaque" and "opaque" in said), said


def test_fill_is_the_mildest_value() -> None:
    both = SPELLINGS["sum of masks"][0]
    assert (prove(both, "additive").fill, prove(both, "additive").uniform) == (-1e9, False)
    assert (prove(square, "additive").fill, prove(square, "additive").uniform) == (INF, True)
    assert prove(lambda: torch.zeros(S, T), "additive") == MaskProof((), None, True, True)


def test_rows_visible() -> None:
    assert prove(SPELLINGS["window"][0]).rows_visible
    assert not prove(SPELLINGS["arange strictly"][0]).rows_visible  # query 0 sees nothing
    assert not prove(lambda: (k() <= q()) & (k() > 1)).rows_visible


def test_top_left_causal_is_nothing_else() -> None:
    assert prove(SPELLINGS["tril"][0]).flags == Flags(causal=True)
    assert not any(prove(SPELLINGS[other][0]).flags == Flags(causal=True) for other in ("window", "bottom right"))


def test_reasons_name_what_is_missing() -> None:
    (opaque,) = prove(SPELLINGS["alibi"][0], "additive").opaque
    assert opaque.reason == "The additive values are not 0 and a large negative number"
    assert "2*i - j - 1 >= 0" in prove(SPELLINGS["not one position"][0]).opaque[0].reason


# ------------------------------------------------------------------ masks that read inputs


def test_buffer_is_not_what_it_holds() -> None:
    bias = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    (opaque,) = prove(lambda bias: bias[:, :, :S, :T], "keep", bias).opaque
    assert "is an input of the graph" in opaque.reason
    (opaque,) = prove(lambda: bias[:, :, :S, :T], "keep").opaque
    assert "is a buffer" in opaque.reason
    assert prove(lambda: torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()[:, :, :S, :T]).flags == Flags(causal=True)


def test_padding() -> None:
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    proof = prove(lambda m: m.bool()[:, None, None] & torch.ones(5, 5, dtype=torch.bool).tril(), "keep", keep)
    assert proof.describe() == "causal, padding"
    assert prove(lambda m: (m == 0)[:, None, None], "hide", keep).describe() == "padding"
    assert prove(lambda m: (m != 0)[:, None, None], "hide", keep).describe() == "padding"
    assert prove(lambda m: m.bool()[:, None, :, None].expand(2, 1, 5, 5), "keep", keep).opaque  # queries, not keys
    assert prove(lambda m: m.bool()[:, None, None] | m.bool()[:, None, :, None], "keep", keep).opaque


def test_one_minus_an_input_is_not_known_to_be_a_mask() -> None:
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    proof = prove(lambda m: (1.0 - m.bool().float())[:, None, None] * -1e4, "additive", keep)
    assert (proof.describe(), proof.fill) == ("padding", -1e4)
    assert prove(lambda m: (1.0 - m.float())[:, None, None] * -1e4, "additive", keep).opaque  # m may hold 0.5 or 2
    assert prove(lambda m: m.float()[:, None, None], "additive", keep).opaque


def test_padding_by_lengths() -> None:
    lengths = torch.tensor([3, 7])
    assert not prove(lambda n: (k() < n[:, None])[:, None], "keep", lengths).opaque
    assert not prove(lambda n: ((k() <= q()) | (k() < n[:, None, None]))[:, None], "keep", lengths).opaque
    assert not prove(lambda n: k().expand(S, T) < n[0], "keep", lengths).opaque


def test_positions_that_are_data() -> None:
    places = torch.tensor([0, 1, 2, 1, 2])
    assert prove(lambda p: k() <= p[:, None], "keep", places).opaque
    proof = prove(lambda p: p[None] <= p[:, None], "keep", places)
    assert proof.describe() == "causal by p_1"
    assert prove(lambda p, r: p[None] <= r[:, None], "keep", places, places.clone()).opaque


def test_packed_sequences() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]])

    def causal() -> torch.Tensor:
        return torch.ones(5, 5, dtype=torch.bool).tril()

    proof = prove(lambda s: (s[:, None] == s[:, :, None]) & causal(), "keep", segments)
    assert proof.describe() == "causal, segments of s_1"
    assert prove(lambda s: (s[:, None] != s[:, :, None]) & causal(), "keep", segments).opaque
    assert prove(lambda s: (s[:, None] == s[:, :, None] + 1) & causal(), "keep", segments).opaque
    assert prove(lambda s, r: s[:, None] == r[:, :, None], "keep", segments, segments.clone()).opaque
    assert prove(lambda s: (s[:, None] + 0) == s.add_(1)[:, :, None], "keep", segments).opaque  # other values by then


def test_a_mask_written_to_later_is_read_where_it_is_used() -> None:
    def function() -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones(S, T, dtype=torch.bool).tril()
        used = mask.to(torch.float32)
        mask[:, 0:1] = False
        return used, mask.to(torch.float16)

    gm = trace(function)
    early, late = gm.graph.output_node().args[0]  # type: ignore[misc]
    mask = early.args[0]
    reader = MaskReader(gm.graph)
    dims = {"query_dim": 0, "key_dim": 1, "form": "keep"}
    assert reader.prove(mask, **dims).opaque  # type: ignore[arg-type]
    assert reader.prove(mask, **dims, at=early).flags == Flags(causal=True)  # type: ignore[arg-type]
    assert reader.prove(mask, **dims, at=late).describe() == "causal, keys from 1"  # type: ignore[arg-type]


# ------------------------------------------------------------------ formulas


def comparisons() -> st.SearchStrategy[Any]:
    op = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
    linear = st.tuples(st.integers(-2, 2), st.integers(-2, 2), st.integers(-5, 5), op)
    chunk = st.tuples(st.just("chunk"), st.integers(1, 4), st.integers(-3, 3), st.integers(-3, 3))
    return linear | chunk


FORMULAS = st.recursive(
    comparisons(),
    lambda inner: (
        st.tuples(st.just("and"), inner, inner)
        | st.tuples(st.just("or"), inner, inner)
        | st.tuples(st.just("not"), inner)
    ),
    max_leaves=5,
)


def evaluate(formula: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    match formula:
        case ("and", a, b):
            return evaluate(a, i, j) & evaluate(b, i, j)
        case ("or", a, b):
            return torch.logical_or(evaluate(a, i, j), evaluate(b, i, j))
        case ("not", a):
            return ~evaluate(a, i, j)
        case ("chunk", size, p, r):
            return (i + p) // size == (j + r) // size
        case (a, b, c, op):
            left, right = a * i + c, -b * j
            names = {"<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge, "==": torch.eq, "!=": torch.ne}
            return names[op](left, right)
    raise AssertionError(formula)


PROVEN: list[bool] = []


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(FORMULAS, st.sampled_from([(1, 6), (4, 4), (3, 7), (6, 2)]))
def test_formula_without_opaque_terms_is_the_mask(formula: Any, size: tuple[int, int]) -> None:
    queries, keys = size

    def mask() -> torch.Tensor:
        i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
        return evaluate(formula, i, j).expand(queries, keys)

    node = trace(mask).graph.output_node().args[0]
    assert isinstance(node, fx.Node)
    for form in ("keep", "hide"):
        proof = prove_mask(node, query_dim=0, key_dim=1, form=form)  # type: ignore[arg-type]
        PROVEN.append(not proof.opaque)
        if not proof.opaque:
            want = visible(mask(), form)  # type: ignore[arg-type]
            assert torch.equal(materialise(proof.terms, queries, keys), want), proof.describe()
            assert not proof.rows_visible or bool(want.any(1).all())


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(FORMULAS)
def test_formula_for_all_sizes(formula: Any) -> None:
    def mask(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(queries.shape[0])[:, None], torch.arange(keys.shape[0])[None]
        return evaluate(formula, i, j).expand(queries.shape[0], keys.shape[0])

    gm = make_fx(mask, pre_dispatch=True, tracing_mode="symbolic")(torch.zeros(5), torch.zeros(7))
    node = gm.graph.output_node().args[0]
    assert isinstance(node, fx.Node)
    proof = prove_mask(node, query_dim=0, key_dim=1, form="keep")
    if proof.opaque:
        return
    for size in [(2, 9), (4, 4), (7, 3)]:
        seen = Seen(gm, list(map(torch.zeros, size)))
        assert torch.equal(seen.materialised(proof, node), seen.values[node]), (size, proof.describe())
        assert not proof.rows_visible or bool(seen.values[node].any(1).all())


def test_most_formulas_are_proven() -> None:
    assert sum(PROVEN) > len(PROVEN) / 2, sum(PROVEN) / len(PROVEN)


def test_terms_are_exact() -> None:
    one = sympy.S.One
    assert materialise((Causal(one), Window(-one), Keys(one, 3 * one)), 3, 4).int().tolist() == [
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 0],
    ]
