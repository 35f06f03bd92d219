"""Plain attention goes to one operator, wherever it can: `python examples/write_a_rewrite.py`.

The operator is torch's own here; a kernel of one's own takes its place by `torch.library.custom_op`. The rewrite is
judged, certified against the nodes it replaces, and reported like the built-in ones.
"""

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


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhe->bihe", (torch.einsum("bihd,bjhd->bhij", q, k) / 3).softmax(-1), v)


@latent.rewrite("plain_attention", exact=True, before=("fuse_attention",))
class PlainAttention:
    """softmax(scale · q kᵀ) v  ->  scaled_dot_product_attention(q, k, v, scale)."""

    examples = (
        (spelled_out, dict(q="B H S D", k="B H T D", v="B H T E")),
        (tokens_first, dict(q="B S H D", k="B T H D", v="B T H E")),
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
        scores = size_of(axes.batch + axes.heads + axes.groups + axes.queries + axes.keys)
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
        return emit_result(emit, form, emit.call(attend, query, key, value, scale=match.facts["scale"]))


def main() -> None:
    q, k, v = (torch.randn(2, length, 4, 16) for length in (6, 9, 9))
    print(latent.explain(tokens_first)(q, k, v))
    compiled = torch.compile(tokens_first, backend="latent", options={"expect": {"plain_attention": 1}})
    difference = compiled(q, k, v) - tokens_first(q, k, v)
    print(f"\nlargest difference from eager: {difference.abs().max().item():.1e}")


if __name__ == "__main__":
    main()
