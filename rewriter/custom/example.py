"""How a function's arguments are declared: tensors by the names of their dimensions, scalars by an example value.

    dict(q="B (K G) S D", k="B K T D", v="B K T E", mask="B 1 S T | None", cap=30.0)

"(K G)" is one dimension of K times G with G minor, "1" one of size 1; "| None" lets the argument be absent.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..compat import fake_mode_for, fake_of_shape, trace_pre_dispatch
from ..normal_form import normalise
from ..opening import decompositions

Sizes = Mapping[str, int]

_DIMENSION = re.compile(r"\(([A-Za-z_]\w*(?:\s+[A-Za-z_]\w*)*)\)|([A-Za-z_]\w*)|(1)(?!\w)")


class ExampleError(ValueError):
    """An example that cannot be read, or that does not fit its function."""


@dataclass(frozen=True)
class TensorArgument:
    """A floating point tensor. Each dimension is the product of the names in it; () has size 1."""

    dims: tuple[tuple[str, ...], ...]
    optional: bool = False

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(_product(sizes[name] for name in dim) for dim in self.dims)


@dataclass(frozen=True, eq=False)
class Example:
    """The arguments of a function, in order."""

    tensors: Mapping[str, TensorArgument]
    scalars: Mapping[str, float]

    @classmethod
    def read(cls, declared: Mapping[str, str | float]) -> Example:
        """Raises ExampleError for what is no declaration."""
        tensors: dict[str, TensorArgument] = {}
        scalars: dict[str, float] = {}
        for argument, value in declared.items():
            if isinstance(value, str):
                tensors[argument] = _tensor(argument, value)
            elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                scalars[argument] = float(value)
            else:
                raise ExampleError(
                    f"example: {argument}={value!r} is neither the dimensions of a tensor, such as 'B H S D', "
                    f"nor a positive number"
                )
        return cls(tensors, scalars)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all dimensions, in the order in which they first appear."""
        dims = itertools.chain.from_iterable(argument.dims for argument in self.tensors.values())
        return tuple(dict.fromkeys(itertools.chain.from_iterable(dims)))

    @property
    def optional(self) -> tuple[str, ...]:
        return tuple(name for name, argument in self.tensors.items() if argument.optional)

    def variants(self) -> Iterator[frozenset[str]]:
        """Every choice of optional tensors that are absent, the one with all of them first."""
        for count in range(len(self.optional) + 1):
            yield from map(frozenset, itertools.combinations(self.optional, count))

    def present(self, absent: frozenset[str]) -> dict[str, TensorArgument]:
        return {name: argument for name, argument in self.tensors.items() if name not in absent}


def _tensor(argument: str, text: str) -> TensorArgument:
    body, bar, none = text.partition("|")
    if bar and none.strip() != "None":
        raise ExampleError(f"example: {argument}={text!r}: after | only None may stand")
    found = [match.group(0, 1, 2) for match in _DIMENSION.finditer(body)]
    if "".join(whole for whole, _, _ in found).replace(" ", "") != body.replace(" ", "") or not found:
        raise ExampleError(f"example: {argument}={text!r} is no list of dimensions, such as 'B (K G) S D' or 'B 1 S T'")
    dims = tuple(tuple((many or one or "").split()) for _, many, one in found)
    return TensorArgument(dims, bool(bar))


def _product(sizes: Iterator[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def call(
    function: Callable[..., Any], example: Example, tensors: Mapping[str, Any], scalars: Mapping[str, float]
) -> Any:
    """The function with its arguments by name; optional tensors that are not among `tensors` are None."""
    return function(**{name: tensors.get(name) for name in example.tensors}, **scalars)


def trace_example(
    function: Callable[..., Any],
    example: Example,
    sizes: Sizes,
    scalars: Mapping[str, float],
    absent: frozenset[str] = frozenset(),
    symbolic: frozenset[str] = frozenset(),
) -> torch.fx.GraphModule:
    """The function at these sizes, in normal form; its placeholders are the tensors that are present, in order.

    Dimensions with a name in `symbolic` are so; equal sizes then share a symbol.
    """
    present = example.present(absent)
    mode = fake_mode_for(())
    fakes = [
        fake_of_shape(mode, argument.shape(sizes), [bool(symbolic.intersection(dim)) for dim in argument.dims])
        for argument in present.values()
    ]

    def body(*values: torch.Tensor) -> Any:
        return call(function, example, dict(zip(present, values, strict=True)), scalars)

    try:
        with silent("torch._subclasses.fake_tensor"):
            return normalise(trace_pre_dispatch(body, fakes, decompositions=decompositions()))
    except Exception as error:
        name, at = getattr(function, "__name__", function), " ".join(f"{n}={s}" for n, s in sizes.items())
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ExampleError(f"{name} cannot be called with {at}: {first}; give `sizes` that fit it") from error


@contextlib.contextmanager
def silent(logger: str) -> Iterator[None]:
    """Without what `logger` says about an error that is told in other words."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
