"""`latent bench`: taking turns, memory, caches, the table, and errors in words."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from latent.kernels.machine import Machine
from latent.rewriter.command import steps
from latent.rewriter.command.bench import Bench, BenchChoices, Least, PhaseResult, Result, bench
from latent.rewriter.command.bench_text import render
from latent.rewriter.command.cli import app
from latent.rewriter.command.targets import HFChoices, Target, TargetError, load_target
from latent.rewriter.command.timing import Call, Times, peak_bytes, take_turns
from typer.testing import CliRunner

MACHINE = Machine(10e9, 40e9)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    monkeypatch.setattr("latent.rewriter.command.bench.measure", lambda *_: MACHINE)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=64,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


# ** timing **


def test_everybody_has_one_turn_a_round_and_the_order_moves_on():
    turns, prepared, ticks = [], [], []
    calls = {n: Call(lambda n=n: turns.append(n), lambda n=n: prepared.append(n)) for n in "abc"}
    times = take_turns(calls, 3, warm=1, turn=0.0, tick=lambda: ticks.append(1))
    assert prepared == turns and len(ticks) == 9
    assert ["".join(turns[n : n + 3]) for n in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]
    assert all(len(t.seconds) == 3 and t.least <= t.median <= t.most for t in times.values())


def test_a_budget_leaves_three_rounds():
    assert len(take_turns({"a": Call(lambda: None)}, 50, budget=0)["a"].seconds) == 3


def test_peak_memory_is_what_lives_at_the_same_time():
    def one_after_the_other():
        for _ in range(3):
            torch.ones(1 << 18)

    def together():
        return [torch.ones(1 << 18) for _ in range(3)]

    assert peak_bytes(Call(one_after_the_other)) == 1 << 20
    assert peak_bytes(Call(together)) == 3 << 20


# ** steps **


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_decode_step_repeats_itself(llama, kind):
    target = load_target(str(llama), HFChoices(tokens=8))
    step = steps.decode_step(target, 24, kind)
    with torch.no_grad():
        call, cache = step.make(target.model)
        first, second = call(), call()
        other, _ = step.make(target.model)
        assert torch.equal(first, second) and torch.equal(first, other())
    assert cache.layers[0].keys.shape[-2] == 24
    assert steps.cache_bytes_per_token(cache) == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes


def test_the_new_token_is_the_last_of_those_attended_to(llama):
    """Against a cache filled by the model itself, the logits are those of a prefill."""
    target = load_target(str(llama), HFChoices(tokens=8))
    ids = target.kwargs["input_ids"].repeat(1, 2)[:, :13]
    with torch.no_grad():
        expected = target.model(input_ids=ids).logits[:, -1]
        done = target.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        cache = steps.filled_cache(target.model, ids[:, -1:], 13, "static")
        for layer, known in zip(cache.layers, done.layers, strict=True):
            layer.keys[:, :, :12], layer.values[:, :, :12] = known.keys, known.values
        actual = target.model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(actual, expected)


def test_latents_are_counted_as_they_are_cached():
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV2Config(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=32,
        first_k_dense_replace=1,
        vocab_size=16,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        mlp_layer_types=["dense"],
    )
    model = transformers.DeepseekV2ForCausalLM(config).eval()
    cache = steps.filled_cache(model, torch.zeros(1, 1, dtype=torch.long), 12, "static")
    assert steps.cache_bytes_per_token(cache) == (16 + 4) * 4


# ** bench **


def test_a_folder(llama, tmp_path):
    target = load_target(str(llama), HFChoices(tokens=8))
    choices = BenchChoices(contestants=("eager", "latent"), tokens=8, cached=16, repeat=3, options={"inner": "eager"})
    result = bench("llama", target, choices)
    decode, prefill = result.phases
    assert "1 token against 16 cached, static cache" in decode.title and "8 tokens" in prefill.title
    for phase in result.phases:
        eager, latent = phase.results
        assert eager.compile_seconds is None and latent.compile_seconds > 0
        assert eager.error == 0 and latent.error < 1e-4
        assert eager.peak_bytes > 0 and latent.peak_bytes > 0
    weights = sum(p.numel() for p in target.model.parameters()) - 64 * 32  # the embedding's rows are looked up
    assert decode.least.bytes == 4 * (weights + 16 * 2 * 2 * 2 * 8)
    assert decode.least.flops == 2 * weights + 2 * 2 * 16 * 2 * 2 * 2 * 8  # two query heads to a head of the cache
    data = json.loads(json.dumps(result.to_dict()))
    assert len(data["phases"][0]["results"][1]["seconds"]) == 3


def test_the_command(llama, tmp_path):
    file = tmp_path / "numbers.json"
    given = ("--only", "eager", "--cached", 16, "--tokens", 4, "--repeat", 2, "--threads", torch.get_num_threads())
    done = run("bench", llama, *given, "--dtype", "bfloat16", "--json", file)
    assert done.exit_code == 0, done.output
    assert "llama" in done.stdout and "bfloat16" in done.stdout and "prefill   4 tokens" in done.stdout
    assert "the cache holds 128 bytes per token" in done.stdout and "\x1b" not in done.stdout
    assert "random weights" in done.stdout and "one forward" not in done.stdout
    assert json.loads(file.read_text())["dtype"] == "bfloat16"
    alone = run("bench", llama, *given, "--phase", "prefill", "--json", "-")
    assert [p["title"] for p in json.loads(alone.stdout)["phases"]] == ["prefill   4 tokens"]


def test_a_factory(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("import torch\ndef make():\n    return torch.nn.Linear(8, 8), (torch.ones(2, 8),), {}\n")
    done = run("bench", f"{file}:make", "--only", "eager", "--repeat", 2)
    assert done.exit_code == 0, done.output
    assert "forward   the call as the target makes it" in done.stdout and "cache holds" not in done.stdout


def test_a_plot(llama, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "times.svg"
    done = run("bench", llama, "--only", "eager", "--repeat", 2, "--cached", 8, "--tokens", 4, "--plot", file)
    assert done.exit_code == 0, done.output
    assert "<svg" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--dtype", "float7"], 1, "float32, bfloat16 or float16"),
        (["--json", "missing/x.json"], 1, "no folder missing"),
        (["--only", "tensorrt"], 2, "tensorrt"),
        (["--cached", "1"], 2, "2"),
    ],
)
def test_wrong_usage(llama, arguments, code, text):
    done = run("bench", llama, *arguments)
    assert done.exit_code == code and text in done.stderr and "Traceback" not in done.output


def test_without_matplotlib_the_extra_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("bench", llama, "--plot", "x.png")
    assert done.exit_code == 1 and "torch-latent[report]" in done.stderr
    assert "first call" not in done.stderr, "said before the work"


def test_functions_have_no_dtype():
    with pytest.raises(TargetError, match="a function, whose dtype"):
        bench("f", Target(torch.sin, (torch.ones(2),)), BenchChoices(dtype="bfloat16"))


# ** the table **


def test_the_table_is_aligned():
    eager = Result("eager", Times((0.1, 0.12, 0.2)), None, 12_000_000, 4608.0, 0.0)
    latent = replace(eager, name="latent", times=Times((0.004, 0.005, 0.006)), compile_seconds=21.04, error=2.2e-6)
    phase = PhaseResult("decode    1 token", (eager, latent), Least(4e7, 1e6))
    text = render(Bench("model", ("random weights",), "float32", 2, "CPU", MACHINE, (phase,)))
    assert text.splitlines()[4:] == [
        "decode    1 token · at least 40 MB and 0.001 GFLOP: 4.00 ms",
        "───────────────────────────────────────────────────────────",
        "            median     min – max   vs eager   roofline   compile    peak   differs",
        "  eager     120 ms     100 – 200      1.00×        3 %         –   12 MB         –",
        "  latent   5.00 ms   4.00 – 6.00     24.00×       80 %    21.0 s   12 MB     2e-06",
        "  the cache holds 4 608 bytes per token",
    ]
    assert math.isclose(phase.least.seconds(MACHINE), 0.004)
