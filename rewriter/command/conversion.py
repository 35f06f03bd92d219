"""What `latent convert` does, step by step: convert, measure, write, load again, compare."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.attention import ConvertedAttention
from ..convert.cache import LatentCache
from ..convert.convert import convert
from ..evaluate.evaluation import Sample
from ..evaluate.forward import Counted, Scoring, call
from ..evaluate.memory import cache_bytes
from ..evaluate.quality import Comparison, compare, remember
from ..evaluate.texts import Text, calibration_tokens, scored_tokens
from .recipe_flags import with_choices

__all__ = ["Conversion", "ConversionError", "Drawn", "LayerFacts", "Request", "bars", "carry_out", "draw", "write"]

PROMPT, TOKENS = 64, 20
"""Tokens whose logits, and greedy tokens after them, a model must give again after it was loaded."""


class ConversionError(RuntimeError):
    """A converted model that is not what it should be: what is wrong, and what to do."""


@dataclass(frozen=True)
class LayerFacts:
    """What stands in the place of one attention, and what it caches for a token."""

    path: str
    parts: tuple[str, ...]
    bytes_per_token: float


@dataclass(frozen=True)
class Conversion:
    """What was done to a model, and what it did."""

    source: str
    recipes: tuple[str, ...]
    """As the command line writes them."""
    about: tuple[str, ...]
    """What each recipe says about itself."""
    calibrated: tuple[str, ...]
    """Texts that were learnt from, and how much of them."""
    layers: tuple[LayerFacts, ...]
    cached: int
    """Tokens in the caches that were measured."""
    bytes_before: int
    bytes_after: int
    scores: Mapping[str, Comparison] = field(default_factory=dict)
    """By text, on halves that were not learnt from."""
    unseen: tuple[str, ...] = ()
    """Texts of which nothing was learnt from."""
    untrained: tuple[str, ...] = ()
    """Recipes that need training."""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        for name, score in self.scores.items():
            numbers = {"before": score.reference.mean, "after": score.model.mean, "increase": score.increase}
            interval = {"increase_interval": score.increase_interval(), "tokens": score.model.tokens}
            data["scores"][name] = numbers | interval | {"kl": score.kl, "agreement": score.agreement}
        return data


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    source: str
    recipes: tuple[Any, ...]
    learnt: tuple[Text, ...]
    unseen: tuple[Text, ...]
    windows: int
    """To calibrate on."""
    tokens: int
    """Scored tokens of each text; 0: none."""
    length: int
    seed: int
    dry: bool = False

    @property
    def scoring(self) -> Scoring:
        """A prefix in one call, then calls that read the cache."""
        part = max(1, self.length // 4)
        return Scoring(part, part)


@dataclass(frozen=True)
class Drawn:
    """Windows of the texts of a request."""

    calibration: Tensor
    samples: tuple[Sample, ...]
    row: Tensor
    """One window, of no text that is learnt from."""


def draw(request: Request, tokenizer: Any) -> Drawn:
    """Raises TextError."""
    learnt, length, seed = request.learnt, request.length, request.seed
    rows = calibration_tokens(tokenizer, learnt, request.windows, length, seed)
    windows = 0 if request.dry else -(-request.tokens // (length - request.scoring.prefix))
    samples = tuple(
        Sample(text.name, text.digest, scored_tokens(tokenizer, text, windows, length, seed))
        for text in (*learnt, *request.unseen)
        if windows
    )
    return Drawn(rows, samples, scored_tokens(tokenizer, learnt[0], 1, length, seed)[0])


def carry_out(request: Request, model: Any, drawn: Drawn, bar: Counted) -> tuple[Any, Conversion]:
    """The converted model, and what was done. Raises ConversionRefused."""
    import transformers

    recipes, row = request.recipes, drawn.row
    known = {sample.text: remember(model, sample.tokens, request.scoring, bar) for sample in drawn.samples}
    before = held(transformers.DynamicCache(config=model.config), model, row)
    made, warned = changed(model, recipes, drawn.calibration, bar)
    learns = any(recipe.needs != "nothing" for recipe in recipes)
    learnt = [f"{text.name} ({text.digest})" for text in request.learnt]
    done = Conversion(
        source=request.source,
        recipes=tuple(with_choices(recipe) for recipe in recipes),
        about=tuple(_about(recipe) for recipe in recipes),
        calibrated=(*learnt, f"{request.windows} windows of {request.length} tokens") if learns else (),
        layers=layer_facts(made, row),
        cached=len(row),
        bytes_before=before,
        bytes_after=held(LatentCache(made), made, row),
        scores={s.text: compare(known[s.text], made, s.tokens, LatentCache, counted=bar) for s in drawn.samples},
        unseen=tuple(text.name for text in request.unseen) if learns else tuple(s.text for s in drawn.samples),
        untrained=tuple(recipe.name for recipe in recipes if recipe.needs == "training"),
        warnings=tuple(warned),
    )
    return made, done


def _about(recipe: Any) -> str:
    return f"{(inspect.getdoc(recipe) or '').partition(chr(10))[0].rstrip('.')}. Exact {recipe.exact}."


def changed(model: nn.Module, recipes: Sequence[Any], tokens: Tensor | None, bar: Counted) -> tuple[Any, list[str]]:
    """The converted model, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught, bars(bar) as progress:
        warnings.simplefilter("always")
        made = convert(model, recipes, tokens, progress=progress)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return made, list(dict.fromkeys(said))


@contextlib.contextmanager
def bars(counted: Counted) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for everything that says how far it is, one after another."""
    shown: dict[str, Any] = {"what": None, "done": 0, "tick": None}
    with contextlib.ExitStack() as stack:

        def progress(what: str, done: int, total: int) -> None:
            if what != shown["what"]:
                stack.pop_all().close()
                shown.update(what=what, done=0, tick=stack.enter_context(counted(what, total)))
            for _ in range(done - shown["done"]):
                shown["tick"]()
            shown["done"] = done

        yield progress


def held(cache: Any, model: Any, ids: Tensor) -> int:
    """Bytes that a cache holds after a model has read `ids` [L]."""
    with torch.no_grad():
        call(model, ids[None].to(model.device), torch.tensor([len(ids) - 1], device=model.device), cache)
    return cache_bytes(cache)


def layer_facts(model: Any, ids: Tensor) -> tuple[LayerFacts, ...]:
    """Every attention that was put in, with what its layer of the cache holds for each of `ids`."""
    cache = LatentCache(model)
    held(cache, model, ids)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, ConvertedAttention)]
    return tuple(
        LayerFacts(path, _parts(module), cache_bytes(cache.layers[module.form.call.index]) / len(ids))
        for path, module in found
    )


def _parts(attention: ConvertedAttention) -> tuple[str, ...]:
    """JointMemory rank 189: the parts of an attention, with the numbers that were chosen for them."""
    shape = {"hidden", "groups", "heads", "key_width", "value_width", "width"}
    said = []
    parts: list[Any] = [part for part in attention.children() if hasattr(part, "settings")]
    for part in parts:
        numbers = {k: v for k, v in part.settings().items() if isinstance(v, int | float) and k not in shape}
        said.append(" ".join([type(part).__name__, *(f"{k} {v}" for k, v in numbers.items())]))
    return tuple(said)


def write(model: Any, tokenizer: Any, card: Callable[[str], str], folder: Path, row: Tensor) -> None:
    """Write a model and its tokenizer, load it again, compare, and write its card. Then all is there, or nothing.

    Raises ConversionError where the loaded model is another one.
    """
    from ..convert.store import load

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        checked = _same(model, load(partial).to(model.device), row[None, :PROMPT].to(model.device))
        (partial / "README.md").write_text(card(checked), encoding="utf-8")
        partial.chmod(0o777 & ~_umask())
        if folder.exists():
            folder.rmdir()  # it is empty
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _same(model: Any, loaded: Any, prompt: Tensor) -> str:
    with torch.no_grad():
        wanted, found = (one(input_ids=prompt, use_cache=False).logits for one in (model, loaded))
    if not torch.equal(wanted, found):
        error = float((wanted - found).abs().max())
        raise ConversionError(
            f"the model that was loaded again gives other logits (by up to {error:.2g})\n"
            "Nothing was written. A weight that is not in the state_dict, or a value that the config rounds."
        )
    first, second = (_greedy(one, prompt) for one in (model, loaded))
    if first != second:
        raise ConversionError("the model that was loaded again generates other tokens\nNothing was written.")
    return f"logits of {prompt.shape[1]} tokens are equal, and so are {len(first)} greedy tokens"


def _greedy(model: Any, prompt: Tensor) -> list[int]:
    with torch.no_grad():
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            past_key_values=LatentCache(model),
        )
    tokens: list[int] = made[0, prompt.shape[1] :].tolist()
    return tokens


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
