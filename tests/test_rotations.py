"""Every spelling of a rotation of keys, each with a twin that differs in one thing and is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from latent.rewriter.origins.pieces import Rope
from origin_tools import D, S, heads, key_of, origins_of
from torch import Tensor


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def angles(width: int, twice: bool = True) -> Tensor:
    turns = torch.arange(S)[:, None] * 100.0 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([turns, turns], -1) if twice else turns


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def by_slices(x: Tensor) -> Tensor:
    return x * angles(D).cos() + rotate_half(x) * angles(D).sin()


def by_chunk(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return angles(D).cos() * x + angles(D).sin() * torch.cat([-second, first], -1)


def by_products(x: Tensor) -> Tensor:
    cos, sin = angles(D, False).cos(), angles(D, False).sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def in_half_precision(x: Tensor) -> Tensor:
    return by_slices(x.bfloat16().float())


def by_view(x: Tensor) -> Tensor:
    first, second = x.view(*x.shape[:-1], 2, -1).unbind(-2)
    return x * angles(D).cos() + torch.stack((-second, first), -2).flatten(-2) * angles(D).sin()


def backwards(x: Tensor) -> Tensor:
    return x * angles(D).cos() - rotate_half(x) * angles(D).sin()


def interleaved(x: Tensor) -> Tensor:
    cos, sin = (f(angles(D, False)).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def interleaved_pairs(x: Tensor) -> Tensor:
    cos, sin = angles(D, False).cos(), angles(D, False).sin()
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3)


def interleaved_then_halves(x: Tensor) -> Tensor:
    """DeepSeek: the pairs are neighbours, the result has them apart."""
    return by_slices(x.view(*x.shape[:-1], D // 2, 2).transpose(-1, -2).reshape(x.shape))


def complex_numbers(x: Tensor) -> Tensor:
    turns = torch.polar(torch.ones(S, D // 2), angles(D, False))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3)


def partial_front(x: Tensor) -> Tensor:
    turning, still = x[..., : D // 2], x[..., D // 2 :]
    turned = turning * angles(D // 2).cos() + rotate_half(turning) * angles(D // 2).sin()
    return torch.cat((turned, still), -1)


def partial_back(x: Tensor) -> Tensor:
    still, turning = torch.split(x, [2, 6], -1)
    return torch.cat((still, turning * angles(6).cos() + rotate_half(turning) * angles(6).sin()), -1)


def two_axes(x: Tensor) -> Tensor:
    """Images: rows in the first half, columns in the second, each rotated by halves."""
    turned = torch.cat([rotate_half(part) for part in x.chunk(2, -1)], -1)
    return x * angles(D).cos() + turned * angles(D).sin()


def gathered(x: Tensor) -> Tensor:
    order = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    return x * angles(D).cos() + x[..., order] * angles(D).sin()


ROTATIONS: dict[Callable[[Tensor], Tensor], str] = {
    by_slices: "rope(half 8) input",
    by_chunk: "rope(half 8) input",
    by_products: "rope(half 8) input",
    in_half_precision: "rope(half 8) float32 bfloat16 input",
    by_view: "rope(half 8) input",
    backwards: "rope(half 8) input",
    interleaved: "rope(interleaved 8) input",
    interleaved_pairs: "rope(interleaved 8) input",
    interleaved_then_halves: "rope(interleaved 8) input",
    complex_numbers: "rope(complex 8) input",
    partial_front: "rope(half 4 at 0) input",
    partial_back: "rope(half 6 at 2) input",
    two_axes: "rope(other 8) input",
    gathered: "rope(other 8) input",
}


@pytest.mark.parametrize("rotate", ROTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_rotation(rotate: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    if dynamic and rotate is by_products:
        pytest.skip("the width is a symbol that the guards tie to the number of angles")
    assert re.sub(r"s\d+", str(D), key_of(rotate, heads(), dynamic=dynamic)) == ROTATIONS[rotate]


def not_rotated(x: Tensor) -> Tensor:
    return x * angles(D).cos() + x * angles(D).sin()


def not_negated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * angles(D).cos() + torch.cat([second, first], -1) * angles(D).sin()


def exchanged_functions(x: Tensor) -> Tensor:
    return x * angles(D).sin() + rotate_half(x) * angles(D).cos()


def another_tensor(x: Tensor) -> Tensor:
    return x * angles(D).cos() + rotate_half(x.exp()) * angles(D).sin()


def rotated_along_tokens(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -2)
    return x * angles(D).cos() + torch.cat([-second, first], -2) * angles(D).sin()


def one_factor(x: Tensor) -> Tensor:
    return x * angles(D).cos() + rotate_half(x) * angles(D).cos()


@pytest.mark.parametrize(
    "change",
    [not_rotated, not_negated, exchanged_functions, another_tensor, rotated_along_tokens, one_factor],
    ids=lambda f: f.__name__,
)
def test_no_rotation(change: Callable[[Tensor], Tensor]) -> None:
    assert key_of(change, heads()) == "?add"


def test_cosine_and_sine_may_be_inputs() -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + rotate_half(x) * sin

    assert key_of(rotate, heads(), angles(D).cos(), angles(D).sin()) == "rope(half 8) input"


def test_angles_are_named() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ by_slices(k).mT).softmax(-1) @ v

    rope = origins_of(function, heads(), heads(), heads()).key[0]
    assert isinstance(rope, Rope)
    assert [node.name.split("_")[0] for node in rope.angles] == ["cos", "sin"]
