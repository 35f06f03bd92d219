"""What every key head of a model sees, as data that a person reads and edits.

layers:
  0-3:                     # four layers alike
  - full
  - {sinks: 4, alpha: 128, beta: 0.25}
  - {block: 64, local: 8, stride: 3, offset: 1}
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from .span import Full, Span, Strided, Window

__all__ = ["PlanError", "SpanPlan", "span_of", "span_settings"]

HEADER = """\
# Which tokens each key head sees: layers from 0, and a line for every head.
#   full                                    all of them
#   {sinks, alpha, beta}                    the first `sinks`, and of n tokens the last alpha + beta n
#   {block, local, stride, offset}          the last `local` blocks, and each k with (k + offset + 1) mod stride = 0
"""


class PlanError(ValueError):
    """A plan that does not make sense: where, and what is wrong."""


@dataclass(frozen=True)
class SpanPlan:
    """A span for every layer and key head. Raises PlanError."""

    layers: tuple[tuple[Span, ...], ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise PlanError("the plan has no layers")
        for n, heads in enumerate(self.layers):
            if not heads:
                raise PlanError(f"layer {n} has no heads")
            for g, span in enumerate(heads):
                if faults := span.faults():
                    raise PlanError(f"layer {n}, head {g}: {'; '.join(faults)}")

    @classmethod
    def uniform(cls, layers: int, heads: int, span: Span) -> SpanPlan:
        """The same span everywhere."""
        return cls(((span,) * heads,) * layers)

    @classmethod
    def streaming(
        cls, layers: int, heads: int, retrieval: Collection[tuple[int, int]], sinks: int = 64, recent: int = 256
    ) -> SpanPlan:
        """The (layer, head) pairs of `retrieval` see everything, the others sinks and recent tokens (DuoAttention)."""
        if strange := sorted(set(retrieval) - {(n, g) for n in range(layers) for g in range(heads)}):
            raise PlanError(f"there is no layer {strange[0][0]}, head {strange[0][1]}: {layers} layers × {heads} heads")
        stream = Window(sinks, recent)
        return cls(tuple(tuple(Full() if (n, g) in retrieval else stream for g in range(heads)) for n in range(layers)))

    @classmethod
    def strided(cls, layers: int, heads: int, block: int = 64, local: int = 8, stride: int = 3) -> SpanPlan:
        """Every head keeps another one of `stride` blocks (S2). Warns where together they do not keep every block."""
        step = max(1, stride // heads)
        if heads < stride:
            warnings.warn(
                f"{heads} key heads keep {heads} of every {stride} blocks: older tokens in the others are seen by no "
                f"head. A stride of at most {heads} keeps them all.",
                stacklevel=2,
            )
        one_layer: tuple[Span, ...] = tuple(Strided(block, local, stride, g * step) for g in range(heads))
        return cls((one_layer if stride > 1 else (Full(),) * heads,) * layers)

    @property
    def heads(self) -> Iterator[tuple[int, int, Span]]:
        """(layer, head, span)."""
        return ((n, g, span) for n, spans in enumerate(self.layers) for g, span in enumerate(spans))

    def rows(self, length: int) -> int:
        """How many tokens are cached of a sequence, over all heads."""
        return sum(span.rows(length) for _, _, span in self.heads)

    def density(self, length: int) -> float:
        """As a share of what heads that see everything cache."""
        return self.rows(length) / (length * sum(map(len, self.layers)))

    def mean_span(self, length: int) -> float:
        """How many of the newest tokens a head sees on average; sinks are not counted."""
        spans = [min(length, int(span.band(length))) for _, _, span in self.heads]
        return sum(spans) / len(spans)

    # ** files **

    def to_yaml(self) -> str:
        lines = [HEADER + "layers:"]
        start = 0
        for heads, same in groupby(self.layers):
            end = start + len(list(same)) - 1
            lines.append(f"  {start}:" if start == end else f"  {start}-{end}:")
            lines += [f"  - {_flow(span)}" for span in heads]
            start = end + 1
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    @classmethod
    def from_yaml(cls, text: str, name: str = "the plan") -> SpanPlan:
        """Raises PlanError that names the layer and the head."""
        try:
            import yaml
        except ImportError as error:
            raise PlanError(f'{name}: reading it needs PyYAML: pip install "torch-latent[convert]"') from error
        try:
            read = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PlanError(f"{name}: {error}") from error
        layers = read.get("layers") if isinstance(read, dict) else None
        if not isinstance(layers, dict) or not layers:
            raise PlanError(f"{name}: it has no entry `layers` with a list of heads for each layer")
        found: dict[int, tuple[Span, ...]] = {}
        try:
            for key, heads in layers.items():
                spans = _heads_of(key, heads)
                for n in _numbers(key):
                    if n in found:
                        raise PlanError(f"layer {n} is given twice")
                    found[n] = spans
            if missing := set(range(max(found) + 1)) - set(found):
                raise PlanError(f"layer {min(missing)} is missing")
            return cls(tuple(found[n] for n in sorted(found)))
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> SpanPlan:
        """From a YAML file, or from the folder of a converted model. Raises PlanError."""
        path = Path(path)
        if not path.is_dir():
            if not path.is_file():
                raise PlanError(f"{path}: there is no such file")
            return cls.from_yaml(path.read_text(encoding="utf-8"), str(path))
        config = path / "config.json"
        latent = json.loads(config.read_text(encoding="utf-8")).get("latent") if config.is_file() else None
        attentions: Mapping[str, Any] = (latent or {}).get("attentions", {})
        parts = [one["parts"].get("reach") for one in attentions.values()]
        if not parts or not all(parts):
            raise PlanError(f"{path}: its config.json holds no spans, so it is no model that was converted to some")
        return cls(tuple(spans_of_settings(part["classes"], part["order"]) for part in parts))


def spans_of_settings(classes: Sequence[Sequence[Any]], order: Sequence[int]) -> tuple[Span, ...]:
    """The spans of a layer's heads as the model had them, from what a converted attention keeps of them."""
    sorted_heads = [span_of(settings) for settings, count in classes for _ in range(count)]
    return tuple(span for _, span in sorted(zip(order, sorted_heads, strict=True), key=lambda pair: pair[0]))


_KINDS: dict[str, type[Any]] = {kind.kind: kind for kind in (Full, Window, Strided)}


def span_settings(span: Span) -> dict[str, Any]:
    """As plain data."""
    return {"kind": span.kind, **asdict(span)}


def span_of(settings: object) -> Span:
    """The span that plain data says; the kind is known from the names. Raises PlanError."""
    if isinstance(settings, str):
        settings = {"kind": settings}
    if not isinstance(settings, Mapping):
        raise PlanError(f"{settings!r} is no span; write `full` or {{sinks: 4, alpha: 128}}")
    given = dict(settings)
    kind = given.pop("kind", "strided" if given.keys() & {"block", "local", "stride", "offset"} else "window")
    if kind not in _KINDS:
        raise PlanError(f"there is no kind {kind!r}; there are {', '.join(_KINDS)}")
    made = _KINDS[kind]
    known = {field.name: field for field in fields(made)}
    if strange := sorted(map(str, given.keys() - known.keys())):
        raise PlanError(f"{kind} has no {', '.join(strange)}; it has {', '.join(known) or 'no numbers'}")
    for name, value in given.items():
        whole = known[name].type != "float"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise PlanError(f"{name} is {value!r}; it is a {'whole ' if whole else ''}number")
    if missing := [n for n in ("block", "local", "stride") if kind == "strided" and n not in given]:
        raise PlanError(f"{kind} needs {', '.join(missing)}")
    if kind == "window" and not given.keys() & {"alpha", "beta"}:
        raise PlanError("window needs alpha, beta, or both")
    found: Span = made(**given)
    return found


def _heads_of(key: object, heads: object) -> tuple[Span, ...]:
    if not isinstance(heads, list) or not heads:
        raise PlanError(f"layer {key}: it is a list with an entry for every key head")
    spans = []
    for g, settings in enumerate(heads):
        try:
            spans.append(span_of(settings))
        except PlanError as error:
            raise PlanError(f"layer {key}, head {g}: {error}") from None
    return tuple(spans)


def _numbers(key: object) -> range:
    """5 or "0-3"."""
    first, dash, last = str(key).partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise PlanError(f"layer {key}: a layer is a number, or two with a dash between them")
    return range(int(first), int(last or first) + 1)


def _flow(span: Span) -> str:
    numbers = ", ".join(f"{name}: {value}" for name, value in asdict(span).items())
    return f"{{{numbers}}}" if numbers else span.kind
