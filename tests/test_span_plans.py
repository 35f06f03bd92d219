"""Span plans as data: what spans mean, plans that people write, and how spans are chosen."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from latent.rewriter.command.cli import app
from latent.rewriter.convert.attention import ConvertedAttention
from latent.rewriter.convert.calibrate import Calibration
from latent.rewriter.convert.layers import ConversionRefused
from latent.rewriter.convert.read_decoder import read_decoder
from latent.rewriter.convert.spans.allocation import allocate, candidates, pareto, window_of
from latent.rewriter.convert.spans.plan import PlanError, SpanPlan
from latent.rewriter.convert.spans.profile import influence, profile_spans, recall_gain, retrieval_scores
from latent.rewriter.convert.spans.span import Full, Span, Strided, Window, seen, seen_in_band
from torch import Tensor
from typer.testing import CliRunner

EVERY: list[Span] = [
    Full(),
    Window(0, 1),
    Window(3, 7),
    Window(2, 1, 0.37),
    Window(9, 4, 0.75),
    Strided(4, 2, 3, 1),
    Strided(1, 1, 2, 5),
    Strided(5, 3, 1, 0),
]


@pytest.mark.parametrize("span", EVERY, ids=str)
def test_what_is_kept_and_held_is_what_later_queries_see(span: Span) -> None:
    at = torch.arange(70)
    shown = seen(span, at[:, None], at[None])
    assert bool(shown.diagonal().all()) and not bool(shown.triu(1).any())
    kept = at[span.keeps(at)]
    assert torch.equal(span.slot(kept), torch.arange(len(kept)))
    assert torch.equal(span.token(span.slot(kept)), kept)
    for n in range(1, 71):
        assert span.kept(n) == int((kept < n).sum())
        later = seen_in_band(span, at[n - 1 :, None], at[None, :n]).any(0)
        assert not bool(later[: n - span.held(n)].any())
        assert bool((shown[n - 1] == (seen_in_band(span, at[n - 1], at) | (span.keeps(at) & (at < n)))).all())


@pytest.mark.parametrize(
    ("block", "local", "stride", "heads"), [(4, 2, 3, 3), (2, 1, 4, 4), (3, 2, 4, 2), (4, 3, 1, 2)]
)
def test_strided_heads_are_those_of_the_paper(block: int, local: int, stride: int, heads: int) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = SpanPlan.strided(1, heads, block, local, stride)
    step = max(1, stride // heads)
    at = torch.arange(60)
    q, k = at[:, None], at[None]
    union = torch.zeros(60, 60, dtype=torch.bool)
    for _, h, span in plan.heads:
        own, other = q // block, k // block
        wanted = (k <= q) & ((own - other < local) | ((other + h * step + 1) % stride == 0))
        assert torch.equal(seen(span, q, k), wanted)
        union |= wanted
    covered = torch.equal(union, k <= q)
    assert covered == (heads >= stride) == (not told)


def test_plans_are_written_and_read() -> None:
    plan = SpanPlan((tuple(EVERY), tuple(EVERY), (Full(),) * 2, (Window(4, 100, 0.25),) * 3))
    assert SpanPlan.from_yaml(plan.to_yaml()) == plan
    assert "  0-1:\n  - full\n" in plan.to_yaml()
    short = "layers: {0-1: [full, {alpha: 3}], 2: [{sinks: 2, beta: 0.5}, {block: 4, local: 2, stride: 2}]}"
    assert SpanPlan.from_yaml(short).layers[1:] == (
        (Full(), Window(0, 3)),
        (Window(2, 1, 0.5), Strided(4, 2, 2)),
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("layers: {0: [full, {alpha: 4, beta: 1.5}]}", "layer 0, head 1: beta is 1.5; it is a share of the length"),
        ("layers: {0-3: [{alpha: 0}]}", "layer 0, head 0: alpha is 0; a token sees itself"),
        ("layers: {2: [{alpha: 4, bta: 1}]}", "layer 2, head 0: window has no bta; it has sinks, alpha, beta"),
        ("layers: {0: [full, {alpha: 2.5}]}", "layer 0, head 1: alpha is 2.5; it is a whole number"),
        ("layers: {0: [{block: 4, local: 1}]}", "layer 0, head 0: strided needs stride"),
        ("layers: {0: [{block: 0, local: 1, stride: 2}]}", "layer 0, head 0: block is 0; it is at least 1"),
        ("layers: {0: [all]}", "layer 0, head 0: there is no kind 'all'; there are full, window, strided"),
        ("layers: {0: [{sinks: 3}]}", "layer 0, head 0: window needs alpha, beta, or both"),
        ("layers: {0: [3]}", "layer 0, head 0: 3 is no span"),
        ("layers: {0: full}", "layer 0: it is a list"),
        ("layers: {first: [full]}", "layer first: a layer is a number"),
        ("layers: {0: [full], 2: [full]}", "layer 1 is missing"),
        ("layers: {0-1: [full], 1: [full]}", "layer 1 is given twice"),
        ("[full]", "it has no entry `layers`"),
        ("layers: {0: [full", "p.yaml: while parsing"),
    ],
)
def test_errors_say_which_layer_and_head(text: str, reason: str) -> None:
    with pytest.raises(PlanError, match=r"p\.yaml: ") as error:
        SpanPlan.from_yaml(text, "p.yaml")
    assert reason in str(error.value)


def test_streaming_plans_keep_the_retrieval_heads() -> None:
    plan = SpanPlan.streaming(2, 3, {(0, 1), (1, 2)}, 4, 16)
    assert [(n, g) for n, g, span in plan.heads if span == Full()] == [(0, 1), (1, 2)]
    assert plan.rows(100) == 2 * 100 + 4 * 20
    with pytest.raises(PlanError, match="there is no layer 2, head 0: 2 layers × 3 heads"):
        SpanPlan.streaming(2, 3, {(2, 0)})


# ** choosing **


@pytest.mark.parametrize("classes", [0, 1, 2])
def test_the_integer_program_finds_the_best_plan(classes: int) -> None:
    choices: list[Span] = [Window(1, 4), Window(1, 9), Window(1, 20), Full()]
    generator = torch.Generator().manual_seed(classes)
    costs = [torch.rand(3, 4, generator=generator).sort(1, descending=True).values for _ in range(2)]
    best = float("inf")
    for picked in itertools.product(range(4), repeat=6):
        rows = {n: sum(choices[c].rows(n) for c in picked) for n in (40, 64)}
        kinds = max(len(set(picked[:3])), len(set(picked[3:])))
        if all(total <= 0.5 * n * 6 for n, total in rows.items()) and (not classes or kinds <= classes):
            best = min(best, sum(float(costs[h // 3][h % 3, c]) for h, c in enumerate(picked)))
    found = allocate(costs, choices, 0.5, (40, 64), classes)
    assert found.cost == pytest.approx(best, rel=1e-6)
    assert all(share <= 0.5 for share in found.density.values())
    assert not classes or all(len(set(spans)) <= classes for spans in found.plan.layers)


def test_spans_grow_to_lengths_that_the_text_does_not_reach() -> None:
    assert not any(isinstance(span, Window) and span.beta for span in candidates((512,), 4, 512))
    beyond = candidates((8192,), 4, 512)
    assert all(span == Full() or (isinstance(span, Window) and span.beta) for span in beyond)
    assert min(span.rows(512) for span in beyond) < 0.05 * 512


def test_more_room_never_costs_more() -> None:
    choices = candidates((128,), 4)
    draws = (torch.rand(3, len(choices), generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    costs = [draw.sort(1, descending=True).values for draw in draws]
    front = pareto(costs, choices, (0.25, 0.3, 0.5, 0.75, 1.0), (128,))
    assert [one.cost for one in front] == sorted((one.cost for one in front), reverse=True)
    assert front[-1].plan == SpanPlan.uniform(2, 3, Full())
    with pytest.raises(ConversionRefused, match=r"0\.001 of 128 tokens is too little.*narrowest span takes 0\.039"):
        allocate(costs, choices, 0.001, (128,))


@pytest.mark.parametrize("lengths", [(100,), (64, 256)])
def test_the_uniform_window_fills_its_share(lengths: tuple[int, ...]) -> None:
    span = window_of(0.5, lengths, 4)
    assert all(0.42 * n < span.rows(n) <= 0.5 * n for n in lengths)


# ** profiles **


def tiny() -> Any:
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = transformers.LlamaConfig(**sizes, **heads, attn_implementation="eager")
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def loss_of(model: Any, tokens: Tensor, layer: int = 0, bias: Tensor | None = None) -> Tensor:
    """The loss, numbers [H, S, S] added to the scores of a layer."""

    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + (0 if bias is None else bias)}

    handle = model.model.layers[layer].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def test_influence_is_how_the_loss_moves_when_a_key_goes() -> None:
    model, length = tiny(), 14
    tokens = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
    decoder = read_decoder(model)
    attentions = [ConvertedAttention.of(layer) for layer in decoder.layers]
    choices: list[Span] = [Window(0, w) for w in range(1, length + 1)]
    found = profile_spans(attentions, decoder, Calibration(model, tokens), choices)
    assert not any(module in list(model.modules()) for module in attentions)
    with torch.no_grad():
        weights = model(input_ids=tokens, output_attentions=True).attentions
    for n in range(2):
        bias = torch.zeros(4, length, length, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss_of(model, tokens, n, bias), bias)
        wanted = -slope / (1 - weights[n][0]).clamp_min(1e-6)  # a key fades: its score falls, the rest is renormalised
        wanted[:, 0] = 0  # one key alone cannot go
        step, at = 1e-3, (2, 9, 4)
        fade = torch.zeros(4, length, length, dtype=torch.float64)
        fade[at] = step
        with torch.no_grad():
            moved = (loss_of(model, tokens, n, -fade) - loss_of(model, tokens, n, fade)) / (2 * step)
        assert float(moved / (1 - weights[n][0][at])) == pytest.approx(float(wanted[at]), rel=1e-3)
        hidden = torch.stack([torch.ones(length, length).tril(-w) for w in range(1, length + 1)]).double()
        for profile, x in ((found.influence, wanted.abs()), (found.mass, weights[n][0].double())):
            by_group = x.view(2, 2, length, length).sum(1)
            expected = torch.einsum("gij,wij->gw", by_group, hidden)
            torch.testing.assert_close(profile[n], expected, rtol=1e-4, atol=1e-6)
            assert float(profile[n][:, -1].abs().max()) == 0


def test_the_formula_of_influence_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, values = (
        torch.randn(9, dtype=torch.float64, generator=generator),
        torch.randn(9, generator=generator).double(),
    )
    weights = scores.softmax(0).requires_grad_()
    (gradient,) = torch.autograd.grad(torch.sin(weights @ values), weights)
    found = influence(weights.detach(), gradient)
    for j in range(9):
        step = 1e-6  # a step of the way to the row without j
        gone = torch.where(torch.arange(9) == j, 0.0, weights.detach() / (1 - weights[j].detach()))
        there = weights.detach() + step * (gone - weights.detach())
        moved = (torch.sin(there @ values) - torch.sin(weights.detach() @ values)) / step
        assert float(found[j]) == pytest.approx(float(moved), rel=1e-4)


def test_retrieval_scores_are_the_weights_on_what_came_next() -> None:
    model = tiny()
    scores = retrieval_scores(model, gap=10, rows=1, seed=3)
    once = torch.randint(0, 64, (1, 10), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        weights = model(input_ids=torch.cat((once, once), 1), output_attentions=True).attentions
    for n, layer in enumerate(scores):
        looked = torch.stack([weights[n][0, :, i, i - 9] for i in range(10, 19)]).mean(0)
        assert layer == pytest.approx(looked.view(2, 2).amax(1).tolist(), rel=1e-4)
    assert abs(recall_gain(model, gap=10)) < 3


# ** the command **


def test_masks_draws_a_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    SpanPlan(((Full(), Window(2, 4)),) * 3 + ((Strided(4, 1, 2, 1), Full()),)).save(file)
    result = CliRunner().invoke(app, ["masks", str(file), "--len", "12"])
    assert result.exit_code == 0, result.output
    assert "layers.[0-2].heads.1 × 3" in result.output and "last 4, first 2" in result.output
    assert "  ████····████" in result.output
    only = CliRunner().invoke(app, ["masks", str(file), "--layer", "3", "--len", "12", "--json"])
    drawn = json.loads(only.stdout)["masks"]
    at = torch.arange(12)
    rows = ["".join("01"[x] for x in row) for row in seen(Strided(4, 1, 2, 1), at[:, None], at[None]).int().tolist()]
    assert [one["rows"] for one in drawn if one["paths"] == ["layers.3.heads.0"]] == [rows]
    wrong = CliRunner().invoke(app, ["masks", str(file), "--layer", "4"])
    assert wrong.exit_code == 1 and "--layer 4: the plan has 4 layers" in wrong.output
    file.write_text("layers: {0: [{alpha: -1}]}")
    wrong = CliRunner().invoke(app, ["masks", str(file)])
    assert wrong.exit_code == 1 and "layer 0, head 0: alpha is -1" in wrong.output
