"""Attention with a kernel of one's own, wherever it can stand in: `python examples/write_a_rewrite.py`.

The rewrite is judged, certified against the nodes it replaces, and reported like the built-in ones.
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
    place,
    score_form,
    size_of,
    width_of,
)
from torch import Tensor, fx


@torch.library.custom_op("mine::attention", mutates_args=())
def my_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Stands for a kernel: it never holds the scores of more than one query."""
    rows = [(scale * q @ key.mT).softmax(-1) @ value for q in query.split(1, dim=-2)]
    return torch.cat(rows, dim=-2)


@my_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@latent.rewrite("use_my_kernel", exact=True, before=("fuse_attention",))
class UseMyKernel:
    """softmax(scale · q kᵀ) v  ->  mine::attention(q, k, v, scale)."""

    def match(self, site: AttentionSite) -> Match | Refusal:
        scores = score_form(site)
        if not isinstance(scores, ScoreForm) or scores != ScoreForm(scale=scores.scale):
            return Refusal("my kernel knows a scale, and no mask, cap or sink", site.anchor)
        if site.weight_steps or site.weight_readers:
            return Refusal("my kernel keeps no weights", site.anchor)
        return Match(site, {"scale": scores.scale})

    def benefit(self, match: Match) -> Benefit:
        axes = match.site.axes
        scores = size_of(axes.batch + axes.heads + axes.groups + axes.queries + axes.keys)
        return Benefit(before=Cost(flops=0, bytes=4 * scores), after=Cost(flops=0, bytes=0))

    def build(self, match: Match, emit: Emitter) -> fx.Node:
        site, width = match.site, width_of(match.site)
        form = Canonical(site, folded=False)  # [batch, heads, queries or keys, width]
        query = place(emit, site.query, form.rows(width), site)
        key = place(emit, site.key, form.columns(width), site)
        value = place(emit, site.value, form.columns(site.axes.value_width), site)
        output = emit.call(torch.ops.mine.attention.default, query, key, value, match.facts["scale"])
        return emit.relayout(output, form.rows(site.axes.value_width), site.output_layout)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhe->bihe", (torch.einsum("bihd,bjhd->bhij", q, k) / 4).softmax(-1), v)


def main() -> None:
    q, k, v = (torch.randn(2, length, 4, 16) for length in (6, 9, 9))
    print(latent.explain(attend)(q, k, v))
    compiled = torch.compile(attend, backend="latent", options={"expect": {"use_my_kernel": 1}})
    print(f"\nlargest difference from eager: {(compiled(q, k, v) - attend(q, k, v)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
