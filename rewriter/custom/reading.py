"""Reading a function as a pattern: its arguments' roles, the layout of each, and how its numbers follow its scalars."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..axes import Axis, Layout, size_of
from ..canonical import width_of
from ..layouts import layout_step
from ..masks.terms import Flags
from ..plain_form import to_source
from ..roles import peel
from ..sites import AttentionSite, Bias, Operand
from .example import Example, Sizes, trace_example
from .pattern import Kind, Letters, Pattern, PatternError, Slot, form_at, form_of, numbers_of, refused

__all__ = ["read_pattern"]


def read_pattern(function: Callable[..., Any], example: Example, sizes: Sizes) -> tuple[Pattern, ...]:
    """The function as attention, once for each choice of optional tensors. Raises PatternError."""
    _check_parameters(function, example)
    return tuple(_Reader(function, example, sizes, absent).read() for absent in example.variants())


def _check_parameters(function: Callable[..., Any], example: Example) -> None:
    declared = [*example.tensors, *example.scalars]
    parameters = inspect.signature(function).parameters
    lacking = [n for n, p in parameters.items() if n not in declared and p.default is p.empty]
    unknown = [n for n in declared if n not in parameters]
    if lacking or unknown:
        name = getattr(function, "__name__", "the function")
        what = f"no argument {unknown[0]!r}" if unknown else f"an argument {lacking[0]!r}, which the example lacks"
        raise PatternError(f"{name}({', '.join(parameters)}) has {what}; the example declares {', '.join(declared)}")


class _Reader:
    """Reads one variant of a pattern from its graph."""

    def __init__(self, function: Callable[..., Any], example: Example, sizes: Sizes, absent: frozenset[str]) -> None:
        self.function, self.example, self.sizes, self.absent = function, example, sizes, absent
        traced = trace_example(function, example, sizes, example.scalars, absent)
        self.form = form_of(traced, function)
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
        self._check_outer()
        flags, sink = self._mask(), self._sinks()
        if unused := set(self.argument.values()) - set(self.slots):
            raise refused(self.function, f"{unused.pop()!r} is not used, or not as query, key, value, mask or sinks")
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
            raise refused(self.function, f"its {kind} is {made} and no argument: a pattern begins at its arguments")
        name = self.argument[node]
        if name in self.slots:
            raise refused(self.function, f"{name!r} is {self.slots[name].kind} and {kind} at once")
        layout = self.site.space.resolve_layout(layout)
        seen: dict[str, str] = {}
        for names, dim in zip(self.example.tensors[name].dims, layout, strict=True):
            for one, letters in self._named(names, dim).items():
                for letter in letters:
                    if seen.setdefault(letter, one) != one:
                        raise refused(self.function, f"{seen[letter]} and {one} of {name!r} are one dimension here")
                self.names.setdefault(one, set()).add(letters)
        self.slots[name] = Slot(kind, tuple(self._text(dim) for dim in layout))

    def _check_outer(self) -> None:
        """Batch, heads and groups: keys and values have the same, and queries all of them, as a site's always do."""
        query, key, value = (set("".join(slot.layout)) & set("bhg") for slot in self.slots.values())
        if key != value or not key <= query:
            raise refused(self.function, "its queries, keys and values do not have the same batch and head dimensions")

    def _named(self, names: tuple[str, ...], dim: tuple[Axis, ...]) -> dict[str, str]:
        """The letters that each name of a dimension stands for."""
        rest, found = list(dim), {}
        for name in names:
            axes: list[Axis] = []
            while rest and size_of(tuple(axes)) != self.sizes[name]:
                axes.append(rest.pop(0))
            if size_of(tuple(axes)) != self.sizes[name]:
                raise refused(self.function, f"the dimension ({' '.join(names)}) is not cut between its names")
            found[name] = self._text(tuple(axes))
        return found

    def _text(self, dim: tuple[Axis, ...]) -> str:
        try:
            text = "".join(self.letters[axis] for axis in dim)
        except KeyError as error:
            raise refused(self.function, f"its axis {error} is none of an attention") from None
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
            raise refused(self.function, reason)
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
            raise refused(self.function, "it does not return one tensor")
        steps = []
        node = self.result
        while node is not self.site.output:
            step = layout_step(node)
            if step is None:
                raise refused(self.function, f"it goes on after the attention, with {node.target}")
            steps.append(step)
            node = step.source
        layout: Layout | None = self.site.output_layout
        for step in reversed(steps):
            layout = step.apply(self.site.space.resolve_layout(layout), self.site.space) if layout is not None else None
        if layout is None:
            raise refused(self.function, "it cuts the result of the attention")
        return tuple(self._text(dim) for dim in self.site.space.resolve_layout(layout))

    def _exponents(self) -> tuple[tuple[float, ...], ...]:
        base, scalars = numbers_of(self.form), self.example.scalars
        columns = []
        for name, value in scalars.items():
            doubled = {**scalars, name: 2 * value}
            form = form_at(self.function, self.example, tuple(self.sizes.items()), tuple(doubled.items()), self.absent)
            columns.append([math.log2(abs(n / b)) for n, b in zip(numbers_of(form), base, strict=True)])
        rows = tuple(zip(*columns, strict=True))
        if scalars and int(torch.linalg.matrix_rank(torch.tensor(rows))) < len(scalars):
            reason = f"the scores do not tell its scalars {', '.join(scalars)} apart: they show a scale and a cap alone"
            raise refused(self.function, reason)
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
