"""What `latent eval` shows: a table for each question, with all models below each other, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..units import number_text, plural
from .bench_text import import_matplotlib
from .console import aligned
from .targets import TargetError

if TYPE_CHECKING:
    from ..evaluate.evaluation import Evaluation, Results, Score

__all__ = ["plot", "render"]

NONE = "–"


def render(results: Results) -> str:
    """The tables."""
    p = results.protocol
    scored = p.windows * (p.length - p.prefix)
    lines = [
        " · ".join((f"{number_text(scored)} tokens scored of each text", *results.notes, f"seed {p.seed}")),
        f"  {plural(p.windows, 'window')} of {p.length} tokens: {p.prefix} read in one call, "
        f"then scored {p.call} a call through the cache; brackets are 95 % intervals over windows",
    ]
    for number, (text, digest) in enumerate(results.digests.items()):
        rows = [_score(model, model.scores[number]) for model in results.evaluations]
        lines += _table(f"{text}   {digest}", ("", "perplexity", "", "vs base", "", "KL", "same token"), rows)
    lines += _caches(results)
    if p.gaps and any(model.recalls for model in results.evaluations):
        heads = ("", *(f"{gap} apart" for gap in sorted(p.gaps)))
        rows = [(m.name, *_recalls(m, sorted(p.gaps))) for m in results.evaluations]
        lines += _table("repeated string   nats per token gained the second time", heads, rows)
    return "\n".join(lines)


def _score(model: Evaluation, score: Score) -> tuple[str, ...]:
    low, high = score.perplexity.interval()
    own = (model.name, _perplexity(score.perplexity.mean), f"[{_perplexity(low)}, {_perplexity(high)}]")
    if (found := score.against) is None:
        return (*own, NONE, "", NONE, NONE)
    low, high = found.increase_interval()
    kl = "0" if abs(found.kl) < 1e-6 else f"{found.kl:.3g}"
    return (*own, _change(found.increase), f"[{_change(low)}, {_change(high)}]", kl, f"{100 * found.agreement:.1f} %")


def _caches(results: Results) -> list[str]:
    lengths = sorted({d.tokens for model in results.evaluations for d in model.decodings})
    first = {d.tokens: d for d in results.evaluations[0].decodings} if results.base else {}
    heads = ["", *(cell for n in lengths for cell in (f"B/token at {n}", "of base", "tokens/s"))]
    rows = []
    for model in results.evaluations:
        cells = [model.name]
        found = {d.tokens: d for d in model.decodings}
        for n in lengths:
            if (d := found.get(n)) is None:
                cells += [NONE] * 3
                continue
            share = f"{100 * d.bytes / first[n].bytes:.1f} %" if n in first else NONE
            cells += [number_text(round(d.bytes_per_token)), share, f"{d.tokens_per_second:.3g}"]
        rows.append(tuple(cells))
    return _table("cache   bytes of its live tensors, and decoding with it", tuple(heads), rows) if lengths else []


def _recalls(model: Evaluation, gaps: Sequence[int]) -> list[str]:
    found = {r.gap: f"{r.gain:.2f}" for r in model.recalls}
    return [found.get(gap, NONE) for gap in gaps]


def _table(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns that say nothing about any model are left out."""
    kept = [n for n in range(len(heads)) if n == 0 or any(row[n] not in ("", NONE) for row in rows)]
    return ["", title, "─" * len(title), *aligned([tuple(row[n] for n in kept) for row in (heads, *rows)])]


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _change(share: float) -> str:
    digits = 2 if abs(share) < 0.00995 else 1
    value = round(100 * share, digits)
    return f"{'−' if value < 0 else '+' if value > 0 else '±'}{abs(value):.{digits}f} %"


def plot(results: Results, path: Path) -> None:
    """Perplexity against the bytes of the largest cache that all were measured with. Raises TargetError."""
    plt = import_matplotlib()
    sizes = [{d.tokens: d.bytes_per_token for d in model.decodings} for model in results.evaluations]
    if not (common := set.intersection(*map(set, sizes))):
        raise TargetError("--plot: the models were measured at no common size of cache.", "Name one with --filled.")
    length = max(common)
    figure, panels = plt.subplots(1, len(results.digests), figsize=(4.6 * len(results.digests), 3.6), squeeze=False)
    for number, (panel, text) in enumerate(zip(panels[0], results.digests, strict=True)):
        for model, size in zip(results.evaluations, sizes, strict=True):
            x, y = size[length] / 1000, model.scores[number].perplexity.mean
            colour = "#9aa0a6" if model.name == results.base else "#1e9e6a"
            panel.scatter([x], [y], color=colour, zorder=2)
            panel.annotate(model.name, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
            if model.name == results.base:
                panel.axhline(y, color=colour, linewidth=1, linestyle="--", zorder=1)
        panel.set_title(text, fontsize=9)
        panel.set_xlabel(f"cache, kB per token at {length} tokens")
        panel.set_ylabel("perplexity")
        panel.set_xlim(0, 1.45 * max(size[length] for size in sizes) / 1000)  # room for the names
        panel.margins(y=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise TargetError(
            f"--plot {path}: {error}", "Name a .png, .svg or .pdf file in a folder that exists."
        ) from error
    finally:
        plt.close(figure)
