"""The engine: wrong rewrites are undone, failing ones cost a warning, order and certificates are as stated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import latent
import pytest
import torch
from latent.rewriter import rewrite as engine
from latent.rewriter.emit import Emitter
from latent.rewriter.registry import rewrites, unregister
from latent.rewriter.rules import Benefit, Cost, Match, Refusal, Verdict
from latent.rewriter.sites import AttentionSite, Bias
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

aten = torch.ops.aten
SCALE = 0.3
Build = Callable[[AttentionSite, Emitter], fx.Node]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """Registers a rule for the duration of one test."""
    names: list[str] = []

    def add(name: str, rule: type, *, exact: bool = True, **order: tuple[str, ...]) -> None:
        names.append(name)
        latent.rewrite(name, exact=exact, **order)(rule)

    yield add
    for name in names:
        unregister(name)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return (query @ key.mT * SCALE + bias).softmax(-1) @ value


def inputs() -> tuple[Tensor, ...]:
    """As many heads as tokens, so that the two can be confused without an error."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 5, 8), (2, 5, 5, 8), (2, 5, 5, 8), (5, 5))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def run(**options: Any) -> Tensor:
    with torch.no_grad():
        return torch.compile(attention, backend="latent", options={"inner": "eager", **options})(*inputs())


def verdict(name: str) -> Verdict:
    (found,) = [v for v in latent.reports().verdicts if v.rewrite == name]
    return found


def assert_right(actual: Tensor) -> None:
    torch.testing.assert_close(actual, attention(*inputs()), rtol=1e-5, atol=1e-6)


# ** rules for the tests **


def operands(site: AttentionSite) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    (bias,) = [step.bias for step in site.steps if isinstance(step, Bias)]
    assert isinstance(bias, fx.Node)
    return site.query.root, site.key.root, site.value.root, bias


def right(site: AttentionSite, emit: Emitter) -> fx.Node:
    query, key, value, bias = operands(site)
    return emit.call(aten.scaled_dot_product_attention.default, query, key, value, bias, scale=SCALE)


def swapped_axes(site: AttentionSite, emit: Emitter) -> fx.Node:
    query, key, value, bias = operands(site)
    turned = emit.call(aten.transpose.int, query, 1, 2)
    return emit.call(aten.scaled_dot_product_attention.default, turned, key, value, bias, scale=SCALE)


def wrong_scale(site: AttentionSite, emit: Emitter) -> fx.Node:
    query, key, value, bias = operands(site)
    return emit.call(aten.scaled_dot_product_attention.default, query, key, value, bias)


def slightly_wrong_scale(site: AttentionSite, emit: Emitter) -> fx.Node:
    query, key, value, bias = operands(site)
    return emit.call(aten.scaled_dot_product_attention.default, query, key, value, bias, scale=SCALE * (1 + 1e-6))


def dropped_mask(site: AttentionSite, emit: Emitter) -> fx.Node:
    query, key, value, _ = operands(site)
    return emit.call(aten.scaled_dot_product_attention.default, query, key, value, scale=SCALE)


def transposed_mask(site: AttentionSite, emit: Emitter) -> fx.Node:
    query, key, value, bias = operands(site)
    turned = emit.call(aten.transpose.int, bias, 0, 1)
    return emit.call(aten.scaled_dot_product_attention.default, query, key, value, turned, scale=SCALE)


def other_shape(site: AttentionSite, emit: Emitter) -> fx.Node:
    return emit.call(aten.unsqueeze.default, right(site, emit), 0)


def not_a_number(site: AttentionSite, emit: Emitter) -> fx.Node:
    return emit.call(aten.mul.Tensor, right(site, emit), float("nan"))


BROKEN = (swapped_axes, wrong_scale, slightly_wrong_scale, dropped_mask, transposed_mask, other_shape, not_a_number)
WRONG = pytest.mark.parametrize("build", BROKEN, ids=lambda build: build.__name__)


def rule(build: Build, raises_in: str = "") -> type:
    """A rewrite of attention spelled out, with this way to build it, that may raise in one of its methods."""

    def maybe_raise(method: str) -> None:
        if method == raises_in:
            raise KeyError(f"no luck in {method}")

    class Rule:
        """attention(q, k, v)  ->  whatever the test builds."""

        def match(self, site: AttentionSite) -> Match | Refusal:
            maybe_raise("match")
            return Match(site) if site.call is None else Refusal("it is one fused call", site.anchor)

        def benefit(self, match: Match) -> Benefit:
            maybe_raise("benefit")
            return Benefit(Cost(2, 2), Cost(1, 1))

        def build(self, match: Match, emit: Emitter) -> fx.Node:
            new = build(match.site, emit)
            maybe_raise("build")
            return new

    return Rule


# ** certificates **


def test_right_rewrite_is_applied_and_certified(register: Callable[..., None]) -> None:
    register("mine", rule(right), before=("fuse_attention",))
    assert_right(run(strict=True))
    found = verdict("mine")
    assert found.outcome == "applied"
    assert found.error is not None and found.error < 1e-12


@WRONG
def test_broken_rewrite_is_undone_and_reported(
    build: Build, register: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    register("mine", rule(build), before=("fuse_attention",))
    with caplog.at_level(logging.WARNING, logger="latent"):
        assert_right(run())
    found = verdict("mine")
    assert (found.outcome, "certificate" in found.reason) == ("undone", True)
    assert f"{__name__.rpartition('.')[2]}.py" in found.line
    assert verdict("fuse_attention").outcome == "applied", "the site is there for the next rewrite"
    assert [record.levelname for record in caplog.records if "mine" in record.getMessage()] == ["WARNING"]
    assert "undone" in str(latent.reports())


@WRONG
def test_broken_rewrite_raises_when_strict(build: Build, register: Callable[..., None]) -> None:
    register("mine", rule(build), before=("fuse_attention",))
    with pytest.raises(BackendCompilerFailed, match=r"mine .*certificate does not hold"):
        run(strict=True)


def test_nothing_is_certified_when_verification_is_off(register: Callable[..., None]) -> None:
    register("mine", rule(wrong_scale), before=("fuse_attention",))
    actual = run(verify="off")
    assert (verdict("mine").outcome, verdict("mine").error) == ("applied", None)
    assert [graph.certificates for graph in latent.reports().graphs] == [0]
    assert not torch.allclose(actual, attention(*inputs()), rtol=1e-3), "it was the certificate that caught it"


@pytest.fixture
def certified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the outputs that were certified."""
    names: list[str] = []
    run = engine.Comparison.run

    def spy(comparison: engine.Comparison) -> Any:
        names.append(comparison.original.name)
        return run(comparison)

    monkeypatch.setattr(engine.Comparison, "run", spy)
    return names


LAYERS = 12


class Stack(nn.Module):
    """Identical layers; `heads` of the last may differ."""

    def __init__(self, last: int = 2) -> None:
        super().__init__()
        self.heads = [2] * (LAYERS - 1) + [last]
        torch.manual_seed(0)
        self.projections = nn.ModuleList(nn.Linear(8, 24, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for heads, projection in zip(self.heads, self.projections, strict=True):
            parts = projection(x).unflatten(-1, (3, heads, 8 // heads)).permute(2, 0, 3, 1, 4)
            x = x + attention(parts[0], parts[1], parts[2], bias).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize(
    ("verify", "last", "count"),
    [("fast", 2, 1), ("fast", 4, 2), ("full", 2, LAYERS), ("off", 2, 0)],
    ids=["identical layers once", "another layer apart", "every layer when asked", "none when off"],
)
def test_certificates_serve_identical_layers(verify: str, last: int, count: int, certified: list[str]) -> None:
    model, x, bias = Stack(last), torch.randn(2, 5, 8), torch.randn(5, 5)
    options = {"inner": "eager", "strict": True, "verify": verify, "rewrites": ("fuse_attention",)}
    with torch.no_grad():
        actual = torch.compile(model, backend="latent", options=options)(x, bias)
        torch.testing.assert_close(actual, model(x, bias), rtol=1e-4, atol=1e-5)
    assert latent.reports().count("fuse_attention") == LAYERS
    assert len(certified) == count


def shares_heads_in_two_ways(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Query heads 0 1 share a key head, then query heads 0 2 do: two layers with the same operators and shapes."""
    outs = []
    for axis in (2, 1):
        keys, values = (t.unsqueeze(axis).expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8) for t in (key, value))
        outs.append((query @ keys.mT * SCALE).softmax(-1) @ values)
    return outs[0], outs[1]


def folded_without_looking(site: AttentionSite, emit: Emitter) -> fx.Node:
    query, key, value = site.query.root, site.key.root, site.value.root
    call = aten.scaled_dot_product_attention.default
    return emit.call(call, query, key, value, scale=SCALE, enable_gqa=True)


def test_certificate_is_not_lent_to_a_layer_with_other_operands(register: Callable[..., None]) -> None:
    register("mine", rule(folded_without_looking), before=("fuse_attention",))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2)]
    with torch.no_grad():
        actual = torch.compile(shares_heads_in_two_ways, backend="latent", options={"inner": "eager"})(*given)
        torch.testing.assert_close(actual, shares_heads_in_two_ways(*given), rtol=1e-5, atol=1e-6)
    assert [v.outcome for v in latent.reports().verdicts if v.rewrite == "mine"] == ["applied", "undone"]


# ** rules that raise **


@pytest.mark.parametrize("method", ["match", "benefit", "build"])
def test_rule_that_raises_costs_a_warning(
    method: str, register: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    register("mine", rule(right, raises_in=method), before=("fuse_attention",))
    with caplog.at_level(logging.WARNING, logger="latent"):
        assert_right(run())
    found = verdict("mine")
    assert (found.outcome, f"no luck in {method}" in found.reason) == ("failed", True)
    assert verdict("fuse_attention").outcome == "applied"
    assert len([record for record in caplog.records if "mine" in record.getMessage()]) == 1


@pytest.mark.parametrize("method", ["match", "benefit", "build"])
def test_rule_that_raises_raises_when_strict(method: str, register: Callable[..., None]) -> None:
    register("mine", rule(right, raises_in=method))
    with pytest.raises(BackendCompilerFailed, match=f"no luck in {method}"):
        run(strict=True, rewrites=("mine",))


def nothing_at_all(site: AttentionSite, emit: Emitter) -> Any:
    return None


@pytest.mark.parametrize("verify", ["fast", "off"])
def test_rule_that_builds_nothing_fails(verify: str, register: Callable[..., None]) -> None:
    register("mine", rule(nothing_at_all), before=("fuse_attention",))
    assert_right(run(verify=verify))
    assert verdict("mine").outcome == "failed"


def test_rule_that_does_not_pay_is_not_built(register: Callable[..., None]) -> None:
    class Dear(rule(right)):  # type: ignore[misc]
        def benefit(self, match: Match) -> Benefit:
            return Benefit(Cost(1, 1), Cost(1, 2))

    register("mine", Dear, before=("fuse_attention",))
    assert_right(run(strict=True))
    assert verdict("mine").outcome == "not paying"


# ** order **


def names() -> list[str]:
    return [entry.name for entry in rewrites()]


def test_before_and_after_are_kept(register: Callable[..., None]) -> None:
    register("a_late", rule(right), after=("z_early",))
    register("z_early", rule(right), before=("fuse_attention",))
    register("middle", rule(right), after=("z_early",), before=("a_late",))
    order = names()
    assert order.index("z_early") < order.index("middle") < order.index("a_late")
    assert order.index("z_early") < order.index("fuse_attention")
    assert names() == order


def test_unknown_neighbours_do_not_matter(register: Callable[..., None]) -> None:
    register("mine", rule(right), after=("nobody",), before=("nobody_else",))
    assert "mine" in names()


def test_cycle_is_named_and_the_model_still_answers(
    register: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    register("chicken", rule(right), after=("egg",))
    register("egg", rule(right), after=("chicken",))
    with pytest.raises(ValueError, match="chicken") as caught:
        rewrites()
    assert "egg" in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="latent"):
        assert_right(run())
    assert ["cycle" in record.getMessage() for record in caplog.records] == [True]


def test_name_is_registered_once(register: Callable[..., None]) -> None:
    register("mine", rule(right))
    with pytest.raises(ValueError, match="registered already"):

        @latent.rewrite("mine", exact=True)
        class Other:
            """Another rule of the same name."""


# ** several rules, one site **

torch.library.define("latent_tests::closed", "(Tensor q, Tensor k, Tensor v, Tensor b, float scale) -> Tensor")


@torch.library.impl("latent_tests::closed", "CompositeExplicitAutograd")
def _closed(q: Tensor, k: Tensor, v: Tensor, b: Tensor, scale: float) -> Tensor:
    return (q @ k.mT * scale + b).softmax(-1) @ v


torch.library.register_fake("latent_tests::closed", lambda q, k, v, b, scale: q.new_empty(*q.shape[:-1], v.shape[-1]))


def closed(site: AttentionSite, emit: Emitter) -> fx.Node:
    return emit.call(torch.ops.latent_tests.closed.default, *operands(site), SCALE)


def test_second_rule_is_told_who_took_the_site(register: Callable[..., None]) -> None:
    register("first", rule(closed), before=("second", "fuse_attention"))
    register("second", rule(closed))
    assert_right(run(strict=True, rewrites=("first", "second", "fuse_attention")))
    assert verdict("first").outcome == "applied"
    assert (verdict("second").outcome, verdict("second").reason) == ("refused", "first took the site")
    assert (verdict("fuse_attention").outcome, verdict("fuse_attention").reason) == ("refused", "first took the site")


def test_second_rule_sees_what_the_first_left(register: Callable[..., None]) -> None:
    register("first", rule(right), before=("second", "fuse_attention"))
    register("second", rule(right))
    assert_right(run(strict=True))
    assert verdict("first").outcome == "applied"
    assert (verdict("second").outcome, verdict("second").reason) == ("refused", "it is one fused call")


# ** lossy rules **


def test_lossy_rule_does_not_run_by_itself(register: Callable[..., None]) -> None:
    register("mine", rule(wrong_scale), exact=False, before=("fuse_attention",))
    assert_right(run(strict=True))
    assert (verdict("mine").outcome, "lossy" in verdict("mine").reason) == ("off", True)


def test_lossy_rule_runs_when_named(register: Callable[..., None]) -> None:
    register("mine", rule(wrong_scale), exact=False, before=("fuse_attention",))
    actual = run(strict=True, rewrites=("mine",))
    assert verdict("mine").outcome == "applied"
    assert not torch.allclose(actual, attention(*inputs()), rtol=1e-3)


def test_nothing_of_a_test_stays_registered() -> None:
    assert not {"mine", "first", "second", "chicken", "egg", "middle"} & set(names())
