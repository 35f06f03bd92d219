"""A kernel that never ran on this device is run once on small random input beside its reference body."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .spec import Call, KernelSpec, digest
from .store import folder

AnyCall = TypeVar("AnyCall", bound=NamedTuple)

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error relative to the largest element: sums of a hundred products in float32, and the result's rounding."""


class KernelMismatch(RuntimeError):
    """A generated kernel gave other numbers than its reference body."""


def check_once(
    calls: Iterable[AnyCall],
    dtype: torch.dtype,
    source: str,
    device: str,
    kernel: Callable[[AnyCall], Tensor],
    reference: Callable[[AnyCall], Tensor],
    cache: Path | None = None,
) -> None:
    """Raise KernelMismatch unless `kernel` gives what `reference` gives for all calls.

    What held is remembered by source and device.
    """
    model = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    held = (cache or folder("checked")) / digest(f"{source}\n{torch.__version__}\n{device}\n{model}")
    if held.exists():
        return
    for call in calls:
        expected, actual = reference(call).double(), kernel(call).double()
        error = ((expected - actual).abs().max() / expected.abs().max().clamp(min=1e-3)).item()
        if not error <= TOLERANCE[dtype]:
            raise KernelMismatch(f"relative error {error:.1e} beside its reference body ({_shapes(call)})")
    held.touch()


def _shapes(call: NamedTuple) -> str:
    """query (2, 4, 1, 64), key (2, 2, 211, 64), ..."""
    named = call._asdict().items()
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in named if isinstance(value, Tensor))


def small_calls(spec: KernelSpec, device: str) -> Iterator[Call]:
    """One query, several, and many, over lengths that are no multiple of a block, with two heads a group.

    A kernel can have a body of its own for each: keys dealt out to several programs, a window, a full tile of rows.
    """
    for queries, tokens, causal, window in ((1, 211, False, 0), (5, 150, True, 40), (37, 101, True, 0)):
        call = random_call(
            spec, device, heads=4, key_heads=2, queries=queries, tokens=tokens, causal=causal, window=window
        )
        yield call
    if not spec.totals:
        yield call._replace(used=torch.tensor([[True, True, False, False], [False, True, True, True]], device=device))


def random_call(
    spec: KernelSpec,
    device: str,
    *,
    batch: int = 2,
    heads: int,
    key_heads: int,
    queries: int,
    tokens: int,
    causal: bool = False,
    window: int = 0,
    seed: int = 0,
) -> Call:
    """Random arguments of a specification; the queries are the last of the tokens. Every row sees a key."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, spec.dtype)

    B, H, K, S, T = batch, heads, key_heads, queries, tokens
    mask: Tensor | None = None
    if spec.mask != "none":
        visible = torch.rand((B, 1, S, T), generator=generator) < 0.7
        visible[..., -max(1, S) :] = True
        mask = visible.to(device)
        if spec.mask == "additive":
            assert spec.mask_dtype is not None
            least = torch.finfo(spec.mask_dtype).min
            bias = torch.randn((B, 1, S, T), generator=generator)
            mask = torch.where(visible, bias, least).to(device, spec.mask_dtype)
    R, E = spec.rope_width, spec.value_width
    return Call(
        tensor(B, H, S, spec.width),
        tensor(B, H, S, R) if R else None,
        tensor(B, K, T, spec.width),
        tensor(B, K, T, R) if R else None,
        None if E is None else tensor(B, K, T, E),
        mask,
        tensor(H).float() if spec.sinks else None,
        (spec.width + R) ** -0.5,
        2.0 if spec.capped else 0.0,
        causal,
        window,
        tokens - queries,
        spec.totals,
    )
