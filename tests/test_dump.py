"""Dumps: every stage runs by itself and gives what eager gives; folders keep what is not theirs; torch's own logs."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import ALL
from latent.kernels import generated, latent_attention
from latent.rewriter.command.cli import app
from latent.rewriter.dump import FORMATS, Choices, Recorded, write_dump
from latent.rewriter.explain import record
from latent.rewriter.stages.folder import DumpError, Folder
from latent.rewriter.stages.layer import cut, layer_path
from latent.rewriter.stages.view import STAGES, Stage
from torch import nn
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

Case = tuple[Callable[..., Any], dict[str, Any]]


class Attention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return (q @ k.mT / 4).masked_fill(hidden, float("-inf")).softmax(-1) @ v


class Layers(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def layers() -> Case:
    torch.manual_seed(0)
    return Layers().eval(), {"x": torch.randn(2, 12, 16)}


def llama(layers: int = 2, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    made = transformers.LlamaConfig(
        **{"num_hidden_layers": layers, "vocab_size": 64, "attn_implementation": "eager", **sizes, **config}
    )
    return transformers.LlamaForCausalLM(made).eval()


def prefill() -> Case:
    return llama(), {"input_ids": torch.arange(8)[None]}


def static_decode() -> Case:
    """The caches are inputs that the graph writes to."""
    import transformers

    model = llama()
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    model(input_ids=torch.arange(8)[None], past_key_values=cache)
    return model, {"input_ids": torch.tensor([[3]]), "past_key_values": cache}


def latents() -> Case:
    """A model that caches latents, for which two kernels are generated."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=32,
        qk_rope_head_dim=8,
        v_head_dim=32,
        intermediate_size=32,
        first_k_dense_replace=2,
        vocab_size=64,
        attn_implementation="eager",
    )
    return transformers.DeepseekV3ForCausalLM(config).eval(), {"input_ids": torch.arange(8)[None]}


def corpus(name: str) -> Callable[[], Case]:
    program = ALL[name]

    def make() -> Case:
        inputs = program.inputs()
        names = [f"x{n}" for n in range(len(inputs))]
        return lambda **given: program.fn(*(given[n] for n in names)), dict(zip(names, inputs, strict=True))

    return make


CASES: dict[str, tuple[Callable[[], Case], bool]] = {
    "layers": (layers, False),
    "prefill": (prefill, False),
    "dynamic": (prefill, True),
    "static_decode": (static_decode, False),
    "latents": (latents, False),
    **{name: (corpus(name), False) for name in ("call_flex", "two_under_checkpoint", *list(ALL)[7:300:60])},
}


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    model, inputs = layers()
    with torch.no_grad():
        _, (graph,) = record(model)(**inputs)
    return graph


def run(file: Path) -> dict[str, Any]:
    return runpy.run_path(str(file))


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("case", CASES)
def test_every_stage_is_python_that_gives_what_eager_gives(case: str, tmp_path: Path) -> None:
    make, dynamic = CASES[case]
    model, inputs = make()
    with torch.no_grad():
        report, graphs = record(model, dynamic=dynamic or None, inputs=True)(**inputs)
        model, inputs = make()  # caches as they were
        expected = model(**inputs)
    expected = tensors(getattr(expected, "logits", expected))
    assert len(graphs) == 1
    write_dump(tmp_path, report, graphs, Choices(inputs=True))
    kept = torch.load(tmp_path / "graph_0" / "inputs.pt")
    random = []
    for stage in STAGES:
        module = run(tmp_path / "graph_0" / f"{stage}.py")
        with torch.no_grad():
            given = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in kept.items()}
            results = tensors(module["graph"](**given))
            random.append(tensors(module["graph"](**module["inputs"]())))
        for want in expected:
            same = [r for r in results if r.shape == want.shape]
            assert any(torch.allclose(r, want, atol=1e-4, rtol=1e-4, equal_nan=True) for r in same), stage
        torch.testing.assert_close(random[0], random[-1], atol=1e-3, rtol=1e-3, equal_nan=True)
        view = graphs[0].stages[stage]
        assert Stage.from_json((tmp_path / "graph_0" / f"{stage}.json").read_text()) == view


def test_files_run_as_programs(recorded: Recorded, tmp_path: Path) -> None:
    from latent.rewriter.report import Report

    write_dump(tmp_path, Report((recorded.report,)), [recorded], Choices(formats=("py",)))
    write_dump(tmp_path / "one", Report((recorded.report,)), [recorded], Choices(formats=("py",), layer=1))
    files = sorted(tmp_path.rglob("*.py"))
    assert len(files) == 8
    for file in (tmp_path / "graph_0/captured.py", tmp_path / "one/graph_0/rewritten.layer_1.py"):
        done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "0 torch.float32 (2, 12, 16)" in done.stdout


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


# ** stages **


def test_origins(recorded: Recorded) -> None:
    before, after = recorded.stages["normal_form"], recorded.stages["rewritten"]
    ours = [node for node in after.calls if node.ours]
    assert len(ours) == 3 and {node.rewrite for node in ours} == {"replace_proven_mask"}
    replaced = {before.by_name[name].operator for name in ours[1].origins}
    assert {"matmul", "div", "masked_fill", "softmax"} <= replaced, "the region"
    assert "triu" in replaced, "the mask, which nobody else reads"
    assert "linear" not in replaced and "chunk" not in replaced
    assert all(node.origins == (node.name,) for node in after.calls if not node.rewrite)
    lowered = recorded.stages["lowered"]
    assert {
        after.by_name[name].ours for node in lowered.calls for name in node.origins if name in {o.name for o in ours}
    } == {True}
    for stage, previous in ((after, before), (lowered, after)):
        assert {name for node in stage.nodes for name in node.origins} <= previous.by_name.keys()


def test_text_shows_a_layer_once(recorded: Recorded) -> None:
    from latent.rewriter.stages.text import render

    text = render(recorded.stages["rewritten"])
    assert "layers.[0-2] × 3" in text and "layers.1" not in text
    assert text.count("◆") == 1 and "f32[2, 12, 16]" in text and "qkv.weight" in text


def test_a_layer_that_differs_stands_alone() -> None:
    from latent.rewriter.stages.text import render

    model = Layers(4)
    model.layers[2].forward = lambda x: x.relu()  # type: ignore[method-assign]
    with torch.no_grad():
        _, (graph,) = record(model)(torch.randn(2, 12, 16))
    text = render(graph.stages["captured"])
    assert "layers.[0-1,3] × 3" in text


def test_layers_by_number(recorded: Recorded) -> None:
    stage = recorded.stages["captured"]
    assert layer_path(stage, 2) == "layers.2"
    part = cut(stage, "layers.2")
    assert {node.module.split(".")[1] for node in part.calls} == {"2"}
    assert [node.target for node in part.inputs if node.weight] == [
        "layers.2.qkv.weight",
        "layers.2.qkv.bias",
    ]
    with pytest.raises(ValueError, match=r"there is no layers\.7: the layers of layers are 0 to 2"):
        layer_path(stage, 7)


def test_drawings(recorded: Recorded) -> None:
    from xml.etree import ElementTree

    from latent.rewriter.stages import dot, svg

    stage = recorded.stages["rewritten"]
    tree = ElementTree.fromstring(svg.render(stage))
    words = "".join(tree.itertext())
    assert "latent::attention" in words and "[0-2] × 3" in words and words.count("latent::attention") == 1
    graph = dot.render(stage)
    assert graph.count("{") == graph.count("}") and "cluster_" in graph
    assert '[label="f32[2, 12, 16]"]' in graph


def test_stages_cost_nothing_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from latent.rewriter import backend

    monkeypatch.setattr(backend, "Recorder", None)
    torch._dynamo.reset()
    model, inputs = layers()
    torch.compile(model, backend="latent", options={"inner": "eager", "strict": True})(**inputs)


# ** kernels **


@pytest.mark.parametrize("case", ["static_decode", "latents"])
def test_kernels_in_a_dump_are_those_that_run(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = CASES[case][0]()
    with torch.no_grad():
        _, (graph,) = record(model, inputs=True)(**inputs)
    ran = set()

    def noting(spec: Any, device: str) -> Any:
        ran.add(spec.name)
        return generated.reference

    monkeypatch.setattr(generated, "kernel_for", noting)
    monkeypatch.setattr(latent_attention, "kernel_for", noting)
    generated.kernel_for_forms.cache_clear()
    from latent.rewriter.stages.python import render

    for threshold in (0, 1 << 30):
        monkeypatch.setattr(latent_attention, "threshold_of", lambda call, t=threshold: t)
        module: dict[str, Any] = {"__name__": "stage"}
        exec(render(graph.stages["lowered"]), module)
        with torch.no_grad():
            module["graph"](**module["inputs"]())
    generated.kernel_for_forms.cache_clear()
    sources = [source for each in graph.kernels.values() for source in each]
    assert ran and {source.name for source in sources} == ran
    assert all("latent_attention" in source.text and source.suffix == ".cpp" for source in sources)
    index = str(files_of(graph)["index.md"])
    assert all(f"(kernels/{source.file})" in index for source in sources)


def files_of(graph: Recorded) -> dict[str, Any]:
    from latent.rewriter.dump import graph_files

    return graph_files(graph, Choices())


# ** folders **


def test_folder_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    mine = tmp_path / "graph_0" / "notes.txt"
    Folder(tmp_path).replace("", {"index.md": "1", "graph_0/a.txt": "1", "graph_1/b.txt": "1"})
    mine.write_text("mine")
    Folder(tmp_path).replace("", {"index.md": "2", "graph_0/a.txt": "2"})
    assert (tmp_path / "graph_0" / "a.txt").read_text() == "2" and mine.read_text() == "mine"
    assert not (tmp_path / "graph_1").exists(), "what an earlier dump wrote goes"
    with pytest.raises(DumpError, match=r"notes\.txt was not written by latent"):
        Folder(tmp_path).replace("", {"index.md": "3", "graph_0/notes.txt": "3"})
    assert (tmp_path / "index.md").read_text() == "2", "nothing is written before the error"
    (tmp_path / "graph_0" / "a.txt").write_text("edited")
    with pytest.raises(DumpError, match=r"a\.txt was changed since"):
        Folder(tmp_path).replace("", {"graph_0/a.txt": "4"})
    Folder(tmp_path).replace("", {"index.md": "4"})
    assert (tmp_path / "graph_0" / "a.txt").read_text() == "edited", "edited files are their editor's"


def test_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(DumpError, match=r"manifest\.json was not written by latent"):
        Folder(tmp_path)
    with pytest.raises(DumpError, match="a file stands where"):
        Folder(tmp_path / "manifest.json")


def test_option_writes_every_compilation(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, inputs = layers()
    foreign = tmp_path / "mine.txt"
    foreign.write_text("mine")
    with torch.no_grad():
        compiled = torch.compile(model, backend="latent", options={"inner": "eager", "dump": str(tmp_path)})
        compiled(**inputs)
        compiled(torch.randn(3, 5, 16))
    graphs = sorted(path.name for path in tmp_path.glob("graph_*"))
    assert len(graphs) == 2 and foreign.exists()
    index = (tmp_path / "index.md").read_text()
    for graph in graphs:
        folder = tmp_path / graph
        assert f"({graph}/index.md)" in index
        assert {f"{stage}.{ending}" for stage in STAGES for ending in FORMATS.values()} <= {
            p.name for p in folder.iterdir()
        }
        page = (folder / "index.md").read_text()
        for said in (
            "softmax_j(",
            "layers.[0-2] × 3",
            "causal",
            "fuse_attention",
            "Certificates",
            "rewrite: fuse_attention",
        ):
            assert said in page
        names = {verdict["certificate"] for verdict in json.loads((folder / "report.json").read_text())["verdicts"]}
        certificates = json.loads((folder / "certificates.json").read_text())
        assert {c["name"] for c in certificates} == names - {""} and all(c["error"] < 1e-9 for c in certificates)
        assert [r["name"] for r in json.loads((folder / "plan.json").read_text())["rewrites"]][1] == "fuse_attention"


# ** the command **


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("dump") / "target.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_dump import layers\n"
                    "def make():\n    model, inputs = layers()\n    return model, (), inputs\n")  # fmt: skip
    return f"{file}:make"


def latent(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_command_writes_and_writes_again(target: str, tmp_path: Path) -> None:
    first = latent("dump", target, "--out", tmp_path)
    assert first.exit_code == 0, first.output
    assert "start here" in first.stdout and "3 of latent::" in first.stdout
    (tmp_path / "mine.txt").write_text("mine")
    again = latent("dump", target, "--out", tmp_path, "--stage", "captured", "--format", "py", "--json")
    written = json.loads(again.stdout)["files"]
    assert {f for f in written if f.endswith(".py")} == {"graph_0/captured.py"}
    assert not (tmp_path / "graph_0" / "rewritten.txt").exists() and (tmp_path / "mine.txt").exists()
    (tmp_path / "graph_0" / "captured.svg").write_text("mine")
    refused = latent("dump", target, "--out", tmp_path)
    assert refused.exit_code == 1 and "captured.svg was not written by latent" in refused.stderr
    assert "Move it away" in refused.stderr and (tmp_path / "graph_0" / "captured.svg").read_text() == "mine"


def test_command_prints_one_stage(target: str) -> None:
    text = latent("dump", target)
    assert text.exit_code == 0 and "◆" in text.stdout and text.stdout.startswith("graph 0")
    module: dict[str, Any] = {"__name__": "stage"}
    exec(latent("dump", target, "--format", "py", "--layer", 1).stdout, module)
    assert list(module["inputs"]()) == ["add", "layers_1_qkv_weight", "layers_1_qkv_bias"]
    assert latent("dump", target, "--stage", "captured", "--stage", "lowered").exit_code == 2
    missing = latent("dump", target, "--layer", 9)
    assert missing.exit_code == 1 and "there is no layers.9" in missing.stderr and "0 to 2" in missing.stderr


# ** torch's own tools **

PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_dump import layers
model, inputs = layers()
with torch.no_grad():
    torch.compile(model, backend="latent", options={{"inner": "eager"}})(**inputs)
"""


def test_trace_and_debug_folder_of_torch(tmp_path: Path) -> None:
    """TORCH_TRACE has the artefacts that tlparse lists; TORCH_COMPILE_DEBUG writes the dump beside Dynamo's folder."""
    trace, debug = tmp_path / "trace", tmp_path / "debug"
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    more = {"TORCH_TRACE": str(trace), "TORCH_COMPILE_DEBUG": "1", "TORCH_COMPILE_DEBUG_DIR": str(debug)}
    more |= {"TORCH_LOGS": "+latent"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(**more), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "fuse_attention: 0." in done.stderr and "[0/0]" in done.stderr, "seconds of each rewrite"
    (log,) = trace.glob("*.log")
    entries = [json.loads(line[line.index("{") :]) for line in log.read_text().splitlines() if '"artifact"' in line]
    ours = {e["artifact"]["name"]: e for e in entries if e["artifact"]["name"].startswith("latent_")}
    assert set(ours) == {"latent_report", *(f"latent_{stage}" for stage in STAGES)}
    assert all(e["frame_id"] == 0 and e["has_payload"] for e in ours.values())
    assert "◆ " in log.read_text()
    (page,) = debug.rglob("latent/graph_0/index.md")
    assert (page.parents[2] / "torchdynamo").is_dir()


# ** size **


@pytest.mark.slow
def test_thirty_layers_are_dumped_in_ten_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's sizes with random weights: what recording and writing take beyond the compilation."""
    from latent.rewriter import backend

    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    model = llama(30, **sizes, vocab_size=49152)
    seconds: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            seconds.append(time.perf_counter() - start)
            return result

        return run

    monkeypatch.setattr(backend.Recorder, "add", timed(backend.Recorder.add))
    for name in ("recorded_of", "write_recorded"):
        monkeypatch.setattr(backend, name, timed(getattr(backend, name)))
    torch._dynamo.reset()
    with torch.no_grad():
        options = {"inner": "eager", "strict": True, "dump": str(tmp_path)}
        torch.compile(model, backend="latent", options=options)(input_ids=torch.arange(32)[None])
    print(f"{sum(seconds):.1f} s")
    assert len(seconds) == 6 and sum(seconds) < 10
    (page,) = tmp_path.glob("graph_*/index.md")
    assert "model.layers.[0-29].self_attn × 30" in page.read_text()
