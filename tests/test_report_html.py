"""The HTML report: what is in it, that it loads nothing, that it stays small, and that a browser shows it."""

import dataclasses
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import latent
import pytest
import torch
from latent.rewriter.command.cli import app
from latent.rewriter.dump import Choices, write_dump
from latent.rewriter.environment import Run
from latent.rewriter.explain import record
from latent.rewriter.page.reading import Material, of_recorded, read_dump, report_of
from latent.rewriter.page.render import MissingJinja, render
from latent.rewriter.report import Break, Report
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("jinja2")

RUN = Run("some/model", ("random weights",), {"torch": torch.__version__})
LIMIT = 5_000_000


class Layer(nn.Module):
    """Causal attention by hand; `odd` layers normalise over the queries."""

    def __init__(self, odd=False):
        super().__init__()
        self.odd = odd
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (t.view(2, 10, 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        hidden = torch.ones(10, 10, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(hidden, float("-inf"))
        weights = scores.softmax(-2 if self.odd else -1)  # <b>not</b> & "quoted"
        return x + self.out((weights @ v).transpose(1, 2).reshape(2, 10, 16))


class Model(nn.Module):
    def __init__(self, layers, odd=()):
        super().__init__()
        self.layers = nn.ModuleList(Layer(n in odd) for n in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Page(HTMLParser):
    """Elements with their attributes and texts; raises for tags that do not match."""

    VOID = frozenset({"meta", "br", "rect", "path", "line", "circle", "polyline"})

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.handle_data(" ")  # cells of a table do not touch
        self.found.append([tag, dict(attrs), ""])
        if tag not in self.VOID:
            self.open.append(self.found[-1])

    def handle_startendtag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, cls=""):
        found = [(a, " ".join(t.split())) for name, a, t in self.found if name == tag]
        return [(a, t) for a, t in found if set(cls.split()) <= set((a.get("class") or "").split())]

    def texts(self, tag, cls=""):
        return [text for _, text in self.all(tag, cls)]


def material(model, *args, **kwargs):
    with torch.no_grad():
        report, graphs = record(model)(*args, **kwargs)
    return of_recorded(report, graphs, RUN), report, graphs


@pytest.fixture(scope="module")
def four():
    """Four layers of which the last is a near miss."""
    torch.manual_seed(0)
    return material(Model(4, odd=[3]).eval(), torch.randn(2, 10, 16))


@pytest.fixture(scope="module")
def page(four):
    return Page(render(four[0]))


# ** content **


def test_verdict_and_layers(page):
    (sentence,) = page.texts("p", "sentence")
    assert sentence.startswith(
        "All 3 attention layers found in this model were rewritten, but one place that is nearly"
    )
    assert page.all("div", "verdict warn")
    strip = [(a["class"].split()[1], a["title"].partition(":")[0], text) for a, text in page.all("span", "cell")]
    good = [("good", f"layers.{n}", str(n)) for n in range(3)]
    assert strip == [*good, ("warn", "layers.3", "3?")]


def test_tables(page):
    (sites,) = page.texts("table", "sites")
    assert "layers.[0-2] × 3" in sites and "softmax_j(" in sites and "causal" in sites
    assert "q ← columns 0:16 of 48 ← linear qkv 16→48" in sites
    (rewrites,) = page.texts("table", "rewrites")
    assert re.search(r"✓ fuse_attention .* applied 3 of 3 certified in fp64, relative error \de-1\d −\d", rewrites)
    assert re.search(r"– absorb_up_projection .* refused 3 of 3 what keys and values are made of", rewrites)


def test_the_ladder_ends_at_the_condition_that_failed(page):
    (ladder,) = page.all("ol", "ladder")
    steps = [(a.get("class"), t) for a, t in page.all("li") if a.get("class") in ("good", "bad")]
    assert [cls for cls, _ in steps] == ["good", "good", "bad"]
    assert "the softmax normalises axis" in steps[-1][1] and steps[-1][1] in ladder[1]
    (miss,) = page.texts("article", "miss")
    assert "layers.3" in miss and "test_report_html.py:" in miss and "weights @ v" in miss


def test_a_rewritten_node_knows_what_it_came_from(page):
    captured = {a["id"]: text for a, text in page.all("td", "call") if a.get("id", "").startswith("l")}
    ours = [(a, text) for a, text in page.all("td", "call ours")]
    assert len(ours) == 1 and "latent::attention" in ours[0][1]
    sources = " ".join(captured[f"l0-{number}"] for number in ours[0][0]["data-from"].split())
    assert "matmul" in sources and "softmax" in sources and "masked_fill" in sources
    assert "linear" not in sources
    gone = page.texts("td", "call old")
    assert any("softmax(" in text for text in gone) and not any("linear(" in text for text in gone)


def test_the_mask_is_drawn_from_its_proof(four, page):
    assert four[1].sites[0].picture == tuple("#" * (n + 1) + "." * (9 - n) for n in range(10))
    (svg,) = page.all("svg", "mask")
    assert svg[0]["viewbox"] == "-0.5 -0.5 11 11"
    path = next(a["d"] for a, _ in page.all("path", "seen"))
    assert path.startswith("M0 0h1v1h-1zM0 1h2v1h-2z") and path.count("M") == 10


def test_what_a_tensor_decides_is_drawn_apart():
    def attend(q, padding):
        hidden = torch.ones(6, 6, dtype=torch.bool).triu(1) | padding[:, None, None, :]
        return (q @ q.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ q

    made, report, _ = material(attend, torch.randn(2, 3, 6, 8), torch.zeros(2, 6, dtype=torch.bool))
    assert report.sites[0].mask == "causal, padding"
    assert report.sites[0].picture == tuple("?" * (n + 1) + "." * (5 - n) for n in range(6))
    page = Page(render(made))
    assert page.all("path", "unsure") and not page.all("path", "seen")
    assert any("a tensor decides" in text for text in page.texts("figcaption"))


def test_large_masks_are_sampled():
    def attend(q):
        i, j = torch.arange(1000)[:, None], torch.arange(1000)[None]
        return (q @ q.mT).masked_fill((j > i) | (j <= i - 500), float("-inf")).softmax(-1) @ q

    site = material(attend, torch.randn(1, 1, 1000, 4))[1].sites[0]
    assert site.mask == "causal, window 500"
    kept = torch.linspace(0, 999, 32).round()
    seen = (kept[None] <= kept[:, None]) & (kept[None] > kept[:, None] - 500)
    assert site.picture == tuple("".join(".#"[each] for each in row) for row in seen.tolist())


def test_predictions(page):
    (bars,) = page.texts("table", "bars")
    assert "fuse_attention bytes moved" in bars
    assert [a["aria-label"] for a, _ in page.all("svg", "plot")] == [
        "roofline",
        "bytes that attention reads by length of context",
    ]
    before, after = (pair["points"] for pair, _ in page.all("polyline", "line"))
    assert before == after  # nothing is absorbed
    # 3 layers × 2 sequences × 2 heads × (8 + 8) numbers of 4 bytes
    assert any("768 B per token, as before" in text for text in page.texts("figcaption"))


def test_latents_are_read_instead_of_keys_and_values():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    latents = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    config = transformers.DeepseekV3Config(
        num_hidden_layers=2, first_k_dense_replace=2, vocab_size=64, attn_implementation="eager", **sizes, **latents
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    page = Page(render(material(model, torch.arange(8)[None], use_cache=False)[0]))
    # 2 layers of 4 heads × (24 + 16) numbers, and of 32 + 8 numbers
    captions = " ".join(page.texts("figcaption"))
    assert "1 280 B per token before, 320 B after (−75 %)" in captions


# ** any model **


def test_the_size_does_not_grow_with_layers():
    small, large = (render(material(Model(n).eval(), torch.randn(2, 10, 16))[0]) for n in (2, 61))
    page = Page(large)
    assert len(page.all("span", "cell good")) == 61
    assert "layers.[0-60] × 61" in page.texts("table", "sites")[0]
    assert len(large) < len(small) + 59 * 250 and len(large) < LIMIT / 20


def test_no_attention():
    page = Page(render(material(nn.Linear(3, 3), torch.randn(2, 3))[0]))
    assert page.texts("p", "sentence")[0].startswith("This model has no attention")
    assert page.all("div", "verdict quiet") and not page.all("table", "sites") and not page.all("span", "cell")


def test_a_failed_compilation_and_nothing_compiled(monkeypatch):
    def fail(graph):
        raise RuntimeError("<no such operator>")

    monkeypatch.setattr("latent.rewriter.backend.normalise", fail)
    page = Page(render(material(Model(1).eval(), torch.randn(2, 10, 16))[0]))
    assert "could not read this model (the stage “normal form” failed)" in page.texts("p", "sentence")[0]
    assert any("RuntimeError: <no such operator>" in text for text in page.texts("div", "verdict bad"))
    empty = Page(render(Material(Report(()), RUN)))
    assert empty.texts("p", "sentence")[0].startswith("Nothing was compiled")


def test_many_graphs_and_large_kernels_stay_small(four):
    made, report, _ = four
    graphs = tuple(dataclasses.replace(report.graphs[0], name=f"graph {n} [{n}/0]") for n in range(40))
    graph = made.graphs[report.graphs[0].name]
    graph = dataclasses.replace(graph, kernels={"large.cpp": "<" * 1_000_000})
    text = render(Material(Report(graphs), RUN, {each.name: graph for each in graphs}))
    page = Page(text)
    assert len(page.all("h2")) == 8 + 2 and any("32 more graphs" in p for p in page.texts("p"))
    assert any("graph 39 [39/0]" in table for table in page.texts("table"))
    assert any(text.startswith("1000000 characters are left out here") for text in page.texts("pre"))
    assert len(text.encode()) < LIMIT


def test_recompilations_and_breaks(four):
    graph = four[1].graphs[0]
    again = dataclasses.replace(graph, name="graph 1 [0/1]")
    report = Report((graph, again), (Break("print is <not> traced", "model.py:3", "print(x)"),) * 2)
    page = Page(render(Material(report, RUN)))
    assert page.texts("p", "sentence") == Page(render(Material(four[1], RUN))).texts("p", "sentence")  # counted once
    assert [text for text in page.texts("summary") if "compiled once more" in text]
    assert any("2 model.py:3 print(x) print is <not> traced" in text for text in page.texts("table"))


# ** one file **


def test_it_loads_nothing(four):
    text = render(four[0])
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|<img|fetch\(|XMLHttpRequest", text)
    assert not any({"src", "href"} & attributes.keys() for _, attributes, _ in Page(text).found)
    assert len(text.encode()) < LIMIT


def test_what_the_user_names_is_text():
    hostile = "<script>alert(1)</script>"
    model = nn.Sequential()
    model.add_module(hostile, Layer())
    made, report, _ = material(model.eval(), torch.randn(2, 10, 16))
    assert hostile in report.sites[0].path
    odd = material(Model(1, odd=[0]).eval(), torch.randn(2, 10, 16))[1].near_misses[0]
    odd = dataclasses.replace(odd, code='x = a < b > c & d  # </pre><script>"', reason="<i>'\"", path='"><b>')
    graph = dataclasses.replace(report.graphs[0], misses=(odd,))
    run = Run(hostile, (hostile,), {hostile: "</pre>" + hostile})
    text = render(dataclasses.replace(made, report=Report((graph,), ()), run=run))
    page = Page(text)
    assert text.count("<script>") == 1 and text.count("</pre>") == len(page.all("pre"))
    assert page.texts("h1") == [hostile]
    assert 'x = a < b > c & d # </pre><script>"' in page.texts("pre")
    assert any(
        attributes.get("title", "").startswith('"><b>: not recognised: <i>') for attributes, _ in page.all("span")
    )


def test_a_dump_gives_the_same_page(four, tmp_path):
    made, report, graphs = four
    write_dump(tmp_path, report, graphs, Choices(), RUN)
    assert render(read_dump(tmp_path)) == render(made)
    assert report_of(report.to_dict()) == report


def test_the_option_dump_gives_a_page(tmp_path):
    torch._dynamo.reset()
    compiled = torch.compile(Model(2).eval(), backend="latent", options={"dump": str(tmp_path), "inner": "eager"})
    with torch.no_grad():
        compiled(torch.randn(2, 10, 16))
    page = Page(render(read_dump(tmp_path)))
    assert page.texts("p", "sentence")[0].startswith("Both attention layers")
    assert page.all("td", "call ours")


def test_reports_have_a_page_without_graphs(tmp_path):
    report = latent.explain(Model(1).eval())(torch.randn(2, 10, 16))
    report.to_html(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert page.texts("p", "sentence")[0].startswith("The one attention layer") and not page.all("table", "sides")
    assert "torch" in page.texts("table", "facts")[0]


# ** the command **


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)


def test_command(tmp_path):
    file = tmp_path / "models.py"
    file.write_text(
        "import torch\ndef make():\n    q = torch.randn(2, 4, 8)\n"
        "    return (lambda q: (q @ q.mT).softmax(-1) @ q), (q,), {}\n"
    )
    result = run(f"{file}:make", "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert re.search(r"page\.html   \d+ kB, opens in any browser", result.stdout)
    assert Page((tmp_path / "page.html").read_text()).texts("h1") == [f"{file}:make"]


def test_command_errors(tmp_path):
    result = run(tmp_path, "-o", tmp_path / "none" / "page.html")
    assert result.exit_code == 1 and "there is no folder" in result.stderr
    for name in ("manifest.json", "index.md", "report.json"):
        (tmp_path / name).write_text("{}")
    result = run(tmp_path, "-o", tmp_path / "page.html")
    assert result.exit_code == 1 and "cannot be read" in result.stderr and "latent dump" in result.stderr


def test_without_jinja_the_extra_is_named(four, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingJinja, match=r'pip install "torch-latent\[report\]"'):
        four[1].to_html(tmp_path / "page.html")
    result = run("nowhere", "-o", tmp_path / "page.html")
    assert result.exit_code == 1 and 'pip install "torch-latent[report]"' in result.stderr


# ** a browser **

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000"),
)
POINTED_AT = """<script>
const ours = document.querySelector(".ours");
ours.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
const lit = [...document.querySelectorAll(".lit")];
document.body.dataset.lit = lit.length;
document.body.dataset.expected = ours.dataset.from.split(" ").length + 1;
document.querySelector(".cell").dispatchEvent(new MouseEvent("mouseenter"));
document.body.dataset.readout = document.querySelector(".readout").textContent;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_browser(four, tmp_path):
    """No console message, a screenshot, and what pointing at a node lights up."""
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(render(four[0]).replace("</body>", POINTED_AT + "</body>"))

    def browse(*flags):
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        return subprocess.run(
            [CHROMIUM, *FLAGS, profile, *flags, file.as_uri()], capture_output=True, text=True, timeout=100
        )

    shot = browse(f"--screenshot={picture}", "--window-size=1400,2400")
    assert "CONSOLE" not in shot.stderr, shot.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000
    body = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", browse("--dump-dom").stdout)[0]))
    assert int(body["lit"]) == int(body["expected"]) > 3
    assert body["readout"].startswith("layers.0: fuse_attention")
