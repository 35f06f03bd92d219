"""A rewrite from two functions of plain PyTorch: what attention looks like, and what shall stand in its place.

    latent.replace("my_soft_cap", soft_capped, fused, example=dict(q="B H S D", k="B H T D", v="B H T E", cap=30.0))

Both functions take the same arguments. The first is read as attention, and matches every site that computes the same,
whatever its layout, its spelling, and the side on which it scales. The second is traced with the site's own tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import fx

from ..axes import Size, same_size, size_of
from ..compat import real_tensors_allowed, trace_pre_dispatch
from ..emit import Emitter
from ..layouts import is_tensor, shape_of
from ..normal_form import normalise
from ..opening import decompositions
from ..plain_form import plain_form
from ..provenance import module_path
from ..registry import rewrite
from ..rules import Benefit, Cost, Match, Refusal
from ..score_form import Unusual
from ..sites import AttentionSite
from .conditions import text_of
from .cost import cost_of
from .emission import emit_function, emit_operands
from .example import Example, call, trace_example
from .overlay import Differs, Overlay, lay_over
from .pattern import Pattern, PatternError, example_sizes
from .reading import read_pattern

__all__ = ["Dims", "Replacement", "replace"]

Dims = SimpleNamespace
"""The sizes of a site by the names of the example, as attributes, and its module path as `module`."""


def replace(
    name: str,
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    *,
    example: Mapping[str, str | float],
    where: Callable[[Dims], bool] | None = None,
    benefit: Callable[[Dims], Benefit] | None = None,
    sizes: Mapping[str, int] | None = None,
    exact: bool = True,
    before: tuple[str, ...] = ("*",),
    after: tuple[str, ...] = (),
) -> Replacement:
    """Register the rewrite pattern(...) -> replacement(...).

    `example` declares the arguments of both: the dimensions of a tensor ("B (K G) S D"; "B 1 S T | None" may be absent)
    or, for a number, a positive example value; numbers are found at each site. `where` is asked with the sizes by name
    and the module's path; a condition on a symbolic size becomes a guard. `benefit` predicts the cost of both sides;
    without it the operators' bytes and operations are counted. `sizes` are for reading the pattern, where it needs
    particular ones. A rewrite that is not exact runs only when named in the options. Rewrites of this form run before
    all others unless `before` and `after` say something else. Raises PatternError, ExampleError or ValueError.
    """
    read = Example.read(example)
    chosen = example_sizes(read, sizes or {})
    rule = Replacement(name, read_pattern(pattern, read, chosen), replacement, chosen, where, benefit, exact)
    rule.check_interface()
    rewrite(name, exact=exact, before=before, after=after)(rule)
    return rule


@dataclass(frozen=True, eq=False)
class Replacement:
    """The rewrite that `replace` registers."""

    name: str
    patterns: tuple[Pattern, ...]
    function: Callable[..., Any]
    sizes: Mapping[str, int]
    where: Callable[[Dims], bool] | None = None
    predicted: Callable[[Dims], Benefit] | None = None
    exact: bool = True

    @property
    def pattern(self) -> Callable[..., Any]:
        return self.patterns[0].function

    @property
    def example(self) -> Example:
        return self.patterns[0].example

    @property
    def equation(self) -> str:
        """The first line of the pattern's docstring, or the names of both functions."""
        said = inspect.getdoc(self.pattern)
        return said.splitlines()[0] if said else f"{_name(self.pattern)} -> {_name(self.function)}"

    def match(self, site: AttentionSite) -> Match | Refusal:
        form = plain_form(site)
        if isinstance(form, Unusual):
            return Refusal(form.reason, form.node)
        differences: list[Differs] = []
        for pattern in self.patterns:
            try:
                over = lay_over(pattern, form)
            except Differs as difference:
                differences.append(difference)
                continue
            if self.where is not None and not bool(self.where(_dims(over))):
                sizes = ", ".join(f"{name}={size}" for name, size in over.sizes.items())
                return Refusal(f"its condition does not hold: {text_of(self.where)}, with {sizes}", site.anchor)
            return Match(form.site, {"over": over}, evaluate=over.proven, reads=form.reads)
        nearest = max(differences, key=lambda difference: difference.passed)
        return Refusal(nearest.reason, nearest.node)

    def benefit(self, match: Match) -> Benefit:
        over: Overlay = match.facts["over"]
        if self.predicted is not None:
            return self.predicted(_dims(over))
        if not self.exact:  # it was asked for by name, and not for its speed
            return Benefit(Cost(0, 0), Cost(0, 0))
        sizes, absent = over.example_sizes(), over.pattern.absent
        before, after = (
            cost_of(trace_example(function, self.example, sizes, over.scalars, absent))
            for function in (self.pattern, self.function)
        )
        return Benefit(before, after)

    def build(self, match: Match, emit: Emitter) -> fx.Node:
        over: Overlay = match.facts["over"]
        tensors = emit_operands(emit, over)

        def body(*values: Any) -> Any:
            return call(self.function, self.example, dict(zip(tensors, values, strict=True)), over.scalars)

        given = [node.meta["val"] for node in tensors.values()]
        with real_tensors_allowed(given):
            traced = normalise(trace_pre_dispatch(body, given, decompositions=decompositions()))
        out = emit_function(emit, traced, list(tensors.values()), _name(self.function))
        layout = over.layout(over.pattern.output)
        self._check_shape(shape_of(out), tuple(size_of(dim) for dim in layout))
        out = emit.relayout(out, layout, match.site.output_layout)
        return emit.cast(out, match.site.output.meta["val"].dtype)

    def _check_shape(self, got: tuple[Size, ...], wanted: tuple[Size, ...]) -> None:
        if len(got) == len(wanted) and all(map(same_size, got, wanted)):
            return
        looped = [size for size in wanted if not isinstance(size, int) and size not in got]
        why = f"; a loop over {looped[0]} holds for one size alone" if looped and len(got) == len(wanted) else ""
        raise ValueError(f"{_name(self.function)} returned {got}, and the pattern returns {wanted}{why}")

    def check_interface(self) -> None:
        """Raise PatternError unless the replacement takes and returns what the pattern does."""
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        for pattern in self.patterns:
            ours, theirs = (
                _result_shape(function, self.example, self.sizes, pattern.absent)
                for function in (self.pattern, self.function)
            )
            if ours != theirs:
                raise PatternError(
                    f"{_name(self.function)} returns {theirs} where {_name(self.pattern)} returns {ours}, with {sizes}"
                )
        if self.where is not None:  # a misspelled name is an error here, and not at every site
            self.where(Dims(**self.sizes, module=""))


def _result_shape(
    function: Callable[..., Any], example: Example, sizes: Mapping[str, int], absent: frozenset[str]
) -> tuple[int, ...] | str:
    traced = trace_example(function, example, sizes, example.scalars, absent)
    result = traced.graph.output_node().args[0]
    return tuple(result.meta["val"].shape) if is_tensor(result) else f"no tensor but {result}"  # type: ignore[union-attr]


def _dims(over: Overlay) -> Dims:
    return Dims(**over.sizes, module=module_path(over.form.site.anchor))


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))
