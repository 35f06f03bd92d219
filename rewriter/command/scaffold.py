"""What `latent rewrites new` writes: a rewrite that works as it stands, to be changed, and its test."""

from __future__ import annotations

import keyword
from pathlib import Path
from string import Template

from .targets import TargetError

__all__ = ["write_rewrite"]

REWRITE = Template('''\
"""TODO: what $name does, and where the equation is from."""

from __future__ import annotations

import latent
import torch
from latent.rewriter.authoring import (
    AttentionSite,
    Benefit,
    Canonical,
    Cost,
    Emitter,
    Match,
    Refusal,
    ScoreForm,
    emit_result,
    place,
    score_form,
    size_of,
    width_of,
)
from torch import Tensor, fx


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v


def tokens_before_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 3).softmax(-1)
    return torch.einsum("bhij,bjhe->bihe", weights, v)


@latent.rewrite("$name", exact=True, before=("fuse_attention",))
class $klass:
    """softmax(scale · q kᵀ) v  ->  scaled_dot_product_attention(q, k, v, scale)."""

    examples = (
        (spelled_out, dict(q="B H S D", k="B H T D", v="B H T E")),
        (tokens_before_heads, dict(q="B S H D", k="B T H D", v="B T H E")),
    )

    def match(self, site: AttentionSite) -> Match | Refusal:
        """What the site must be; every refusal says why, and about which node."""
        if site.call is not None:
            return Refusal("it is one fused call already", site.anchor)
        scores = score_form(site)
        if not isinstance(scores, ScoreForm) or scores != ScoreForm(scale=scores.scale):
            return Refusal("only a scale may lie between the product and the softmax", site.anchor)
        if site.weight_steps or site.weight_readers:
            return Refusal("the weights are changed, or read by something else", site.anchor)
        return Match(site, {"scale": scores.scale})

    def benefit(self, match: Match) -> Benefit:
        """Operations and bytes before and after: the rewrite runs where it takes no longer."""
        axes = match.site.axes
        outer = size_of(axes.batch + axes.heads + axes.groups)
        scores = outer * size_of(axes.queries) * size_of(axes.keys)
        flops = 2 * scores * (size_of(width_of(match.site)) + size_of(axes.value_width))
        return Benefit(before=Cost(flops, bytes=8 * scores), after=Cost(flops, bytes=0))

    def build(self, match: Match, emit: Emitter) -> fx.Node:
        """New nodes for the site's output; nothing is edited."""
        site, width = match.site, width_of(match.site)
        form = Canonical(site, folded=False)  # [batch, heads, queries or keys, width]
        query = place(emit, site.query, form.rows(width), site)
        key = place(emit, site.key, form.columns(width), site)
        value = place(emit, site.value, form.columns(site.axes.value_width), site)
        attend = torch.ops.aten.scaled_dot_product_attention.default
        output = emit.call(attend, query, key, value, scale=match.facts["scale"])
        return emit_result(emit, form, output)
''')

TEST = Template('''\
"""$name applies to its examples, computes the same, and says why it stays away from the rest."""

from __future__ import annotations

import latent
import torch
from $name import $klass, spelled_out
from torch import Tensor

Q, K, V = (torch.randn(2, 3, length, 8) for length in (5, 7, 7))


def test_its_examples() -> None:
    """Sizes drawn at random, certificates, gradients, symbolic shapes."""
    report = latent.testing.check_rewrite($klass)
    assert report.applied


def test_it_is_applied_and_agrees_with_eager() -> None:
    options = {"rewrites": "$name", "expect": {"$name": 1}, "inner": "eager", "strict": True}
    compiled = torch.compile(spelled_out, backend="latent", options=options)
    torch.testing.assert_close(compiled(Q, K, V), spelled_out(Q, K, V))


def test_it_refuses_what_it_does_not_know() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (30 * torch.tanh(q @ k.transpose(-1, -2) / 30)).softmax(-1) @ v

    (verdict,) = (v for v in latent.explain(capped)(Q, K, V).verdicts if v.rewrite == "$name")
    assert verdict.outcome == "refused" and "only a scale" in verdict.reason
''')


def write_rewrite(name: str, folder: Path, taken: list[str]) -> tuple[Path, Path]:
    """Write NAME.py and test_NAME.py. Raises TargetError, and then has written nothing."""
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise TargetError(f"{name}: no name for a file of Python.", "Use small letters, digits and underscores.")
    if name in taken:
        raise TargetError(f"{name}: a rewrite of this name is registered already.", f"Taken are: {', '.join(taken)}.")
    if not folder.is_dir():
        raise TargetError(f"--out {folder}: there is no such folder.", "Make it, or name another.")
    files = folder / f"{name}.py", folder / f"test_{name}.py"
    for file in files:
        if file.exists():
            raise TargetError(f"{file}: is there already, and is not overwritten.", "Move it, or choose another name.")
    words = {"name": name, "klass": "".join(word.capitalize() for word in name.split("_"))}
    for file, template in zip(files, (REWRITE, TEST), strict=True):
        file.write_text(template.substitute(words), encoding="utf-8")
    return files
