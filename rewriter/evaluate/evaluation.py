"""All measurements of one model, in one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from .forward import CacheOf, Counted, Scoring, uncounted
from .memory import Decoding, decoding
from .quality import Comparison, Perplexity, Reference, compare, perplexity, remember
from .recall import Recall, fitting, needed, recall
from .texts import Text, scored_tokens

__all__ = [
    "Evaluation",
    "Material",
    "Protocol",
    "Results",
    "Sample",
    "Score",
    "draw",
    "evaluate",
    "evaluate_original",
    "references",
]


@dataclass(frozen=True)
class Protocol:
    """What is measured, and how much of it."""

    tokens: int = 4096
    """Scored tokens of each text, rounded up to whole windows."""
    length: int = 512
    prefix: int = 128
    call: int = 128
    gaps: tuple[int, ...] = (128, 512, 2048, 4096)
    draws: int = 1
    lengths: tuple[int, ...] = (512, 2048)
    """Tokens in the cache when it is measured."""
    steps: int = 16
    seed: int = 0

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.prefix, self.call)

    def within(self, positions: int | None) -> Protocol:
        """Without the gaps and caches for which a model has too few positions."""
        if positions is None:
            return self
        lengths = tuple(length for length in self.lengths if length + self.steps <= positions)
        return replace(self, gaps=fitting(self.gaps, positions), lengths=lengths)

    @property
    def windows(self) -> int:
        return -(-self.tokens // max(1, self.length - self.prefix))


@dataclass(frozen=True)
class Sample:
    """Windows of one text."""

    text: str
    digest: str
    tokens: Tensor
    """[windows, length]"""


@dataclass(frozen=True)
class Material:
    """What every model is measured on."""

    samples: tuple[Sample, ...]
    rows: Tensor
    """Rows of the first text, long enough for the gaps and the caches; one for each draw."""


@dataclass(frozen=True)
class Score:
    """One model on one text."""

    text: str
    perplexity: Perplexity
    against: Comparison | None = None


@dataclass(frozen=True)
class Evaluation:
    """One model."""

    name: str
    scores: tuple[Score, ...]
    recalls: tuple[Recall, ...]
    decodings: tuple[Decoding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, with those that the table shows."""
        data = asdict(self)
        for score, plain in zip(self.scores, data["scores"], strict=True):
            plain["perplexity"] |= {"mean": score.perplexity.mean, "interval": score.perplexity.interval()}
            if (against := score.against) is not None:
                plain["against"] = {
                    "increase": against.increase,
                    "increase_interval": against.increase_interval(),
                    "kl": against.kl,
                    "agreement": against.agreement,
                    "kls": against.kls,
                    "agreements": against.agreements,
                }
        for found, plain in zip(self.recalls, data["recalls"], strict=True):
            plain["gain"] = found.gain
        for decoded, plain in zip(self.decodings, data["decodings"], strict=True):
            plain |= {"bytes_per_token": decoded.bytes_per_token, "tokens_per_second": decoded.tokens_per_second}
        return data


@dataclass(frozen=True)
class Results:
    """Several models on the same material."""

    protocol: Protocol
    digests: Mapping[str, str]
    """Text -> what it contained."""
    evaluations: tuple[Evaluation, ...]
    base: str | None = None
    """The model that the others are compared with, if there is one."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "notes": list(self.notes),
            "protocol": asdict(self.protocol),
            "texts": dict(self.digests),
            "models": [evaluation.to_dict() for evaluation in self.evaluations],
        }


def draw(tokenizer: Any, texts: Sequence[Text], protocol: Protocol) -> Material:
    """Draw the windows. Raises TextError."""
    samples = tuple(
        Sample(text.name, text.digest, scored_tokens(tokenizer, text, protocol.windows, protocol.length, protocol.seed))
        for text in texts
    )
    longest = max((needed(protocol.gaps), *protocol.lengths))
    return Material(samples, scored_tokens(tokenizer, texts[0], protocol.draws, longest, protocol.seed))


def references(
    model: Any, material: Material, protocol: Protocol, counted: Counted = uncounted
) -> dict[str, Reference]:
    """Run an original once on every text."""
    return {
        sample.text: remember(model, sample.tokens, protocol.scoring, _on(sample.text, counted))
        for sample in material.samples
    }


def evaluate(
    name: str,
    model: Any,
    material: Material,
    protocol: Protocol,
    cache_of: CacheOf | None = None,
    against: Mapping[str, Reference] | None = None,
    counted: Counted = uncounted,
) -> Evaluation:
    """Measure a model, through the caches that `cache_of` makes; `against` is what `references` kept of an original."""
    scores = []
    for sample in material.samples:
        tokens_NL, scoring, tell = sample.tokens, protocol.scoring, _on(sample.text, counted)
        if against is None:
            score = Score(sample.text, perplexity(model, tokens_NL, cache_of, scoring, tell))
        else:
            found = compare(against[sample.text], model, tokens_NL, cache_of, scoring, tell)
            score = Score(sample.text, found.model, found)
        scores.append(score)
    return Evaluation(name, tuple(scores), *_in_use(model, material, protocol, cache_of, counted))


def evaluate_original(
    name: str,
    model: Any,
    material: Material,
    protocol: Protocol,
    known: Mapping[str, Reference],
    cache_of: CacheOf | None = None,
    counted: Counted = uncounted,
) -> Evaluation:
    """The same of an original whose `references` are there already: its windows are not run again."""
    scores = tuple(Score(text, reference.perplexity()) for text, reference in known.items())
    return Evaluation(name, scores, *_in_use(model, material, protocol, cache_of, counted))


def _on(text: str, counted: Counted) -> Counted:
    return lambda what, total: counted(f"{what}, {text}", total)


def _in_use(
    model: Any, material: Material, protocol: Protocol, cache_of: CacheOf | None, counted: Counted
) -> tuple[tuple[Recall, ...], tuple[Decoding, ...]]:
    """Recall and decoding, as far as the model has positions."""
    protocol = protocol.within(getattr(model.config.get_text_config(), "max_position_embeddings", None))
    rows = material.rows
    found = recall(model, rows, protocol.gaps, cache_of, protocol.seed, counted) if protocol.gaps else ()
    return found, decoding(model, rows[0], protocol.lengths, cache_of, protocol.steps, counted)
