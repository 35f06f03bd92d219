"""`latent eval`: what a causal language model is worth and what its cache costs, beside its original, offline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..units import plural
from .common import Json, Spelling, SpellingChoice, errors, stdout_is_for_us
from .console import counted, progress, show
from .targets import HFChoices, TargetError, load_target

if TYPE_CHECKING:
    from ..evaluate.evaluation import Material, Protocol, Results

__all__ = ["cache_for", "evaluate", "load_model", "load_tokenizer"]


def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="Hugging Face folders of causal language models, or FILE.py:FACTORY; each is a line of the table.",
        ),
    ],
    base: Annotated[
        Optional[str],  # noqa: UP045  # typer reads it while running, on Python 3.10 too
        typer.Option("--against", metavar="BASE", help="The original: adds its line, KL and agreement with it."),
    ] = None,
    text: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--text",
            metavar="FILE|pkg:NAME",
            help="Score this text; may be given several times. Without it pkg:pydoc (prose) and pkg:stdlib (code).",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens of each text are scored.")] = 4096,
    length: Annotated[int, typer.Option(min=2, help="How many tokens a window has.")] = 512,
    prefix: Annotated[int, typer.Option(min=1, help="How many of them are read, in one call, before scoring.")] = 128,
    call: Annotated[int, typer.Option(min=1, help="How many scored tokens a call has.")] = 128,
    gap: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option("--gap", min=32, help="Recall a string at this distance; several. Else 128, 512, 2048, 4096."),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="How many sequences of repeated strings.")] = 1,
    filled: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option("--filled", min=1, help="Measure a cache of so many tokens; several. Else 512 and 2048."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the windows and the strings.")] = 0,
    tokenizer: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--tokenizer", metavar="DIR", help="A folder with the tokenizer, if no target is one."),
    ] = None,
    attention: SpellingChoice = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--plot", metavar="FILE", help="Draw perplexity against cache bytes (.png, .svg, .pdf)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, KL, recall of repeated strings, cache bytes and decoding speed of causal language models."""
    with errors(), stdout_is_for_us():
        from .bench_text import import_matplotlib
        from .eval_text import plot as draw_plot
        from .eval_text import render

        if plot is not None:
            import_matplotlib()  # said before the work, not after it
            if not plot.absolute().parent.is_dir():
                raise TargetError(f"--plot {plot}: there is no folder {plot.parent}.", "Make it, or name another.")
        with progress("importing torch"):
            from ..evaluate.evaluation import Protocol
            from ..evaluate.texts import DEFAULT_TEXTS
        standard = Protocol()
        protocol = Protocol(
            tokens=tokens,
            length=length,
            prefix=prefix,
            call=call,
            gaps=tuple(gap or standard.gaps),
            draws=draws,
            lengths=tuple(filled or standard.lengths),
            seed=seed,
        )
        results = _measured(targets, base, text or DEFAULT_TEXTS, protocol, tokenizer, attention)
        if plot is not None:
            draw_plot(results, plot)
    if as_json:
        print(json.dumps(results.to_dict()))
    else:
        show(render(results))


def _measured(
    targets: Sequence[str],
    base: str | None,
    texts: Sequence[str],
    protocol: Protocol,
    tokenizer: Path | None,
    attention: Spelling | None,
) -> Results:
    import torch

    from ..evaluate.evaluation import Results, draw, evaluate, evaluate_original, references
    from ..evaluate.texts import read_text

    models = [name for name in (base, *targets) if name is not None]
    protocol.scoring.spans(protocol.length)  # refuses sizes that do not fit, before anything is loaded
    folder = tokenizer or next((Path(name) for name in models if Path(name).is_dir()), None)
    reader = load_tokenizer(folder)
    with progress(f"reading {', '.join(texts)}"):
        drawn = draw(reader, [read_text(name) for name in texts], protocol)
    evaluations, known, dtypes = [], None, []
    for name, label in zip(models, _labels(models), strict=True):
        model = load_model(name, attention)
        _check_tokens(name, model, drawn)
        dtypes.append(str(model.dtype).removeprefix("torch."))

        def bar(what: str, total: int, label: str = label) -> Any:
            return counted(f"{label}: {what}", total)

        if base is not None and known is None:
            known = references(model, drawn, protocol, bar)
            found = evaluate_original(label, model, drawn, protocol, known, cache_for, bar)
        else:
            found = evaluate(label, model, drawn, protocol, cache_for, known, bar)
        evaluations.append(found)
        del model  # before the next is loaded
    notes = (", ".join(dict.fromkeys(dtypes)), plural(torch.get_num_threads(), "thread"))
    digests = {sample.text: sample.digest for sample in drawn.samples}
    return Results(protocol, digests, tuple(evaluations), evaluations[0].name if base else None, notes)


def cache_for(model: Any) -> Any:
    """An empty cache of the kind that a model is used with."""
    import transformers

    from ..convert.attention import ConvertedAttention
    from ..convert.cache import LatentCache

    if any(isinstance(module, ConvertedAttention) for module in model.modules()):
        return LatentCache(model)
    return transformers.DynamicCache(config=model.config)


def load_model(name: str, attention: Spelling | None = None) -> Any:
    """The causal language model of a target. Raises TargetError."""
    import torch

    from .huggingface import WEIGHTS, import_transformers

    folder = Path(name)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        raise TargetError(f"{name}: the folder holds no weights.", "Random ones would say nothing about the model.")
    import_transformers().logging.disable_progress_bar()  # one display is enough
    with progress(f"loading {name}"):
        model = load_target(name, HFChoices(attention=attention.value if attention else None)).model
    generates = getattr(model, "can_generate", None)
    if not isinstance(model, torch.nn.Module) or not callable(generates) or not generates():
        raise TargetError(
            f"{name}: {type(model).__name__} is no language model of transformers that generates.",
            "Perplexity needs a model such as LlamaForCausalLM, with a configuration and caches.",
        )
    return model.eval()


def load_tokenizer(folder: Path | None) -> Any:
    """The tokenizer of a folder. Raises TargetError."""
    from .huggingface import import_transformers

    if folder is None:
        raise TargetError("No target is a folder, so there is no tokenizer.", "Name a folder that has one: --tokenizer")
    with progress(f"loading the tokenizer of {folder}"):
        try:
            return import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            first = str(error).splitlines()[0]
            raise TargetError(
                f"{folder}: there is no tokenizer that can be loaded: {first}",
                "Name a folder that has one: --tokenizer DIR.",
            ) from error


def _check_tokens(name: str, model: Any, drawn: Material) -> None:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    largest = max(int(sample.tokens.max()) for sample in drawn.samples)
    if largest >= vocabulary:
        raise TargetError(
            f"{name}: the model knows {vocabulary} tokens, but the texts contain token {largest}.",
            "All models of a table share a tokenizer; name theirs with --tokenizer DIR.",
        )


def _labels(names: Sequence[str]) -> Iterator[str]:
    """The last part of a path where that tells the models apart."""
    short = [Path(name).name or name for name in names]
    return (one if short.count(one) == 1 else name for one, name in zip(short, names, strict=True))
