"""latent.explain looks and changes nothing; reports read well."""

import copy
import dataclasses
import json
import re

import latent
import pytest
import torch
from latent.rewriter.describe import Shape
from latent.rewriter.environment import Run
from latent.rewriter.options import Options
from latent.rewriter.report import Break, GraphReport, MissReport, Report, SiteReport
from latent.rewriter.rules import Estimate, Verdict
from torch import nn


class Attention(nn.Module):
    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, interrupt=False):
        self.calls += 1
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if interrupt:
            torch._dynamo.graph_break()
        return ((q @ k.transpose(-1, -2) / 3).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x, **kwargs):
        for layer in self.layers:
            x = x + layer(x, **kwargs)
        return torch.nn.functional.dropout(x, 0.1, self.training)

    def twice(self, x):
        return self(self(x)[:, :3])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stack().eval()


X = torch.arange(2 * 5 * 16).reshape(2, 5, 16) / 100


@torch.no_grad()
def test_finds_sites_and_verdicts(model):
    report = latent.explain(model)(X)
    assert isinstance(report, latent.Report)
    assert report.count("attention") == report.count("fuse_attention") == 3
    assert [site.path for site in report.sites] == [f"layers.{n}" for n in range(3)]
    assert report.sites[0].line.startswith("test_explain.py:")
    assert report.breaks == () and report.graphs[0].compilation == "0/0"
    assert {v.rewrite for v in report.verdicts} >= {"fuse_attention", "fold_repeated_heads"}


@torch.no_grad()
def test_text_collapses_layers_and_is_aligned(model):
    text = str(latent.explain(model)(X))
    assert "1 graph · 0 graph breaks · 1 compilation" in text
    assert "layers.[0-2] × 3" in text
    starts = {line.index(" of 3") for line in text.splitlines() if " of 3" in line}
    assert len(starts) == 1


def test_changes_neither_model_nor_random_state(model):
    model.train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = set(vars(model))
    latent.explain(model)(X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert set(vars(model)) == attributes and model._compiled_call_impl is None
    assert all(p.grad is None for p in model.parameters())


def test_leaves_other_compilations_alone(model):
    compilations = []

    def backend(gm, inputs):
        compilations.append(len(gm.graph.nodes))
        return gm.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(X)
        counters = copy.deepcopy(torch._dynamo.utils.counters)
        latent.explain(model)(X)
        latent.explain(compiled)(X[:, :3])
        compiled(X)
        assert len(compilations) == 1
        assert torch._dynamo.utils.counters == counters
        compiled(X[:, :4])  # the lengths that explain saw do not count: this is the second length, not the fourth
    assert len(compilations) == 2


@torch.no_grad()
def test_leaves_no_code_behind(model):
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, _get_total_cache_entry_count
    from torch._dynamo.convert_frame import input_codes

    def entries():
        codes = [code for ref in input_codes.seen if (code := ref()) is not None]
        return sum(_get_total_cache_entry_count(code) + len(_debug_get_cache_entry_list(code)) for code in codes)

    torch._dynamo.reset()
    before = entries()
    latent.explain(model)(X)
    latent.explain(model)(X, interrupt=True)
    assert entries() == before


@torch.no_grad()
def test_says_the_same_every_time(model):
    first = latent.explain(model)(X)
    latent.explain(model)(X[:, :4])
    again = latent.explain(model)(X)
    assert [g.name for g in again.graphs] == [g.name for g in first.graphs] == ["graph 0 [0/0]"]
    assert again.sites == first.sites


@torch.no_grad()
def test_does_not_appear_among_the_reports(model):
    before = latent.reports()
    latent.explain(model)(X)
    assert latent.reports() == before


@torch.no_grad()
def test_takes_compiled_models_and_functions(model):
    assert latent.explain(torch.compile(model, backend="eager"))(X).count("attention") == 3
    assert latent.explain(model.forward)(X).count("attention") == 3
    assert latent.explain(lambda x: model(x) + 1)(X).count("attention") == 3
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert latent.explain(model)(X).count("attention") == 3
    assert model._compiled_call_impl is compiled


@torch.no_grad()
def test_methods_show_every_compilation(model):
    report = latent.explain(model.twice)(X)
    assert [g.compilation for g in report.graphs] == ["0/0", "0/1"]
    assert report.count("attention") == 6 and report.least("attention") == 3
    assert "graph 1 [0/1] · graph 0 once more" in str(report)
    assert str(report).count("lowered") == 2 and "lowered: as before" in str(report)


@torch.no_grad()
def test_dynamic_shapes(model):
    assert not latent.explain(model, dynamic=True)(X).sites[0].shape.queries.isdigit()


@torch.no_grad()
def test_graph_breaks_are_counted_and_placed():
    report = latent.explain(Stack(1).eval())(X, interrupt=True)
    assert len(report.breaks) >= 1
    assert any("graph_break" in each.code and each.line.startswith("test_explain.py:") for each in report.breaks)
    assert "graph break" in str(report)
    assert report.count("attention") == 1


@torch.no_grad()
def test_a_failing_stage_is_reported(model, monkeypatch):
    def broken(graph):
        raise RuntimeError("no luck")

    monkeypatch.setattr("latent.rewriter.backend.recognise", broken)
    report = latent.explain(model)(X)
    assert report.graphs[0].failure == "recognise: RuntimeError: no luck"
    assert "✗ failed" in str(report)


@torch.no_grad()
def test_options(model):
    report = latent.explain(model, rewrites=["fold_repeated_heads"], verify="off")(X)
    assert {v.outcome for v in report.verdicts if v.rewrite == "fuse_attention"} == {"off"}
    with pytest.raises(latent.OptionError, match="no rewrite is named 'fuse'"):
        latent.explain(model, rewrites="fuse")
    with pytest.raises(latent.OptionError, match="'verify'"):
        latent.explain(model, verify="sometimes")


@torch.no_grad()
def test_errors_of_the_model_come_through(model):
    with pytest.raises(TypeError):
        latent.explain(model)(X, nonsense=1)
    assert model._compiled_call_impl is None


@torch.no_grad()
def test_check(model):
    assert latent.check(model, {"attention": 3, "fuse_attention": 3})(X).count("attention") == 3
    with pytest.raises(latent.ExpectationFailed, match=r"attention: expected 4, found 3[\s\S]*layers\.\[0-2\]"):
        latent.check(model, expect={"attention": 4})(X)
    with pytest.raises(latent.ExpectationFailed):  # two compilations of three sites are not six
        latent.check(model.twice, expect={"attention": 6})(X)
    with pytest.raises(latent.OptionError):
        latent.check(model, expect={"atention": 4})


@torch.no_grad()
def test_near_miss_is_short_and_placed():
    def wrong_axis(q, k, v):
        return (q @ k.mT).softmax(-2) @ v

    report = latent.explain(wrong_axis)(*torch.randn(3, 2, 4, 4, 8))
    assert report.count("attention") == 0 and len(report.near_misses) == 1
    text = str(report).splitlines()
    start = next(n for n, line in enumerate(text) if line.startswith("near miss"))
    assert len(text) - start <= 10
    assert "softmax(-2) @ v" in text[start + 2] and "→" in text[start + 3]


def test_json_round_trip(model):
    with torch.no_grad():
        report = latent.explain(model)(X)
    data = json.loads(report.to_json())
    assert data["graphs"][0]["sites"][2]["path"] == "layers.2" and data["breaks"] == []


@torch.no_grad()
def test_a_part_of_a_report(model):
    report = latent.explain(model)(X)
    for pattern, paths in {"layers.1": ["layers.1"], "layers.*": ["layers.0", "layers.1", "layers.2"], "x": []}.items():
        part = report.only(site=pattern)
        assert [site.path for site in part.sites] == paths and part.count("fuse_attention") == len(paths)
        assert [site.index for site in part.sites] == list(range(len(paths)))
    assert "layers.1   test_explain.py" in str(report.only(site="layers.1"))


class Calls(nn.Module):
    def forward(self, q, scale=None):
        return (q @ q.mT * (2 if scale is None else scale)).softmax(-1) @ q

    def several(self, q):
        self(q), self(q[:, :, :3]), self(q[:, :, :3], scale=3)


@torch.no_grad()
def test_what_is_compiled_again_says_why_in_torchs_words():
    report = latent.explain(Calls().several)(torch.randn(2, 4, 6, 8))
    first, second, third = (graph.again for graph in report.graphs)
    assert not first
    assert second == "tensor 'q' size mismatch at index 2. expected 6, actual 3"
    assert re.fullmatch(r"no longer so: scale (is|==) None   test_explain.py:\d+", third)
    assert str(report).count("compiled again, torch says: ") == 2
    pytest.importorskip("jinja2")
    assert "size mismatch at index 2" in page_of(report)


def page_of(report):
    from latent.rewriter.page.reading import Material
    from latent.rewriter.page.render import render

    return render(Material(report, Run())).split("Graphs and breaks")[1].split("Environment")[0]


# ** text, from values **


def test_the_nearest_misses_alone():
    misses = [MissReport(f"a.{n}", f"m.py:{n}", "x", f"reason {n}", "node", n) for n in range(3)]
    (part,) = Report((graph(misses=misses),)).only(near=1).graphs
    assert [miss.reason for miss in part.misses] == ["reason 2"]


def test_bytes_are_summed_over_equal_sites():
    estimate = Estimate(8000, 2000, 8000, 500)
    verdicts = tuple(Verdict(n, "fuse_attention", "applied", error=1e-16, estimate=estimate) for n in range(2))
    assert "1e-16 in fp64 · moves 4 kB → 1 kB" in str(Report((dataclasses.replace(graph(), verdicts=verdicts),)))


def graph(number=0, compilation="0/0", paths=("a.0", "a.1"), queries="8", misses=(), outcome="applied"):
    shape = Shape("4", "1", queries, "8", "16", "16", "float32")
    sites = tuple(SiteReport(n, p, "m.py:1", "softmax", "softmax_j( … )", "none", shape) for n, p in enumerate(paths))
    verdicts = tuple(Verdict(n, "fuse_attention", outcome, "why", "m.py:2") for n in range(len(paths)))
    return GraphReport(f"graph {number} [{compilation}]", 10, sites, verdicts, tuple(misses), seconds={"capture": 0.5})


def test_an_equal_second_compilation_says_so():
    text = str(Report((graph(), graph(1, "0/1"))))
    assert "attention   2 sites: as before" in text and "rewrites: as before" in text
    assert text.count("softmax_j") == 1


def test_a_second_compilation_shows_what_differs():
    text = str(Report((graph(), graph(1, "0/1", queries="1"))))
    assert "1 query × 8 keys" in text and "rewrites: as before" in text


def test_what_did_not_change_is_told_apart():
    misses = [MissReport("a", f"m.py:{n}", "x", f"reason {n}", "node", 1) for n in range(2)]
    text = str(Report((graph(misses=misses[:1]), graph(1, "0/1", misses=misses))))
    assert "near misses   2 · others as before" in text and text.count("reason 0") == 1


class Buffered(nn.Module):
    """Attention whose mask is known when it runs."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("seen", torch.rand(5, 5) > 0.1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).masked_fill(~self.seen, -torch.inf).softmax(-1) @ v


class Twelve(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(Buffered() for _ in range(12)))

    def forward(self, x):
        return self.layers(x)


@torch.no_grad()
def test_layers_that_differ_in_their_own_names_are_one_line():
    report = latent.explain(Twelve())(torch.randn(2, 3, 5, 16))
    said = " ".join(str(report).split())
    assert "layers.[0-11] × 12 test_explain.py" in said
    assert "mask opaque: layers.[0-11].seen is an input of the graph" in said
    assert "refused 12 of 12 the mask is not proven: layers.[0-11].seen is an input" in said
    assert {site.mask.partition(" is ")[0] for site in report.sites} == {f"opaque: layers.{n}.seen" for n in range(12)}


def test_numbers_that_are_no_layers_are_kept_apart():
    shown = graph(paths=("a.0", "a.1"))
    reasons = (dataclasses.replace(v, outcome="refused", reason=f"scaled by 0.{v.site}") for v in shown.verdicts)
    text = str(Report((dataclasses.replace(shown, verdicts=tuple(reasons)),)))
    assert "scaled by 0.0" in text and "scaled by 0.1" in text


def test_undone_verdicts_show_their_line():
    assert "✗ fuse_attention  undone  2 of 2   why   m.py:2" in str(Report((graph(outcome="undone"),)))


def test_long_reasons_are_wrapped_and_cut():
    miss = MissReport("a.0", "m.py:3", "x = " + "y + " * 60 + "y", "because " * 200, "node", 2)
    text = str(Report((graph(misses=[miss]),)))
    assert max(map(len, text.splitlines())) <= 114
    assert len(text.split("near miss")[1].splitlines()) <= 10


def test_breaks_without_graphs():
    text = str(Report((), (Break("because", "m.py:3", "print(x)"),)))
    assert "no graph was compiled" in text and "m.py:3 print(x)" in text and "→ because" in text


def test_failures_count_as_zero_when_something_is_expected():
    failed = GraphReport("graph 0 [0/0]", 3, (), (), (), failure="capture: RuntimeError: x")
    assert Report((failed,)).shortfall({"attention": 1}) == ["attention: expected 1, found 0"]


def test_the_defaults_are_those_of_the_backend():
    assert latent.explain.__kwdefaults__ == {"rewrites": None, "verify": Options().verify, "dynamic": None}
