"""Bisection by rewrite fuel: the first application of a rewrite at which a model's output leaves eager's.

With fuel k the first k applications are made, in the order of judging: rewrite by rewrite, site by site, graph by
graph. The search keeps one fuel that was measured to be good and one that was measured to be bad until they are
neighbours, so what it names was seen to make the difference, whether or not the error grows with the fuel.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .backend import compile_transformed, transform
from .compat import compile_id
from .explain import call_through, owner_of, unchanged
from .options import Options
from .report import GraphReport

__all__ = ["Application", "Bisection", "BisectionError", "Step", "bisect", "probe"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative errors that sums in another order explain, also after many layers."""

Verdict = Literal["good", "bad", "rewrite", "elsewhere"]
"""Within the tolerance; not so, and nothing was searched; because of a rewrite; because of what follows them."""


class BisectionError(RuntimeError):
    """There is nothing to bisect: no output to compare, or one that differs from call to call."""


@dataclass(frozen=True)
class Application:
    """One application of a rewrite: at which site, in the user's terms."""

    rewrite: str
    path: str
    line: str
    equation: str


@dataclass(frozen=True)
class Step:
    """What one compilation showed."""

    fuel: int | None
    applications: tuple[Application, ...]
    error: float
    """Largest difference from eager's output, relative to its largest value."""
    failure: str = ""
    """What the compiled model raised; the error is then infinite."""


@dataclass(frozen=True)
class Bisection:
    """The steps in order, and what they say."""

    tolerance: float
    steps: tuple[Step, ...]
    verdict: Verdict
    good: Step | None = None
    bad: Step | None = None
    """The neighbours k-1 and k, where the verdict is "rewrite"."""

    @property
    def culprit(self) -> Application | None:
        """The last application of the first bad step."""
        return self.bad.applications[-1] if self.bad else None


Says = Callable[[int | None], AbstractContextManager[None]]


def bisect(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    tolerance: float | None = None,
    says: Says = lambda fuel: nullcontext(),
) -> Bisection:
    """Search with at most ceil(log2 n) + 2 compilations for n applications. Raises BisectionError.

    `says` is entered around each compilation with its fuel.
    """
    expected = eager_output(model, args, kwargs)
    tolerance = tolerance_of(expected) if tolerance is None else tolerance
    steps: dict[int | None, Step] = {}

    def good(fuel: int | None) -> bool:
        with says(fuel):
            steps[fuel] = measure(model, args, kwargs, dataclasses.replace(options, fuel=fuel), expected)
        return steps[fuel].error <= tolerance

    def found(verdict: Verdict, low: int | None = None, high: int | None = None) -> Bisection:
        taken = tuple(steps.values())
        return Bisection(tolerance, taken, verdict, *((steps[low], steps[high]) if verdict == "rewrite" else ()))

    if good(None):
        return found("good")
    low, high = 0, len(steps[None].applications)
    steps[high] = dataclasses.replace(steps.pop(None), fuel=high)
    while high - low > 1:
        # the right part is a power of two: the first application, where fuel 0 is tried as well, is found sooner
        middle = high - (1 << (high - low - 1).bit_length() - 1)
        low, high = (middle, high) if good(middle) else (low, middle)
    if high == 0 or (low == 0 and not good(0)):
        return found("elsewhere")
    return found("rewrite", low, high)


def probe(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    tolerance: float | None = None,
) -> Bisection:
    """One measurement with the fuel of the options, and no search. Raises BisectionError."""
    expected = eager_output(model, args, kwargs)
    tolerance = tolerance_of(expected) if tolerance is None else tolerance
    step = measure(model, args, kwargs, options, expected)
    return Bisection(tolerance, (step,), "good" if step.error <= tolerance else "bad")


def measure(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Options, expected: Sequence[Any]
) -> Step:
    """Compile and call the model once, and compare with eager's tensors."""
    backend = _Fuelled(options)
    try:
        with _same_randomness():
            output, _ = call_through(model, backend, None, *copy.deepcopy((args, kwargs)))
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        return Step(options.fuel, backend.applications(), math.inf, f"{type(cause).__name__}: {cause}")
    return Step(options.fuel, backend.applications(), _difference(_tensors(output), expected))


def eager_output(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an eager call returns. Raises BisectionError when there are none, or others at each call."""
    outputs = []
    for _ in range(2):
        with unchanged(owner_of(model)), _same_randomness():
            given, named = copy.deepcopy((args, kwargs))
            outputs.append(_tensors(model(*given, **named)))
    if not outputs[0]:
        raise BisectionError("the call returns no tensor that could be compared")
    if (error := _difference(*outputs)) > tolerance_of(outputs[0]):
        raise BisectionError(f"two eager calls differ by {error:.0e}: make the model deterministic first")
    return outputs[0]


def tolerance_of(expected: Sequence[torch.Tensor]) -> float:
    """What the coarsest dtype among the outputs allows."""
    return max(TOLERANCES.get(tensor.dtype, 0.0) for tensor in expected)


class _Fuelled:
    """The backend with its fuel counted over all graphs of a call."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.graphs: dict[str, GraphReport] = {}
        """By compile id: a compilation that Dynamo starts again replaces its first attempt."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        identity = compile_id() or f"-{len(self.graphs)}"
        self.graphs.pop(identity, None)
        options = self.options
        if options.fuel is not None:
            options = dataclasses.replace(options, fuel=max(0, options.fuel - len(self.applications())))
        rewritten, self.graphs[identity] = transform(gm, example_inputs, options, {})
        return compile_transformed(rewritten, example_inputs, options, {})

    def applications(self) -> tuple[Application, ...]:
        done = []
        for graph in self.graphs.values():
            for verdict in graph.verdicts:
                if verdict.outcome == "applied":
                    site = graph.sites[verdict.site]
                    done.append(Application(verdict.rewrite, site.path, site.line, site.equation))
        return tuple(done)


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    """Every call draws the same random numbers, and the caller's are as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _difference(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest over all tensors, relative to the size of each; infinite where one is finite and the other is not."""
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return math.inf
    return max((_relative(a.double(), e.double()) for a, e in zip(actual, expected, strict=True)), default=0.0)


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return math.inf
    if not finite.any():
        return 0.0
    return float((actual - expected)[finite].abs().max() / expected[finite].abs().max().clamp(min=1e-30))
