"""`latent masks`: pictures of which keys each query sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..report_text import collapse, grouped
from .common import (
    FromConfig,
    HFChoices,
    Json,
    Phase,
    PhaseChoice,
    SpellingChoice,
    errors,
    in_a_folder,
    load,
    stdout_is_for_us,
)
from .console import progress, show
from .plan_masks import plan_classes, plan_of_target
from .targets import Target, TargetError

if TYPE_CHECKING:
    from ..effective_masks import EffectiveMask

__all__ = ["masks"]

COLUMNS, ROWS = 96, 48
"""The largest picture in characters; larger masks are drawn in shades."""
SHADES = "·░▒▓█"


def masks(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A Hugging Face folder, FILE.py:FACTORY whose factory returns (model, args, kwargs), or a span plan "
            "(.yaml, or the folder of a model that was converted to one).",
        ),
    ],
    layer: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Only this attention, counted from 0 in the order of the call."),
    ] = None,
    head: Annotated[
        int, typer.Option(min=0, help="Which head, counted from 0 through the batch; of plans all are shown.")
    ] = 0,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", metavar="FILE", help="Draw into this file: .txt, or .png, .svg, .pdf (extra `report`)."),
    ] = None,
    length: Annotated[int, typer.Option("--len", min=1, help="For folders and plans: how many tokens there are.")] = 16,
    phase: PhaseChoice = Phase.prefill,
    attention: SpellingChoice = None,
    from_config: FromConfig = False,
    as_json: Json = False,
) -> None:
    """Show which keys each query sees; layers with the same mask are shown once."""
    with errors(), stdout_is_for_us():
        in_a_folder(out)
        plt = _matplotlib() if out is not None and out.suffix != ".txt" else None
        plan = plan_of_target(target)
        if plan is not None:
            classes, notes = plan_classes(plan, layer, length), [f"span plan, {len(plan.layers)} layers"]
        else:
            found = load(target, HFChoices(from_config, phase.value, length, attention.value if attention else None))
            classes, notes = _classes(found, layer, head), list(found.notes)
        text = "\n\n".join(_picture(same, head) for same in classes) or "no attention was found"
        if plt is not None and out is not None:
            _draw(plt, classes, head, out)
        elif out is not None:
            out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps({"target": target, "head": head, "masks": [_plain(same) for same in classes]}))
    else:
        show(f"{target}   {'; '.join(notes)}".rstrip() + "\n\n" + (text if out is None else f"written: {out}"))


def _classes(found: Target, layer: int | None, head: int) -> list[list[EffectiveMask]]:
    """The masks of a call, equal ones together. Raises TargetError."""
    import torch

    from ..effective_masks import effective_masks

    with progress("tracing, and reading the masks"), torch.no_grad():
        try:
            every = effective_masks(found.model, found.args, found.kwargs, head)
        except IndexError as error:
            raise TargetError(f"--head {head}: {error}.", "Choose one of them.") from error
    if layer is not None and layer >= len(every):
        raise TargetError(f"--layer {layer}: the call has {len(every)} attentions.", "They are counted from 0.")
    return grouped(every if layer is None else every[layer : layer + 1], _identity)


def _matplotlib() -> Any:
    from .bench_text import import_matplotlib

    return import_matplotlib("--out")


def _identity(mask: EffectiveMask) -> object:
    rows = None if mask.visible is None else (mask.visible.shape, mask.visible.numpy().tobytes())
    return mask.words, mask.proven, mask.heads, rows


def _title(same: list[EffectiveMask], head: int) -> tuple[str, str]:
    """Where, and what: two lines."""
    mask = same[0]
    place = collapse([m.path for m in same]) or "the model itself" + (f" × {len(same)}" if len(same) > 1 else "")
    words = "no mask" if mask.words == "none" else f"mask {mask.words}"
    facts = [words, "proven" if mask.proven else "not proven, as in this call"]
    facts += ["from the call's inputs"] if mask.data and mask.proven else []
    facts += [f"head {head} of {mask.heads}"] if mask.varies else []
    if mask.visible is not None:
        queries, keys = mask.visible.shape
        facts.append(f"{queries} × {keys}")
        facts.append(f"{100 * float(mask.visible.float().mean()):.0f} % visible")
    return f"{place}   {mask.line}".rstrip(), " · ".join(facts)


def _picture(same: list[EffectiveMask], head: int) -> str:
    """Rows are queries, columns keys."""
    mask = same[0].visible
    lines = [] if mask is None else _shades(mask)
    return "\n".join([*_title(same, head), *(f"  {line}" for line in lines)])


def _shades(visible: Any) -> list[str]:
    """Two characters per key where they fit, else one for several keys and queries, as dark as many are visible."""
    from torch.nn.functional import adaptive_avg_pool2d

    queries, keys = visible.shape
    wide = 2 if 2 * keys <= COLUMNS else 1
    shares = adaptive_avg_pool2d(visible[None].float(), (min(queries, ROWS), min(keys, COLUMNS)))[0]
    return ["".join(SHADES[_shade(share)] * wide for share in row) for row in shares.tolist()]


def _shade(share: float) -> int:
    """Only what is hidden altogether is empty, and only what is visible altogether is full."""
    last = len(SHADES) - 1
    return 0 if share == 0 else last if share == 1 else min(max(round(share * last), 1), last - 1)


def _draw(plt: Any, classes: list[list[EffectiveMask]], head: int, path: Path) -> None:
    """A panel for every class of layers. Raises TargetError."""
    drawn = [same for same in classes if same[0].visible is not None]
    columns = min(3, max(1, len(drawn)))
    rows = -(-max(1, len(drawn)) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.2 * columns, 4.4 * rows), squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, same in zip(panels.flat, drawn, strict=False):
        assert same[0].visible is not None
        panel.set_axis_on()
        panel.imshow(same[0].visible.numpy(), cmap="Greys", vmin=0, vmax=1.25, aspect="auto", interpolation="nearest")
        place, facts = _title(same, head)
        panel.set_title(f"{place.split('   ')[0]}\n{facts}", fontsize=7)
        panel.set_xlabel("keys", fontsize=8)
        panel.set_ylabel("queries", fontsize=8)
        panel.tick_params(labelsize=7)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise TargetError(f"--out {path}: {error}", "Name a .txt, .png, .svg or .pdf file.") from error
    finally:
        plt.close(figure)


def _plain(same: list[EffectiveMask]) -> dict[str, Any]:
    mask = same[0]
    rows = None if mask.visible is None else ["".join("01"[seen] for seen in row) for row in mask.visible.tolist()]
    return {
        "paths": [m.path for m in same],
        "line": mask.line,
        "mask": mask.words,
        "proven": mask.proven,
        "from_inputs": mask.data,
        "heads": mask.heads,
        "varies": mask.varies,
        "rows": rows,
    }
