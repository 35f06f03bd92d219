"""Options: validated by name and value, and reached by every way of calling torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from latent.rewriter import backend, history
from latent.rewriter.options import OptionError, Options, read_options
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

EAGER = {"inner": "eager", "strict": True}
NAMES = ("rewrites", "verify", "fuel", "strict", "expect", "dump", "inner", "mode", "inductor")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * 0.3).softmax(-1) @ value


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options with which the backend compiles each graph."""
    found: list[Options] = []
    compile_graph = backend.compile_graph

    def spy(gm: Any, example_inputs: Any, options: Options) -> Any:
        found.append(options)
        return compile_graph(gm, example_inputs, options)

    monkeypatch.setattr(backend, "compile_graph", spy)
    return found


# ** names and values **


def test_nothing_asked_for_is_the_default() -> None:
    assert read_options(None) == read_options({}) == Options()


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(OptionError) as caught:
        read_options({"colour": "red"})
    assert all(name in str(caught.value) for name in NAMES)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(("wrong", "meant"), [("rewrite", "rewrites"), ("stric", "strict"), ("verfy", "verify")])
def test_misspelt_name_is_corrected(wrong: str, meant: str) -> None:
    with pytest.raises(OptionError, match=f"did you mean '{meant}'"):
        read_options({wrong: True})


@pytest.mark.parametrize(
    ("key", "good"),
    [
        ("rewrites", ("fuse_attention",)),
        ("verify", "full"),
        ("fuel", 3),
        ("strict", True),
        ("expect", {"attention": 2, "fuse_attention": 1}),
        ("dump", "somewhere"),
        ("inner", "eager"),
        ("mode", "max-autotune"),
        ("inductor", {"max_autotune": True}),
    ],
)
def test_good_value_is_taken(key: str, good: object) -> None:
    taken = getattr(read_options({key: good}), key)
    assert taken == (Path("somewhere") if key == "dump" else good)


@pytest.mark.parametrize(
    ("key", "bad", "said"),
    [
        ("rewrites", ("fuse_atention",), "fuse_attention"),
        ("rewrites", 5, "rewrites"),
        ("verify", "sometimes", "fast, full, off"),
        ("verify", ["fast"], "fast, full, off"),
        ("fuel", -1, "applications"),
        ("fuel", True, "applications"),
        ("strict", 1, "True or False"),
        ("expect", 3, "counts"),
        ("expect", {"atention": 1}, "attention"),
        ("expect", {"attention": -1}, "no count"),
        ("expect", {"attention": 1.5}, "no count"),
        ("dump", 7, "path"),
        ("inner", "triton", "inductor, eager"),
        ("mode", 3, "mode"),
        ("mode", "fastest", "max-autotune"),
        ("inductor", "max_autotune", "dictionary"),
        ("inductor", {"max_autotoon": True}, "max_autotoon"),
    ],
)
def test_bad_value_is_refused_in_words(key: str, bad: object, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        read_options({key: bad})
    assert key in str(caught.value)


def test_one_rewrite_may_be_named_without_a_tuple() -> None:
    assert read_options({"rewrites": "fuse_attention"}).rewrites == ("fuse_attention",)


def test_bad_option_reaches_the_user_even_without_strict() -> None:
    compiled = torch.compile(Attention(), backend="latent", options={"verfy": "off"})
    with pytest.raises(BackendCompilerFailed, match="did you mean 'verify'"):
        compiled(*inputs())


# ** the ways in **


def _function(options: dict[str, Any]) -> Callable[..., Tensor]:
    return torch.compile(Attention(), backend="latent", options=options)


def _in_place(options: dict[str, Any]) -> Callable[..., Tensor]:
    model = Attention()
    model.compile(backend="latent", options=options)
    return model


def _forward(options: dict[str, Any]) -> Callable[..., Tensor]:
    return torch.compile(Attention().forward, backend="latent", options=options)


WAYS = pytest.mark.parametrize(
    "way", [_function, _in_place, _forward], ids=["torch.compile", "model.compile", "model.forward"]
)


@WAYS
def test_options_arrive(way: Callable[..., Any], seen: list[Options]) -> None:
    torch.testing.assert_close(way({**EAGER, "verify": "full"})(*inputs()), Attention()(*inputs()))
    assert [(options.inner, options.strict, options.verify) for options in seen] == [("eager", True, "full")]


@WAYS
def test_without_options_the_defaults_arrive(
    way: Callable[..., Any], seen: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "hand_to_inductor", lambda gm, inputs, patches: gm.forward)
    way({})(*inputs())
    assert seen == [Options()]


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options that reach inductor, which then does not run."""
    found: list[dict[str, Any]] = []

    def spy(gm: Any, example_inputs: Any, patches: dict[str, Any]) -> Any:
        found.append(patches)
        return gm.forward

    monkeypatch.setattr(backend, "hand_to_inductor", spy)
    return found


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_mode_reaches_inductor(mode: str, patches: list[dict[str, Any]]) -> None:
    torch.compile(Attention(), backend="latent", mode=mode)(*inputs())
    torch._dynamo.reset()
    torch.compile(Attention(), backend="latent", options={"mode": mode})(*inputs())
    assert patches == [torch._inductor.list_mode_options(mode)] * 2
    assert patches[0]


def test_default_mode_asks_inductor_for_nothing(patches: list[dict[str, Any]]) -> None:
    torch.compile(Attention(), backend="latent", mode="default")(*inputs())
    assert patches == [{}]


def test_own_inductor_options_go_before_those_of_the_mode(patches: list[dict[str, Any]]) -> None:
    options = {"mode": "max-autotune", "inductor": {"max_autotune": False}}
    torch.compile(Attention(), backend="latent", options=options)(*inputs())
    assert patches[0]["max_autotune"] is False
    assert patches[0].keys() > {"max_autotune"}


def test_dump_writes_both_graphs(tmp_path: Path) -> None:
    torch.compile(Attention(), backend="latent", options={**EAGER, "dump": str(tmp_path)})(*inputs())
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("softmax" in text for text in written)
    assert any("latent.attention" in text for text in written)


def test_rewrites_not_named_are_off() -> None:
    import latent

    torch.compile(Attention(), backend="latent", options={**EAGER, "rewrites": ()})(*inputs())
    assert {verdict.outcome for verdict in latent.reports().verdicts} == {"off"}


# ** by name, with no import **

PROGRAM = """
import sys, torch
model = torch.nn.Module()
model.forward = lambda q, k: (q @ k.mT).softmax(-1) @ k
q, k = torch.randn(2, 4, 8), torch.randn(2, 6, 8)
assert "latent" not in sys.modules
compiled = torch.compile(model.forward, backend="latent", options={"inner": "eager", "strict": True})
torch.testing.assert_close(compiled(q, k), model.forward(q, k))
print("latent" in torch._dynamo.list_backends(), "latent" in sys.modules, len(sys.modules["latent"].reports().sites))
"""


def test_found_by_name_without_an_import(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "True", "1"], done.stderr


def test_a_reset_of_dynamo_drops_the_reports_of_code_that_outlived_an_earlier_one() -> None:
    compiled = torch.compile(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, backend="latent", options={"inner": "eager"})
    given = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    for _ in range(2):
        torch._dynamo.reset()
        assert not history.reports().graphs
        compiled(*given)
        assert len(history.reports().graphs) == 1
    torch._dynamo.reset()
    assert not history.reports().graphs
