"""Pictures of masks: what they show is what the weights of an eager run say, head by head."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latent
import pytest
import torch
import torch.nn.functional as F
from latent.rewriter.command.cli import app
from latent.rewriter.effective_masks import effective_masks
from torch import Tensor
from typer.testing import CliRunner

B, H, S = 2, 3, 6
KEPT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def inputs(queries: int = S) -> tuple[Tensor, Tensor, Tensor]:
    """Values are the unit vectors, so that the output is the weights."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(B, H, queries, 4, generator=generator), torch.randn(B, H, S, 4, generator=generator)
    return q, k, torch.eye(S).expand(B, H, S, S).contiguous()


def attend(scores: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


def rows() -> Tensor:
    return torch.arange(S)[:, None]


def unmasked(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def causal(q, k, v):
    return attend(q @ k.mT, v, rows() >= torch.arange(S))


def window_as_numbers(q, k, v):
    hidden = torch.full((S, S), -1e9)
    return (q @ k.mT + hidden.triu(1) + hidden.tril(-3)).softmax(-1) @ v


def flag_of_a_call(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def padded(q, k, v):
    return attend(q @ k.mT, v, (KEPT[:, None, None, :] != 0) & (rows() >= torch.arange(S)))


def three_largest(q, k, v):
    scores = q @ k.mT
    return attend(scores, v, scores >= scores.topk(3, -1).values[..., -1:])


def one_token(q, k, v):
    return attend(q[:, :, -1:] @ k.mT, v, torch.arange(S) <= 3)


def transposed(q, k, v):
    """[keys, queries] in memory, opaque, and other for every head."""
    scores_BHTS = k @ q.mT
    visible_BHTS = scores_BHTS > scores_BHTS.mean(-2, keepdim=True)
    return attend(scores_BHTS.mT, v, visible_BHTS.mT)


CASES: dict[Callable[..., Tensor], tuple[str, bool, bool, bool]] = {
    # words, proven, from the inputs, varies over heads or batch
    unmasked: ("none", True, False, False),
    causal: ("causal", True, False, False),
    window_as_numbers: ("causal; keys after i - 3", True, False, False),
    flag_of_a_call: ("causal", True, False, False),
    padded: ("causal, padding", True, True, True),
    three_largest: ("opaque", False, False, True),
    one_token: ("keys before 4", True, False, False),
    transposed: ("opaque", False, False, True),
}


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_what_is_shown_is_what_the_weights_say(function: Callable[..., Tensor]) -> None:
    words, proven, data, varies = CASES[function]
    with torch.no_grad():
        weights = function(*inputs())
        for head in (0, 1, B * H - 1):
            (mask,) = effective_masks(function, inputs(), {}, head)
            assert mask.visible is not None
            assert torch.equal(mask.visible, weights.flatten(0, 1)[head] > 0)
            assert mask.words.startswith(words) and (mask.proven, mask.varies) == (proven, varies)
            assert mask.heads == B * H
            assert not proven or mask.data == data
    with pytest.raises(IndexError, match="has 6 together"):
        effective_masks(function, inputs(), {}, B * H)


def test_a_call_that_writes_is_made_once() -> None:
    class Cached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("position", torch.tensor(2))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.position.add_(1)
            return attend(q @ k.mT, v, self.position >= torch.arange(S))

    model = Cached()
    with torch.no_grad():
        (mask,) = effective_masks(model, inputs(), {})
    assert mask.visible is not None and mask.visible.sum(-1).tolist() == [4] * S
    assert int(model.position) == 2


# ** the command **

FILE = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self, window):
        super().__init__()
        self.window = window

    def forward(self, x):
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
        visible = (j <= i) & (j > i - self.window)
        return (x @ x.mT).masked_fill(~visible, float("-inf")).softmax(-1) @ x

def make(length=5):
    return nn.Sequential(*(Layer(2 if n % 2 else 99) for n in range(4))), (torch.randn(1, length, 4),), {}

def long():
    return make(200)

def none():
    return nn.Linear(4, 4), (torch.randn(1, 4),), {}
"""

PICTURE = """\
1,3
mask causal, window 2 · proven · 5 × 5 · 36 % visible
  ██········
  ████······
  ··████····
  ····████··
  ······████
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("targets") / "layers.py"
    path.write_text(FILE)
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["masks", *map(str, arguments)], catch_exceptions=False)


def test_equal_layers_are_shown_once(file: Path) -> None:
    result = run(f"{file}:make")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("× 2") == 2 and result.stdout.count("mask causal") == 2
    assert PICTURE.partition("\n")[2] in result.stdout


def test_one_layer_as_json(file: Path) -> None:
    (mask,) = json.loads(run(f"{file}:make", "--layer", 1, "--json").stdout)["masks"]
    assert mask["paths"] == ["1"] and mask["rows"] == ["10000", "11000", "01100", "00110", "00011"]


def test_large_masks_are_drawn_in_shades(file: Path) -> None:
    lines = [line[2:] for line in run(f"{file}:long", "--layer", 1).stdout.splitlines() if line.startswith("  ")]
    assert len(lines) == 48 and {len(line) for line in lines} == {96}
    assert all("█" not in line and set(line) > {"·"} for line in lines)  # narrower than a character: never full


@pytest.mark.parametrize(("name", "start"), [("m.png", b"\x89PNG"), ("m.svg", b"<?xml"), ("m.txt", b"0 ")])
def test_files(file: Path, tmp_path: Path, name: str, start: bytes) -> None:
    if not name.endswith(".txt"):
        pytest.importorskip("matplotlib")
    out = tmp_path / name
    assert run(f"{file}:make", "--out", out).exit_code == 0
    data = out.read_bytes()
    assert len(data) > 200 and (data.startswith(start) or b"mask causal" in data)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["make", "--layer", 4], "the call has 4 attentions"),
        (["make", "--head", 1], "there is no head 1"),
        (["make", "--out", "no/such/folder/m.png"], "there is no folder"),
        (["make", "--out", "m.nonsense"], "Name a .txt, .png, .svg or .pdf file"),
    ],
)
def test_errors_say_what_to_do(file: Path, arguments: list[Any], said: str) -> None:
    result = run(f"{file}:{arguments[0]}", *arguments[1:])
    assert result.exit_code == 1 and said in result.stderr


def test_without_attention(file: Path) -> None:
    assert "no attention was found" in run(f"{file}:none").stdout


def test_without_matplotlib_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(f"{file}:make", "--out", "m.png")
    assert result.exit_code == 1 and "torch-latent[report]" in result.stderr


class Spans(torch.nn.Module):
    """Each head sees as many of the last keys as a buffer says."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spans", torch.tensor([1, 2, 4]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = rows() - torch.arange(S)
        return attend(q @ k.mT, v, (distance >= 0) & (distance < self.spans[:, None, None]))


def spans_of_sizes(q, k, v):
    distance = rows() - torch.arange(S)
    return attend(q @ k.mT, v, (distance >= 0) & (distance < 1 + torch.arange(H)[:, None, None]))


@pytest.mark.parametrize("model", [Spans(), spans_of_sizes])
def test_heads_that_differ_are_drawn_one_by_one(model: Callable[..., Tensor], tmp_path: Path) -> None:
    with torch.no_grad():
        report = latent.explain(model)(*inputs())
        wanted = [mask.visible for head in range(H) for mask in effective_masks(model, inputs(), {}, head)]
    (site,) = report.sites
    assert [[[c == "#" for c in row] for row in head] for head in site.heads] == [w.tolist() for w in wanted]
    pytest.importorskip("jinja2")
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('aria-label="mask of head') == H and "pale: differs by head" in page


@pytest.mark.parametrize("model", [causal, padded, unmasked, three_largest])
def test_heads_that_agree_or_are_not_known_are_not(model: Callable[..., Tensor]) -> None:
    with torch.no_grad():
        (site,) = latent.explain(model)(*inputs()).sites
    assert site.heads == ()
