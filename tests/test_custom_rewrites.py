"""latent.replace: what it matches, what it says where it does not, and what happens to a wrong one."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import latent
import pytest
import torch
import torch.nn.functional as F
from latent.rewriter.custom.example import ExampleError
from latent.rewriter.custom.pattern import PatternError
from latent.rewriter.registry import rewrites, unregister
from latent.rewriter.rules import Benefit, Cost
from rewrite_tools import outcome
from torch import Tensor

EXAMPLE = Path(__file__).parent.parent / "examples" / "custom_rewrite.py"
B, H, S, T, D, E = 2, 4, 6, 9, 16, 8
QKV = {"q": "B H S D", "k": "B H T D", "v": "B H T E"}


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Rewrites of one test are gone in the next."""
    before = {entry.name for entry in rewrites()}
    torch._dynamo.reset()
    yield
    for entry in rewrites():
        if entry.name not in before:
            unregister(entry.name)
    torch._dynamo.reset()


def qkv(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator) for shape in shapes or ((B, H, S, D), (B, H, T, D), (B, H, T, E))
    )


def capped(q: Tensor, k: Tensor, v: Tensor, cap: float, scale: float) -> Tensor:
    return (cap * torch.tanh(q @ k.mT * scale / cap)).softmax(-1) @ v


def row_by_row(q: Tensor, k: Tensor, v: Tensor, cap: float, scale: float) -> Tensor:
    """Another way to the same: the scores of one query at a time."""
    return torch.cat([capped(one, k, v, cap, scale) for one in q.split(1, dim=2)], dim=2)


def always(dims: Any) -> Benefit:
    return Benefit(Cost(1, 1), Cost(0, 0))


def replace_capped(replacement: Callable[..., Tensor] = row_by_row, **how: Any) -> Any:
    example = {**QKV, "cap": 30.0, "scale": 0.1}
    return latent.replace("mine", capped, replacement, example=example, benefit=always, **how)


# ** the example **


def test_the_example_is_fifteen_lines_and_matches_gemma2_as_it_is() -> None:
    body = ast.parse(EXAMPLE.read_text()).body
    names = ("soft_capped", "fused", "example", "latent.replace")
    parts = [
        n for n in body if any(ast.unparse(n).startswith((f"def {name}(", f"{name} =", f"{name}(")) for name in names)
    ]
    lines = [line for n in parts for line in EXAMPLE.read_text().splitlines()[n.lineno - 1 : n.end_lineno] if line]
    assert len(parts) == 4 and len(lines) <= 15

    transformers = pytest.importorskip("transformers")
    runpy.run_path(str(EXAMPLE))
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        attn_implementation="eager",
    )
    model = transformers.Gemma2ForCausalLM(config).eval()
    tokens = torch.arange(24).view(2, 12)
    options = {
        "inner": "eager",
        "strict": True,
        "verify": "full",
        "rewrites": "my_soft_cap",
        "expect": {"my_soft_cap": 2},
    }
    with torch.no_grad():
        expected = model(tokens).logits
        actual = torch.compile(model, backend="latent", options=options)(tokens).logits
    assert (actual - expected).abs().max() < 1e-5
    errors = [v.error for v in latent.reports().verdicts if v.rewrite == "my_soft_cap"]
    assert len(errors) == 2 and all(error is not None and error < 1e-9 for error in errors)


# ** what matches **

SAME: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "tokens before heads, einsum, scale on the query": (
        lambda q, k, v: torch.einsum(
            "bhij,bjhe->bihe", (20 * torch.tanh(torch.einsum("bihd,bjhd->bhij", 0.25 * q, k) / 20)).softmax(-1), v
        ),
        ((B, S, H, D), (B, T, H, D), (B, T, H, E)),
    ),
    "merged heads, bmm, scale split over query and key": (
        lambda q, k, v: torch.bmm((torch.tanh(torch.bmm(q / 2, (k / 2).mT) * 0.05) * 20).softmax(-1), v),
        ((B * H, S, D), (B * H, T, D), (B * H, T, E)),
    ),
    "repeated heads, keys transposed in memory": (
        lambda q, k, v: (torch.tanh(q @ k.repeat_interleave(2, 1) / 20) * 20).softmax(-1) @ v.repeat_interleave(2, 1),
        ((B, H, S, D), (B, H // 2, D, T), (B, H // 2, T, E)),
    ),
    "one query token": (
        lambda q, k, v: (torch.tanh(q @ k.mT / 20) * 20).softmax(-1) @ v,
        ((B, H, 1, D), (B, H, T, D), (B, H, T, E)),
    ),
}


@pytest.mark.parametrize("spelling", SAME)
def test_the_same_mathematics_in_other_layouts(spelling: str) -> None:
    replace_capped()
    function, shapes = SAME[spelling]
    found = outcome("mine", function, *qkv(*shapes))
    assert found.verdict.outcome == "applied" and found.error < 1e-5
    assert found.verdict.error is not None and found.verdict.error < 1e-9


def test_symbolic_sizes_match_and_a_condition_on_them_becomes_a_guard() -> None:
    latent.replace("mine", capped_at_30, capped_at_30_again, example=QKV, benefit=always, where=lambda d: d.S >= 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        capped_at_30, backend="latent", dynamic=True, options={"inner": "eager", "strict": True, "rewrites": "mine"}
    )
    for length in (6, 12, 3, 5):
        q, k, v = qkv((B, H, length, D), (B, H, T, D), (B, H, T, E))
        assert torch.allclose(compiled(q, k, v), capped_at_30(q, k, v), atol=1e-5)
    assert [v.outcome for v in latent.reports().verdicts if v.rewrite == "mine"] == ["applied", "refused"]


class Capped(torch.nn.Module):
    """A soft cap that dynamic shapes make a symbol of."""

    def __init__(self) -> None:
        super().__init__()
        self.cap = 30.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return capped(q, k, v, self.cap, 0.25)


def test_a_symbolic_cap_is_one_of_the_numbers_of_a_pattern() -> None:
    replace_capped(lambda q, k, v, cap, scale: capped(q / 2, k, v, cap, 2 * scale))
    found = outcome("mine", Capped(), *qkv(), dynamic=True)
    assert found.verdict.outcome == "applied" and found.error < 1e-5


def capped_at_30(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return capped(q, k, v, 30.0, 0.25)


def capped_at_30_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT * (0.25 / 30)) * 30).softmax(-1) @ v


def test_grouped_heads_sinks_and_a_mask_come_as_declared() -> None:
    """[B S (K G) D] with keys [B T K D]: the replacement is given the keys without repetition."""
    seen: list[tuple[int, ...]] = []

    def pattern(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scale: float) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        k, v = (x.transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
        scores = scale * (q.transpose(1, 2) @ k.mT) + mask
        sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return (torch.cat((scores, sink), -1).softmax(-1)[..., :-1] @ v).transpose(1, 2)

    def replacement(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scale: float) -> Tensor:
        seen[:] = [tuple(x.shape) for x in (q, k, v, mask, sinks)]
        return pattern(scale * q, k, v, mask, sinks, 1.0)

    example = {"q": "B S (K G) D", "k": "B T K D", "v": "B T K E", "mask": "B 1 S T", "sinks": "(K G)", "scale": 0.2}
    latent.replace("mine", pattern, replacement, example=example, benefit=always)

    def site(q: Tensor, k: Tensor, v: Tensor, hide: Tensor, sinks: Tensor) -> Tensor:
        scores = torch.einsum("bkgid,bkjd->bkgij", q, k).masked_fill(hide, float("-inf"))
        sink = sinks.view(1, 2, 2, 1, 1).expand(B, 2, 2, S, 1)
        return torch.einsum("bkgij,bkje->bkgie", torch.cat((sink, scores), -1).softmax(-1)[..., 1:], v)

    q, k, v, sinks = qkv((B, 2, 2, S, D), (B, 2, T, D), (B, 2, T, E), (4,))
    found = outcome("mine", site, q, k, v, torch.rand(S, T) < 0.3, sinks)
    assert found.verdict.outcome == "applied" and found.error < 1e-5
    assert seen == [(B, S, 4, D), (B, T, 2, D), (B, T, 2, E), (B, 1, S, T), (4,)]


ALONE: dict[str, tuple[tuple[int, int, int], Callable[..., Tensor]]] = {
    "one batch": (
        (1, 4, 2),
        lambda q, k, v, m: (q @ k.repeat_interleave(2, 1).mT + m).softmax(-1) @ v.repeat_interleave(2, 1),
    ),
    "one head": ((3, 1, 1), lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v),
    "one key head": ((3, 4, 1), lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v),
}


@pytest.mark.parametrize("what", ALONE)
def test_batch_and_heads_keep_their_names_where_one_of_them_is_one(what: str) -> None:
    def pattern(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT + mask).softmax(-1) @ v

    (batch, heads, key_heads), function = ALONE[what]
    example = {**QKV, "mask": "B 1 S T"}
    latent.replace(
        "mine", pattern, pattern, example=example, benefit=always, where=lambda d: (batch, heads) == (d.B, d.H)
    )
    inputs = qkv((batch, heads, S, D), (batch, key_heads, T, D), (batch, key_heads, T, E), (batch, 1, S, T))
    found = outcome("mine", function, *inputs)
    assert found.verdict.outcome == "applied" and found.error < 1e-5, found.verdict.reason


def test_a_causal_pattern_matches_masks_that_are_proven_causal() -> None:
    def pattern(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, float("-inf")).softmax(-1) @ v

    example = {"q": "B H S D", "k": "B H S D", "v": "B H S E"}
    latent.replace(
        "mine", pattern, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), example=example
    )

    def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(S)
        mask = torch.where(position[None] > position[:, None], -1e9, 0.0)
        return torch.einsum("bhij,bhje->bhie", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.25 + mask).softmax(-1), v)

    inputs = qkv((B, H, S, D), (B, H, S, D), (B, H, S, E))
    found = outcome("mine", additive, *inputs)
    assert found.verdict.outcome == "applied" and found.error < 1e-5
    found = outcome("mine", lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v, *inputs)
    assert found.verdict.reason.startswith("differs at the mask: the pattern has a causal mask, the site none")


def test_flags_of_a_fused_call_become_the_mask_that_a_pattern_declares() -> None:
    def pattern(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        return (scale * (q @ k.mT) + mask).softmax(-1) @ v

    def replacement(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    example = {**QKV, "mask": "B 1 S T", "scale": 0.2}
    latent.replace("mine", pattern, replacement, example=example, benefit=always)
    found = outcome("mine", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv())
    assert found.verdict.outcome == "applied" and found.error < 1e-5


# ** what does not, and why **

DIFFERENT: dict[str, Callable[..., Tensor]] = {
    "differs at the soft cap: the pattern has a soft cap, the site has none": lambda q, k, v: (
        (q @ k.mT).softmax(-1) @ v
    ),
    "differs at the mask: the pattern has none, the site a mask tensor": lambda q, k, v: (
        (30 * torch.tanh(q @ k.mT / 30) + k[:, :1, None, :, 0]).softmax(-1) @ v
    ),
    "differs at the sinks: the site has sinks, the pattern has none": lambda q, k, v: (
        F.pad(30 * torch.tanh(q @ k.mT / 30), (0, 1)).softmax(-1)[..., :-1] @ v
    ),
    "the attention weights are read by something else too": lambda q, k, v: (
        (w := (30 * torch.tanh(q @ k.mT / 30)).softmax(-1)) @ v + w.sum()
    ),
    "its condition does not hold: dims.D <= 8, with B=2, H=4, S=6, D=16, T=9, E=8": lambda q, k, v: (
        (30 * torch.tanh(q @ k.mT / 30)).softmax(-1) @ v
    ),
}


@pytest.mark.parametrize("reason", DIFFERENT)
def test_a_site_that_differs_says_where(reason: str) -> None:
    replace_capped(where=lambda dims: dims.D <= 8)
    found = outcome("mine", DIFFERENT[reason], *qkv())
    assert found.verdict.outcome == "refused" and found.verdict.reason.startswith(reason)
    assert found.verdict.line.startswith("test_custom_rewrites.py:")


def test_a_fixed_number_has_to_be_the_sites() -> None:
    latent.replace("mine", capped_at_30, capped_at_30_again, example=QKV, benefit=always)
    found = outcome("mine", lambda q, k, v: capped(q, k, v, 30.0, 0.5), *qkv())
    assert found.verdict.reason == "differs at the scale: the pattern's is 0.25, the site's 0.5"
    assert outcome("mine", lambda q, k, v: capped(q / 2, k, v, 30.0, 0.5), *qkv()).verdict.outcome == "applied"


def test_a_replacement_that_moves_more_does_not_pay() -> None:
    def slower(q: Tensor, k: Tensor, v: Tensor, cap: float, scale: float) -> Tensor:
        return capped(q, k, v, cap, scale) + 0 * capped(q, k, v, cap, scale)

    latent.replace("mine", capped, slower, example={**QKV, "cap": 30.0, "scale": 0.1})
    assert outcome("mine", capped_at_30, *qkv()).verdict.outcome == "not paying"


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def oddly_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + k[..., 0].sin()[:, :, None, :]).softmax(-1) @ v


WRONG_PATTERNS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "it is no attention: it has no softmax": (lambda q, k, v: q @ k.mT @ v, plain, QKV),
    "the softmax normalises axis": (
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
        plain,
        {**QKV, "k": "B H S D", "v": "B H S E"},
    ),
    "its query is computed by": (lambda q, k, v: plain(F.normalize(q, dim=-1), k, v), plain, QKV),
    "it goes on after the attention": (lambda q, k, v: plain(q, k, v).relu(), plain, QKV),
    "do not tell its scalars": (lambda q, k, v, a, b: plain(a * b * q, k, v), plain, {**QKV, "a": 0.5, "b": 0.5}),
    "neither an argument that is added": (oddly_masked, plain, QKV),
    "has no argument 'w'": (plain, plain, {**QKV, "w": "D"}),
    "returns (3, 2, 5, 13) where": (plain, lambda q, k, v: plain(q, k, v).transpose(0, 1), QKV),
    "neither the dimensions of a tensor": (plain, plain, {**QKV, "v": None}),
    "do not have the same batch and head": (
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        plain,
        {"q": "B H S D", "k": "B H T D", "v": "T E"},
    ),
    "cannot be called with B=2 H=3 S=5 D=7": (plain, lambda q, k, v: plain(q, k, v) * torch.ones(4, 1, 1), QKV),
    "is no list of dimensions": (plain, plain, {**QKV, "v": "B, H, T, E"}),
}


@pytest.mark.parametrize("reason", WRONG_PATTERNS)
def test_what_is_no_pattern_is_an_error_where_it_is_registered(reason: str) -> None:
    pattern, replacement, example = WRONG_PATTERNS[reason]
    with pytest.raises((PatternError, ExampleError)) as caught:
        latent.replace("mine", pattern, replacement, example=example)
    assert reason in str(caught.value)
    assert "mine" not in {entry.name for entry in rewrites()}


# ** wrong rewrites **


def test_a_wrong_rewrite_is_undone() -> None:
    replace_capped(lambda q, k, v, cap, scale: capped(q, k, v, 1.1 * cap, scale))
    found = outcome_of_compiling(capped_at_30)
    assert found.outcome == "undone" and "its certificate does not hold" in found.reason


def outcome_of_compiling(function: Callable[..., Tensor]) -> Any:
    inputs = qkv()
    result = torch.compile(function, backend="latent", options={"inner": "eager"})(*inputs)
    assert torch.allclose(result, function(*inputs), atol=1e-5)
    return next(v for v in latent.reports().verdicts if v.rewrite == "mine")


def test_a_replacement_that_writes_in_place_or_draws_numbers_is_not_put_in() -> None:
    replace_capped(lambda q, k, v, cap, scale: capped(q.mul_(1.0), k, v, cap, scale))
    assert "writes in place" in outcome_of_compiling(capped_at_30).reason
    unregister("mine")
    replace_capped(lambda q, k, v, cap, scale: capped(q + 0 * torch.rand(1), k, v, cap, scale))
    assert "draws random numbers" in outcome_of_compiling(capped_at_30).reason


def halves(q: Tensor, k: Tensor, v: Tensor, cap: float, scale: float) -> Tensor:
    """Right for even widths alone."""
    half = q.shape[-1] // 2 * 2
    return capped(q[..., :half], k[..., :half], v, cap, scale)


def test_an_unsound_condition_shows_the_smallest_sizes_where_it_fails() -> None:
    replace_capped(halves, where=lambda dims: dims.D >= 4, sizes={"D": 8})
    with pytest.raises(latent.testing.RewriteCheckFailed) as caught:
        latent.testing.check_rewrite("mine")
    text = str(caught.value)
    assert "B=1 H=1 S=1 D=5 T=2 E=1 cap=30 scale=0.1" in text and "relative error" in text
    assert "dims.D >= 4" in text and len(text.splitlines()) <= 4


def test_a_sound_rewrite_passes_the_check_and_what_was_tried_is_told() -> None:
    rule = replace_capped(halves, where=lambda dims: dims.D % 2 == 0, sizes={"D": 8})
    report = latent.testing.check_rewrite(rule, sizes={"D": (2, 9)}, examples=10)
    assert 0 < report.applied < report.examples and report.gradient and set(report.symbolic) == {"B", "S", "T"}


def test_a_loop_over_what_is_symbolic_is_found() -> None:
    rule = replace_capped(row_by_row)
    with pytest.raises(latent.testing.RewriteCheckFailed, match=r"with symbolic B S T:\n.* holds for one size alone"):
        latent.testing.check_rewrite(rule, examples=5)
    assert latent.testing.check_rewrite(rule, examples=5, symbolic=()).symbolic == ()


def test_a_wrong_gradient_is_found() -> None:
    replace_capped(lambda q, k, v, cap, scale: capped(q, k.detach(), v, cap, scale))
    with pytest.raises(latent.testing.RewriteCheckFailed, match="the gradient of k is off"):
        latent.testing.check_rewrite("mine", examples=5)


def test_without_hypothesis_the_check_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    rule = replace_capped()
    with pytest.raises(ImportError, match="pip install hypothesis"):
        latent.testing.check_rewrite(rule)


def test_a_class_declares_its_examples() -> None:
    plain = runpy.run_path(str(EXAMPLE.with_name("write_a_rewrite.py")))["PlainAttention"]
    closed = torch.library.custom_op(
        "custom_rewrites::closed", Tensor.clone, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    closed.register_fake(torch.empty_like)

    @latent.rewrite("mine", exact=True)
    class WithoutGradient(plain):  # type: ignore[misc]
        """softmax(scale · q kᵀ) v  ->  closed(scaled_dot_product_attention(q, k, v, scale))."""

        examples: Any = ()

        def build(self, match: Any, emit: Any) -> Any:
            return emit.call(torch.ops.custom_rewrites.closed.default, super().build(match, emit))

    with pytest.raises(ValueError, match="declares no example"):
        latent.testing.check_rewrite("mine")
    WithoutGradient.examples = ((lambda q, k, v, scale: (scale * (q @ k.mT)).softmax(-1) @ v, {**QKV, "scale": 0.5}),)
    with pytest.raises(latent.testing.RewriteCheckFailed, match="gradient"):
        latent.testing.check_rewrite("mine", examples=5)
    assert latent.testing.check_rewrite("mine", examples=5, gradient=False).applied
    WithoutGradient.example_sizes = {"D": (7, 7)}
    with pytest.raises(latent.testing.RewriteCheckFailed, match="D=7"):
        latent.testing.check_rewrite("mine", examples=5)


# ** order and caches **


def test_two_that_want_to_be_first_are_told_to_agree() -> None:
    example = {**QKV, "cap": 30.0, "scale": 0.1}

    @torch.library.custom_op("custom_rewrites::capped", mutates_args=())
    def closed(q: Tensor, k: Tensor, v: Tensor, cap: float, scale: float) -> Tensor:
        return capped(q, k, v, cap, scale)

    closed.register_fake(lambda q, k, v, cap, scale: q.new_empty(*q.shape[:-1], v.shape[-1]))
    for name in ("a_first", "b_first"):
        latent.replace(name, capped, lambda q, k, v, cap, scale: closed(q, k, v, cap, scale), example=example)
    found = outcome("b_first", capped_at_30, *qkv())
    assert found.verdict.reason == "a_first took the site; both ask to run first: order them with before or after"
    unregister("b_first")
    latent.replace("b_first", capped, row_by_row, example=example, benefit=always, before=("*", "a_first"))
    assert [entry.name for entry in rewrites()][:2] == ["b_first", "a_first"]
    with pytest.raises(ValueError, match=r"a rewrite named 'a_first' is registered already, by .*capped"):
        latent.replace("a_first", capped_at_30, capped_at_30_again, example=QKV)


def test_a_changed_replacement_does_not_meet_what_was_compiled_before() -> None:
    """Neither Dynamo's code cache, which does not know the registry, nor inductor's on disk."""
    inputs = qkv()
    options = {"rewrites": "mine"}

    def run() -> Tensor:
        return torch.compile(capped_at_30, backend="latent", options=options)(*inputs)

    results = []
    for factor in (2.0, 3.0, 2.0):
        replace_times(factor)
        results.append(run())
        unregister("mine")
    expected = capped_at_30(*inputs)
    for factor, result in zip((2.0, 3.0, 2.0), results, strict=True):
        assert torch.allclose(result, factor * expected, atol=1e-4)


def replace_times(factor: float) -> None:
    latent.replace(
        "mine", capped_at_30, lambda q, k, v: factor * capped_at_30(q, k, v), example=QKV, exact=False, benefit=always
    )


FACTOR = [2.0]


def test_a_changed_body_of_an_operator_does_not_meet_what_is_cached_on_disk() -> None:
    """The graph that is the caches' key shows the operator's name alone, and AOTAutograd compiles its body."""
    library = torch.library.Library("custom_rewrites_bodies", "DEF")
    library.define("attend(Tensor q, Tensor k, Tensor v) -> Tensor")
    library.impl("attend", lambda q, k, v: FACTOR[0] * capped_at_30(q, k, v), "CompositeImplicitAutograd")
    attend = torch.ops.custom_rewrites_bodies.attend
    latent.replace("mine", capped_at_30, lambda q, k, v: attend(q, k, v), example=QKV, exact=False)
    inputs = qkv()
    for factor in (2.0, 3.0):
        FACTOR[0] = factor
        torch._dynamo.reset()
        with torch.no_grad():
            result = torch.compile(capped_at_30, backend="latent", options={"rewrites": "mine", "strict": True})(
                *inputs
            )
        assert torch.allclose(result, factor * capped_at_30(*inputs), atol=1e-4)
