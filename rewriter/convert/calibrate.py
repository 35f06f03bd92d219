"""What recipes learn from text: second moments of linear functions of the hidden states that each attention reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConversionRefused

__all__ = ["Calibration", "Progress", "calls", "silent", "tokens_of"]

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """Progress that is told to nobody."""


@dataclass(frozen=True)
class Calibration:
    """Text as token ids [N, L], run through the model that is converted, `batch` rows at a time."""

    model: nn.Module
    tokens: Tensor | None
    batch: int = 4
    progress: Progress = silent

    def required(self, recipe: str) -> Tensor:
        """The token ids. Raises ConversionRefused where none were given."""
        if self.tokens is None or self.tokens.numel() == 0:
            raise ConversionRefused(
                recipe,
                "it learns from text, and none was given",
                "Pass calibrate=texts (and tokenizer=), or token ids.",
            )
        return self.tokens

    def batches(self, recipe: str, what: str) -> Iterator[Tensor]:
        """The rows, `batch` at a time, on the model's device; tells `progress`."""
        tokens = self.required(recipe)
        device = next(self.model.parameters()).device
        for start in range(0, len(tokens), self.batch):
            self.progress(what, start, len(tokens))
            yield tokens[start : start + self.batch].to(device)
        self.progress(what, len(tokens), len(tokens))

    def second_moments(self, maps: Mapping[str, Tensor], recipe: str) -> dict[str, Tensor]:
        """Σ (W x)(W x)ᵀ over all tokens, in float64, for the matrix [n, C] of each attention path."""
        return self.moments(maps, {}, recipe)[0]

    def moments(
        self, maps: Mapping[str, Tensor], squared: Mapping[str, Tensor], recipe: str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Σ (W x)(W x)ᵀ for the matrices in `maps`, and its diagonal alone for those in `squared`."""
        sums: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}

        def see(path: str, hidden: Tensor) -> None:
            rows = hidden.flatten(0, -2)
            made = (rows @ maps[path].to(hidden).t()).double()
            sums[path] = made.t() @ made + sums.get(path, 0)
            if path in squared:
                squares[path] = (rows @ squared[path].to(hidden).t()).double().square().sum(0) + squares.get(path, 0)

        with torch.no_grad(), hidden_states(self.model, list(maps), see):
            for ids in self.batches(recipe, "second moments"):
                self.run(ids)
        return sums, squares

    def loss(self, modules: Mapping[str, nn.Module], recipe: str, what: str, rows: int = 8) -> float:
        """Mean loss of the next token with `modules` at those paths, on up to `rows` rows spread over the text."""
        some, total = self.spread(recipe, rows), 0.0
        for ids in some.batches(recipe, what):
            logits = self.logits(modules, ids)
            total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())) * len(ids)
        return total / len(some.required(recipe))

    def spread(self, recipe: str, rows: int) -> Calibration:
        """Up to so many rows, from all over the text."""
        tokens = self.required(recipe)
        return replace(self, tokens=tokens[:: -(-len(tokens) // rows)])

    def logits(self, modules: Mapping[str, nn.Module], ids: Tensor) -> Tensor:
        """Of the model with `modules` at those paths, in float32 at least: [B, L, V]."""
        with torch.no_grad(), put_in(self.model, modules):
            made: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return made.to(torch.promote_types(made.dtype, torch.float32))

    def run(self, rows: Tensor) -> None:
        """One forward of the model, without a cache and without logits."""
        base_of(self.model)(input_ids=rows, use_cache=False)


def base_of(model: nn.Module) -> nn.Module:
    """The model without its head, where transformers tells them apart: no logits are computed."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


@contextlib.contextmanager
def put_in(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules at some paths of a model, until the block ends."""
    own = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in own.items():
            model.set_submodule(path, module)


@contextlib.contextmanager
def hidden_states(model: nn.Module, paths: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(path, hidden)` with what each attention module is given, until the block ends."""

    def first(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(path, args[0] if args else kwargs["hidden_states"])

    with calls(model, paths, first):
        yield


@contextlib.contextmanager
def calls(
    model: nn.Module, paths: Sequence[str], see: Callable[[str, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Call `see(path, args, kwargs)` with the arguments of each attention module, until the block ends."""
    handles = []
    for path in paths:

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            see(path, args, kwargs)

        handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tokens_of(texts: object, tokenizer: Any, length: int = 256) -> Tensor | None:
    """Token ids [N, length] of texts, one after another without padding; token ids stay as they are."""
    if texts is None or isinstance(texts, Tensor):
        return texts if texts is None or texts.ndim == 2 else texts[None]
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError("calibrate is a list of texts, or token ids [N, L]")
    if tokenizer is None:
        raise TypeError("texts need a tokenizer: convert(model, recipe, calibrate=texts, tokenizer=tokenizer)")
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    rows = len(ids) // length
    if rows == 0:
        raise ValueError(f"the texts have {len(ids)} tokens; at least {length} are needed")
    return torch.tensor(ids[: rows * length]).view(rows, length)
