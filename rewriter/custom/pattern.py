"""A function read as attention: which argument is what, in which layout, and how its numbers follow from its scalars.

    b batch   h key heads   g heads that share one   i queries   j keys   d width   e value width

A layout is a tuple of such letters, one string for each dimension: "B (K G) S D" of a query reads ("b", "hg", "i", "d").
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ..axes import Axis, Layout, size_of
from ..canonical import width_of
from ..layouts import layout_step
from ..masks.terms import Flags
from ..plain_form import PlainForm, plain_form, to_source
from ..recognise import recognise
from ..roles import peel
from ..score_form import Unusual
from ..sites import AttentionSite, Bias, Operand
from .example import Example, Sizes, trace_example

Letters = tuple[str, ...]
Kind = Literal["query", "key", "value", "mask", "sinks"]

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


class PatternError(ValueError):
    """A function that is no pattern of attention, with the reason."""


@dataclass(frozen=True)
class Slot:
    """What an argument is, and in which layout the function wants it."""

    kind: Kind
    layout: Letters


@dataclass(frozen=True)
class Pattern:
    """One reading of a function: with the optional tensors in `absent` left out."""

    function: Callable[..., Any]
    example: Example
    absent: frozenset[str]
    slots: Mapping[str, Slot]
    output: Letters
    names: Mapping[str, frozenset[str]]
    """The letters that each name of a dimension stands for: "S" may name queries and keys."""

    flags: Flags
    """What the function hides by itself."""

    capped: bool
    sink: float | None
    exponents: tuple[tuple[float, ...], ...]
    """numbers[n] grows with the exponents[n][m]-th power of scalar m."""

    def has(self, kind: Kind) -> bool:
        return any(slot.kind == kind for slot in self.slots.values())

    @property
    def letters(self) -> str:
        return "".join("".join(slot.layout) for slot in self.slots.values())

    def numbers(self, sizes: Sizes, scalars: Mapping[str, float]) -> tuple[float, ...]:
        """Scale and, where there is one, cap."""
        form = _form_at(self.function, self.example, tuple(sizes.items()), tuple(scalars.items()), self.absent)
        return _numbers(form)

    def solve(self, sizes: Sizes, wanted: tuple[float, ...]) -> dict[str, float]:
        """The scalars with which the function comes nearest to these numbers: products of powers, solved by logarithms."""
        scalars = dict(self.example.scalars)
        given = self.numbers(sizes, scalars)
        if not scalars or any(w * g <= 0 for w, g in zip(wanted, given, strict=True)):
            return scalars
        powers = torch.tensor(self.exponents, dtype=torch.float64)
        ratios = torch.tensor([math.log(w / g) for w, g in zip(wanted, given, strict=True)], dtype=torch.float64)
        for name, change in zip(scalars, (torch.linalg.pinv(powers) @ ratios).tolist(), strict=True):
            scalars[name] = float(f"{scalars[name] * math.exp(change):.12g}")
        return scalars


def read_pattern(function: Callable[..., Any], example: Example, sizes: Sizes) -> tuple[Pattern, ...]:
    """The function as attention, once for each choice of optional tensors. Raises PatternError."""
    _check_parameters(function, example)
    return tuple(_Reader(function, example, sizes, absent).read() for absent in example.variants())


def example_sizes(example: Example, given: Sizes) -> dict[str, int]:
    """A size for every name, all different, so that no two dimensions are taken for one another."""
    if unknown := set(given) - set(example.names):
        raise PatternError(f"sizes: {unknown.pop()!r} is none of the example's dimensions {', '.join(example.names)}")
    primes = iter(p for p in _PRIMES if p not in given.values())
    return {name: given[name] if name in given else next(primes) for name in example.names}


def _check_parameters(function: Callable[..., Any], example: Example) -> None:
    declared = [*example.tensors, *example.scalars]
    parameters = inspect.signature(function).parameters
    lacking = [n for n, p in parameters.items() if n not in declared and p.default is p.empty]
    unknown = [n for n in declared if n not in parameters]
    if lacking or unknown:
        name = getattr(function, "__name__", "the function")
        what = f"no argument {unknown[0]!r}" if unknown else f"an argument {lacking[0]!r}, which the example lacks"
        raise PatternError(f"{name}({', '.join(parameters)}) has {what}; the example declares {', '.join(declared)}")


@functools.lru_cache(maxsize=256)
def _form_at(
    function: Callable[..., Any],
    example: Example,
    sizes: tuple[tuple[str, int], ...],
    scalars: tuple[tuple[str, float], ...],
    absent: frozenset[str],
) -> PlainForm:
    return _form(trace_example(function, example, dict(sizes), dict(scalars), absent), function)


def _form(traced: fx.GraphModule, function: Callable[..., Any]) -> PlainForm:
    """Raises PatternError unless the graph is one plain attention."""
    found = recognise(traced.graph)
    if len(found.sites) != 1:
        if found.sites:
            raise _no(function, f"it holds {len(found.sites)} attentions, not one")
        reasons = [miss.reason for miss in (*found.near_misses, *found.misses)]
        raise _no(function, f"it is no attention: {reasons[0] if reasons else 'it has no softmax'}")
    form = plain_form(found.sites[0])
    if isinstance(form, Unusual):
        raise _no(function, form.reason)
    if len(form.site.terms) > 1:
        raise _no(function, "it adds several products; one product matches them too, of queries and keys side by side")
    if form.scores.scale_by:
        raise _no(function, "it multiplies scores by a tensor; such tensors belong to the query that it is given")
    return form


def _numbers(form: PlainForm) -> tuple[float, ...]:
    return (form.scores.scale,) if form.scores.cap is None else (form.scores.scale, form.scores.cap)


def _no(function: Callable[..., Any], reason: str) -> PatternError:
    code = getattr(function, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return PatternError(f"the pattern {getattr(function, '__name__', function)!r}{place}: {reason}")


class _Reader:
    """Reads one variant of a pattern from its graph."""

    def __init__(self, function: Callable[..., Any], example: Example, sizes: Sizes, absent: frozenset[str]) -> None:
        self.function, self.example, self.sizes, self.absent = function, example, sizes, absent
        traced = trace_example(function, example, sizes, example.scalars, absent)
        self.form = _form(traced, function)
        self.site = self.form.site
        inputs = traced.graph.find_nodes(op="placeholder")
        self.argument = dict(zip(inputs, example.present(absent), strict=True))
        self.result = traced.graph.output_node().args[0]
        self.letters = _letters(self.site)
        self.slots: dict[str, Slot] = {}
        self.names: dict[str, set[str]] = {}

    def read(self) -> Pattern:
        term, scores = self.site.terms[0], self.form.scores
        self._add("query", term.query)
        self._add("key", term.key)
        self._add("value", self.site.value)
        flags, sink = self._mask(), self._sinks()
        if unused := set(self.argument.values()) - set(self.slots):
            raise _no(self.function, f"{unused.pop()!r} is not used, or not as query, key, value, mask or sinks")
        return Pattern(
            function=self.function,
            example=self.example,
            absent=self.absent,
            slots=self.slots,
            output=self._output(),
            names={name: frozenset(letters) for name, letters in self.names.items()},
            flags=flags,
            capped=scores.cap is not None,
            sink=sink,
            exponents=self._exponents(),
        )

    def _add(self, kind: Kind, operand: Operand) -> None:
        operand = to_source(operand, self.site)
        node, layout = operand.chain[-1]
        if node not in self.argument:
            made = f"computed by {node.target}" if node.op == "call_function" else "a constant"
            raise _no(self.function, f"its {kind} is {made} and no argument: a pattern begins at its arguments")
        name = self.argument[node]
        if name in self.slots:
            raise _no(self.function, f"{name!r} is {self.slots[name].kind} and {kind} at once")
        layout = self.site.space.resolve_layout(layout)
        seen: dict[str, str] = {}
        for names, dim in zip(self.example.tensors[name].dims, layout, strict=True):
            for one, letters in self._named(names, dim).items():
                for letter in letters:
                    if seen.setdefault(letter, one) != one:
                        raise _no(self.function, f"{seen[letter]} and {one} of {name!r} are one dimension to attention")
                self.names.setdefault(one, set()).add(letters)
        self.slots[name] = Slot(kind, tuple(self._text(dim) for dim in layout))

    def _named(self, names: tuple[str, ...], dim: tuple[Axis, ...]) -> dict[str, str]:
        """The letters that each name of a dimension stands for."""
        rest, found = list(dim), {}
        for name in names:
            axes: list[Axis] = []
            while rest and size_of(tuple(axes)) != self.sizes[name]:
                axes.append(rest.pop(0))
            if size_of(tuple(axes)) != self.sizes[name]:
                raise _no(self.function, f"the dimension {' '.join(names)!r} is cut elsewhere than between its names")
            found[name] = self._text(tuple(axes))
        return found

    def _text(self, dim: tuple[Axis, ...]) -> str:
        try:
            text = "".join(self.letters[axis] for axis in dim)
        except KeyError as error:
            raise _no(self.function, f"its axis {error} is none of an attention") from None
        return "".join(dict.fromkeys(text))  # an axis that was cut in two is one again

    def _mask(self) -> Flags:
        form = self.form
        masks = [step for step in form.scores.masks if isinstance(step, Bias) and isinstance(step.bias, fx.Node)]
        if not form.has_mask:
            return Flags()
        if len(masks) == len(form.scores.masks) == 1 and masks[0].factor == 1.0 and form.own == Flags():
            assert isinstance(masks[0].bias, fx.Node)
            operand = to_source(peel(masks[0].bias, masks[0].layout, self.site.space), self.site)
            if operand.root in self.argument:
                self._add("mask", operand)
                return Flags()
        if form.flags is None:
            reason = (
                "its mask is neither an argument that is added to the scores nor provably causal or a causal window; "
                "make it an argument: scores + mask"
            )
            raise _no(self.function, reason)
        return form.flags

    def _sinks(self) -> float | None:
        if not self.form.scores.sinks:
            return None
        (step,) = self.form.scores.sinks
        if isinstance(step.sink, fx.Node):
            self._add("sinks", peel(step.sink, step.layout, self.site.space))
            return None
        return step.sink

    def _output(self) -> Letters:
        """The layout of the function's result: that of the attention, after the layout operations behind it."""
        if not isinstance(self.result, fx.Node):
            raise _no(self.function, "it does not return one tensor")
        steps = []
        node = self.result
        while node is not self.site.output:
            step = layout_step(node)
            if step is None:
                raise _no(self.function, f"it goes on after the attention, with {node.target}")
            steps.append(step)
            node = step.source
        layout: Layout | None = self.site.output_layout
        for step in reversed(steps):
            layout = step.apply(self.site.space.resolve_layout(layout), self.site.space) if layout is not None else None
        if layout is None:
            raise _no(self.function, "it cuts the result of the attention")
        return tuple(self._text(dim) for dim in self.site.space.resolve_layout(layout))

    def _exponents(self) -> tuple[tuple[float, ...], ...]:
        base, scalars = _numbers(self.form), self.example.scalars
        columns = []
        for name, value in scalars.items():
            doubled = {**scalars, name: 2 * value}
            form = _form_at(self.function, self.example, tuple(self.sizes.items()), tuple(doubled.items()), self.absent)
            columns.append([math.log2(abs(n / b)) for n, b in zip(_numbers(form), base, strict=True)])
        rows = tuple(zip(*columns, strict=True))
        if scalars and int(torch.linalg.matrix_rank(torch.tensor(rows))) < len(scalars):
            reason = f"the scores do not tell its scalars {', '.join(scalars)} apart: they show a scale and a cap alone"
            raise _no(self.function, reason)
        return rows


def _letters(site: AttentionSite) -> dict[Axis, str]:
    axes = site.axes
    dims = {
        "b": axes.batch,
        "h": axes.heads,
        "g": axes.groups,
        "i": axes.queries,
        "j": axes.keys,
        "e": axes.value_width,
    }
    letters = {axis: letter for letter, dim in dims.items() for axis in dim}
    return {**{axis: "d" for axis in width_of(site)}, **letters}
