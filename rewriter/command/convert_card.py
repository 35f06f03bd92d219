"""The card of a converted model: what was done to it, what that cost, and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report_text import collapse, grouped
from ..units import size_text
from .console import aligned
from .conversion import Conversion, LayerFacts

__all__ = ["card", "summary"]


def summary(made: Conversion) -> str:
    """For a terminal."""
    lines = [f"{recipe}\n  {about}" for recipe, about in zip(made.recipes, made.about, strict=True)]
    lines += ["", *aligned([("layers", "what stands there", "bytes a token"), *_layers(made)], indent=0)]
    lines += ["", f"cache of {made.cached} tokens   {_cache(made)}"]
    if made.scores:
        lines += ["", *aligned([("perplexity", *HEADS), *_scores(made)], indent=0)]
    lines += ["", *made.warnings] if made.warnings else []
    return "\n".join(lines)


def card(made: Conversion, folder: Path, check: str) -> str:
    """README.md of the folder."""
    name = folder.name
    parts = [
        f"# {name}",
        f"{Path(made.source).name or made.source}, changed by `latent convert`"
        + (f" after calibration on {', '.join(made.calibrated)}." if made.calibrated else ".")
        + " It is another model than the original, with other outputs; the numbers below say by how much.",
    ]
    if made.untrained:
        parts.append(
            f"**It has to be trained before it is used.** {', '.join(made.untrained)} puts in parts that have learnt "
            "nothing yet; until then it is worse than the original, as the perplexities show."
        )
    parts.append("\n".join(f"- `{recipe}`: {about}" for recipe, about in zip(made.recipes, made.about, strict=True)))
    parts += ["## Use", _usage(name)]
    parts += ["## Cache", f"Measured with {made.cached} tokens, all live tensors: {_cache(made)}."]
    parts.append(_markdown([("layers", "what stands there", "bytes a token"), *_layers(made)]))
    if made.scores:
        known = [text for text in made.scores if text not in made.unseen]
        parts += ["## Quality", _markdown([("perplexity", *HEADS), *_scores(made)])]
        parts.append(
            "Halves of texts that were not learnt from, through the cache; intervals of 95 % over windows. "
            + (f"Of {', '.join(made.unseen)} nothing was learnt from. " if made.unseen else "")
            + (f"The other half of {', '.join(known)} was." if known and made.calibrated else "")
        )
    parts.append("\n".join(f"- {warning}" for warning in made.warnings))
    parts.append(f"After it was written it was loaded again: {check}.")
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


HEADS = ("before", "after", "increase", "95 %", "KL", "same token", "scored tokens")


def _scores(made: Conversion) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for text, score in made.scores.items():
        low, high = score.increase_interval()
        numbers = (f"{score.reference.mean:.3f}", f"{score.model.mean:.3f}", f"{score.increase:+.1%}")
        interval = f"{low:+.1%} to {high:+.1%}"
        rows.append((text, *numbers, interval, f"{score.kl:.4f}", f"{score.agreement:.1%}", f"{score.model.tokens}"))
    return rows


def _layers(made: Conversion) -> list[tuple[str, ...]]:
    def alike(layer: LayerFacts) -> tuple[object, ...]:
        return layer.parts, layer.bytes_per_token

    return [
        (collapse([layer.path for layer in same]), ", ".join(same[0].parts), f"{same[0].bytes_per_token:.0f}")
        for same in grouped(made.layers, alike)
    ]


def _cache(made: Conversion) -> str:
    before, after = made.bytes_before, made.bytes_after
    each = f"{before / made.cached:.0f} -> {after / made.cached:.0f} bytes a token"
    return f"{size_text(before)} -> {size_text(after)}, {each}, {after / before:.1%}"


def _usage(name: str) -> str:
    return "\n".join(
        (
            "```python",
            "import latent",
            "from transformers import AutoTokenizer",
            "",
            f'model = latent.load("{name}")  # pip install "torch-latent[hf]"',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            'inputs = tokenizer("The sea", return_tensors="pt")',
            "ids = model.generate(**inputs, max_new_tokens=40, past_key_values=latent.LatentCache(model))",
            "print(tokenizer.decode(ids[0]))",
            "```",
        )
    )


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    head, *rest = rows
    lines = [head, ("---", *("---:",) * (len(head) - 1)), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
