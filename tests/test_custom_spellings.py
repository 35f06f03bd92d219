"""latent.pattern from outside: one operator of a third party for every kind, before and after its pattern is there."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import latent
import pytest
import torch
import torch.nn.functional as F
from latent.rewriter.authoring import (
    AttentionCall,
    Bias,
    CacheRead,
    Fill,
    Found,
    Rope,
    Scale,
    SoftmaxSpelling,
    Tanh,
    args_of,
    read_scalar,
    shape_of,
)
from latent.rewriter.registry import unregister, unregister_pattern
from rewrite_tools import outcome
from torch import Tensor, fx, nn

B, H, S, T, D = 2, 4, 6, 9, 16
ops = torch.ops.custom_spellings


def define(
    name: str, function: Callable[..., Any], fake: Callable[..., Any] | None, mutates: tuple[str, ...] = ()
) -> None:
    operator = torch.library.custom_op(f"custom_spellings::{name}", function, mutates_args=mutates)
    operator.register_fake(fake or (lambda x, *rest: torch.empty_like(x)))


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def _clip(scores: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(scores / cap)


def _hide(scores: Tensor, hide: Tensor) -> Tensor:
    return scores.masked_fill(hide, float("-inf"))


def _relative(scores: Tensor, bias: Tensor, factor: float) -> Tensor:
    return scores + factor * bias


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (scale * q @ k.mT).softmax(-1) @ v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


def _append(cache: Tensor, new: Tensor, position: int) -> None:
    cache[:, :, position : position + new.shape[2]] = new


define("softmax", _softmax, None)
define("clip", _clip, None)
define("hide", _hide, None)
define("relative", _relative, None)
define("rotate", _rotate, None)
define("append", _append, lambda cache, new, position: None, ("cache",))
define("attend", _attend, lambda q, k, v, scale: torch.empty_like(q))


@pytest.fixture
def register() -> Iterator[Callable[[Any, Callable[..., Any]], None]]:
    """Registers a pattern for the duration of one test."""
    added: list[Callable[..., Any]] = []

    def add(kind: Any, function: Callable[..., Any]) -> None:
        added.append(latent.pattern(kind)(function))

    yield add
    for function in added:
        unregister_pattern(function)


def qkv() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, H, n, D, generator=generator) for n in (S, T, T))


# ** what recognition reads: spelling, pattern, and the same pattern with a lie in it **


def read_softmax(node: fx.Node) -> SoftmaxSpelling | None:
    if node.target is not ops.softmax.default:
        return None
    scores = args_of(node)[0]
    return SoftmaxSpelling(anchor=node, scores=scores, dim=len(shape_of(scores)) - 1, weights=node)


def read_clip(node: fx.Node, scores: fx.Node, lie: float = 1.0) -> Any:
    if node.target is not ops.clip.default or (cap := read_scalar(args_of(node)[1])) is None:
        return None
    return Scale(node, lie / cap), Tanh(node), Scale(node, cap)


def read_hide(node: fx.Node, scores: fx.Node, keep: bool = False) -> Any:
    return Fill(node, args_of(node)[1], keep, float("-inf")) if node.target is ops.hide.default else None


def read_relative(node: fx.Node, scores: fx.Node, lie: float = 1.0) -> Any:
    if node.target is not ops.relative.default or (factor := read_scalar(args_of(node)[2])) is None:
        return None
    return Bias(node, args_of(node)[1], lie * factor)


HIDE = torch.arange(T)[None, :] > torch.arange(S)[:, None]
BIAS = torch.randn(H, S, T, generator=torch.Generator().manual_seed(1))

READ: dict[str, tuple[str, Callable[..., Any], Callable[..., Any] | None, Callable[..., Tensor]]] = {
    "softmax": ("softmax", read_softmax, None, lambda q, k, v: ops.softmax(0.25 * q @ k.mT) @ v),
    "cap": (
        "score_step",
        read_clip,
        lambda node, scores: read_clip(node, scores, lie=1.5),
        lambda q, k, v: ops.clip(q @ k.mT, 3.0).softmax(-1) @ v,
    ),
    "mask": (
        "score_step",
        read_hide,
        lambda node, scores: read_hide(node, scores, keep=True),
        lambda q, k, v: ops.hide(q @ k.mT, HIDE).softmax(-1) @ v,
    ),
    "bias": (
        "score_step",
        read_relative,
        lambda node, scores: read_relative(node, scores, lie=-1.0),
        lambda q, k, v: ops.relative(q @ k.mT, BIAS, 0.5).softmax(-1) @ v,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_spelling_is_read_by_its_pattern_and_fused(name: str, register: Callable[..., None]) -> None:
    kind, reads, lies, function = READ[name]
    assert not latent.explain(function)(*qkv()).sites
    register(kind, reads)
    found = outcome("fuse_attention", function, *qkv())
    assert found.verdict.outcome == "applied" and found.error < 1e-5
    assert found.verdict.error is not None and found.verdict.error < 1e-9
    if lies is not None:
        register(kind, lies)  # the newest is asked first; the certificate runs the operator itself
        assert [v.outcome for v in latent.explain(function)(*qkv()).verdicts if v.rewrite == "fuse_attention"] == [
            "undone"
        ]


def test_an_operator_that_is_attention_by_contract_is_a_site_for_custom_rewrites(register: Callable[..., None]) -> None:
    def read(node: fx.Node) -> AttentionCall | None:
        if node.target is not ops.attend.default:
            return None
        q, k, v, scale = args_of(node)
        return AttentionCall(node, "attend", q, k, v, read_scalar(scale))

    example = {"q": "B H S D", "k": "B H T D", "v": "B H T E", "scale": 0.5}
    latent.replace(
        "mine", _attend, lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, scale=scale), example=example
    )

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attend(q, k, v, 0.2)

    try:
        assert not latent.explain(function)(*qkv()).sites
        register("call", read)
        found = outcome("mine", function, *qkv())
    finally:
        unregister("mine")
    assert found.verdict.outcome == "applied" and found.error < 1e-5


def test_a_rotation_and_a_cache_write_show_where_keys_come_from(register: Callable[..., None]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(H * D, H * D, bias=False) for _ in range(3))

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            q, k, v = (p(x).view(B, S, H, D).transpose(1, 2) for p in (self.q, self.k, self.v))
            q, k = ops.rotate(q, cos, sin), ops.rotate(k, cos, sin)
            ops.append(keys, k, 3)
            ops.append(values, v, 3)
            return (q @ keys.mT).softmax(-1) @ values

    def read_rotation(node: fx.Node, reading: Any) -> Found | None:
        if node.target is not ops.rotate.default:
            return None
        x, cos, sin = args_of(node)
        return Found(Rope(node, "half", shape_of(x)[-1], angles=(cos, sin)), x)

    def read_append(node: fx.Node, reading: Any) -> Found | None:
        if not reading.writes or reading.writes[-1].target is not ops.append.default:
            return None
        cache, new, position = args_of(reading.writes[-1])
        return Found(CacheRead(node, "static", cache, 2, new, position, reading.writes[:-1]), new, sees_writes=True)

    module = Attention()
    inputs = (
        torch.randn(B, S, H * D),
        torch.randn(S, D // 2),
        torch.randn(S, D // 2),
        torch.zeros(B, H, T, D),
        torch.zeros(B, H, T, D),
    )
    (site,) = latent.explain(module)(*inputs).sites
    assert not any("linear" in line for line in site.origins)
    register("producer", read_rotation)
    register("producer", read_append)
    (site,) = latent.explain(module)(*inputs).sites
    query, key, value = site.origins
    assert query == "q ← rope(half, 16) ← linear q 64→64 (4 heads × 16)"
    assert key == "k ← cache(static, dim 2) ← rope(half, 16) ← linear k 64→64"
    assert value == "v ← cache(static, dim 2) ← linear v 64→64 (4 heads × 16)"


def test_the_example_mends_a_near_miss_in_fifteen_lines() -> None:
    path = Path(__file__).parent.parent / "examples" / "custom_spelling.py"
    (pattern,) = (n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "read_soft_clip")
    assert pattern.end_lineno - pattern.lineno + 2 <= 15  # with the line that registers it
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        names = runpy.run_path(str(path), run_name="__main__")
    unregister_pattern(names["read_soft_clip"])
    before, after = output.getvalue().split("    with it      ")
    assert "without it   the product of queries and keys goes through soft_clip" in before
    assert "30 tanh(" in after and "✓ fuse_attention        applied  1 of 1" in after


# ** a package of a third party **

PACKAGE = {
    "pyproject.toml": """
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"

        [project]
        name = "capped-attention"
        version = "1.0"

        [project.entry-points."latent.rewrites"]
        capped_rescaled = "capped_attention.rewrites"

        [project.entry-points."latent.patterns"]
        clip = "capped_attention.spellings"

        [tool.setuptools]
        packages = ["capped_attention"]
    """,
    "capped_attention/__init__.py": """
        import torch

        @torch.library.custom_op("capped_attention::clip", mutates_args=())
        def clip(scores: torch.Tensor, cap: float) -> torch.Tensor:
            return cap * torch.tanh(scores / cap)

        clip.register_fake(lambda scores, cap: torch.empty_like(scores))
    """,
    "capped_attention/spellings.py": """
        import latent
        import torch
        from latent.rewriter.authoring import Scale, Tanh, args_of, read_scalar

        @latent.pattern("score_step")
        def read_clip(node, scores):
            if node.target is not torch.ops.capped_attention.clip.default:
                return None
            cap = read_scalar(args_of(node)[1])
            return Scale(node, 1 / cap), Tanh(node), Scale(node, cap)
    """,
    "capped_attention/rewrites.py": """
        import latent
        import torch
        from latent.rewriter.authoring import Benefit, Cost

        def capped(q, k, v, cap, scale):
            return (cap * torch.tanh(q @ k.mT * scale / cap)).softmax(-1) @ v

        def rescaled(q, k, v, cap, scale):
            return (torch.tanh(q @ (k.mT * (scale / cap))) * cap).softmax(-1) @ v

        latent.replace(
            "capped_rescaled",
            capped,
            rescaled,
            example=dict(q="B H S D", k="B H T D", v="B H T E", cap=30.0, scale=0.1),
            benefit=lambda dims: Benefit(Cost(1, 1), Cost(0, 0)),
        )
    """,
}

USE = """
    import torch

    def attend(q, k, v):
        import capped_attention
        return torch.ops.capped_attention.clip(q @ k.mT / 4, 20.0).softmax(-1) @ v

    import capped_attention
    import latent
    inputs = [torch.randn(2, 4, n, 16) for n in (6, 9, 9)]
    report = latent.check(attend, expect={"attention": 1, "capped_rescaled": 1}, rewrites="capped_rescaled")(*inputs)
    (verdict,) = (v for v in report.verdicts if v.rewrite == "capped_rescaled")
    print(verdict.outcome, verdict.error < 1e-9)
    print(latent.testing.check_rewrite("capped_rescaled", examples=5))
"""


def test_a_package_adds_a_rewrite_and_a_spelling_through_entry_points(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name, text in PACKAGE.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(textwrap.dedent(text))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True, timeout=120)
    path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    (tmp_path / "use.py").write_text(textwrap.dedent(USE))
    done = subprocess.run(
        [sys.executable, "use.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "applied True"
    assert second.startswith("capped_rescaled: applied to")
