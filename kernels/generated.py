"""latent::generated_attention: the operator behind which generated kernels run, C++ on CPUs and Triton on GPUs.

The first call with a new specification generates, builds and checks its kernel on small random input against the
reference body; a kernel that cannot be built or gives other numbers is replaced by that body, with one warning. The
operator has no gradient: lowering puts it only where none is needed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..rewriter.autocast import without_autocast
from ..rewriter.kernel_sources import KernelSource
from ..rewriter.nodes import args_of
from ..rewriter.registry import source_printer
from .self_check import check_once, small_calls
from .spec import Call, Forms, KernelSpec, forms_of, of_used, spec_of, spec_of_forms

log = logging.getLogger(__name__)

Kernel = Callable[[Call], Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

torch.library.define(
    "latent::generated_attention",
    "(Tensor query, Tensor? query_rope, Tensor key, Tensor? key_rope, Tensor? value, Tensor? mask, Tensor? sinks, "
    "float scale, float cap, bool causal, SymInt window, SymInt offset, "
    "bool totals=False, Tensor? used=None) -> Tensor",
)


def reference(call: Call) -> Tensor:
    """The definition in plain ATen: [B, H, S, E], out of reach of autocast.

    Scores, softmax and sums are float32, or float64 for float64.
    """
    with without_autocast(call.query.device.type):
        return _reference(call)


def _reference(call: Call) -> Tensor:
    query, key = call.query, call.key
    value = key if call.value is None else call.value
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    B, H, S, K, T = *query.shape[:3], *key.shape[1:3]

    def product(rows: Tensor, columns: Tensor) -> Tensor:
        """[B, H, S, X] [B, K, X, Y] -> [B, H, S, Y]; the heads of a group are rows of one product."""
        rows = rows.to(wide).reshape(B, K, H // K * S, rows.shape[-1])
        return (rows @ columns.to(wide)).reshape(B, H, S, columns.shape[-1])

    scores = product(query, key.transpose(-1, -2))
    if call.query_rope is not None and call.key_rope is not None:
        scores = scores + product(call.query_rope, call.key_rope.transpose(-1, -2))
    scores = scores * call.scale
    if call.cap > 0.0:
        scores = call.cap * torch.tanh(scores / call.cap)
    hidden = torch.zeros(S, T, dtype=torch.bool, device=query.device)
    i = torch.arange(S, device=query.device)[:, None] + call.offset
    j = torch.arange(T, device=query.device)[None, :]
    if call.causal:
        hidden = hidden | (j > i)
    if call.window > 0:
        hidden = hidden | (j <= i - call.window)
    if call.mask is not None and call.mask.dtype == torch.bool:
        hidden = hidden | ~call.mask
    elif call.mask is not None:
        scores = scores + call.mask.to(wide)
    scores = scores.masked_fill(hidden, float("-inf"))
    if call.sinks is not None:
        sinks = call.sinks.to(wide).view(1, H, 1, 1).expand(B, H, S, 1)
        scores = torch.cat((scores, sinks), -1)
    weights = F.softmax(scores, -1)[..., :T]
    weights = weights.masked_fill((scores[..., :T] == float("-inf")).all(-1, keepdim=True), 0.0)
    if call.totals:
        return torch.cat((product(weights, value), torch.logsumexp(scores, -1, keepdim=True)), -1)
    return of_used(product(weights, value).to(query.dtype), call.used)


def unavailable(device: str) -> str:
    """Why no kernel can be generated for a type of device; "" where one can."""
    if device == "cpu":
        from .cpp_library import compiler

        return "" if compiler() else "there is no C++ compiler on this machine"
    return "" if device == "cuda" else f"no kernels are generated for {device}"


@functools.cache
def kernel_for(spec: KernelSpec, device: str) -> Kernel:
    """What computes a specification on a type of device: a checked kernel, or the reference body."""
    try:
        source, kernel = _build(spec, device)
        check_once(small_calls(spec, device), spec.dtype, source, device, kernel, reference)
    except Exception as error:
        log.warning("latent: no generated kernel for %s on %s, plain operators run: %s", spec.name, device, error)
        return reference
    return kernel


def _build(spec: KernelSpec, device: str) -> tuple[str, Kernel]:
    """The generated source of a specification and what runs it. Raises whatever stands in the way."""
    if device == "cpu":
        from . import cpp_library

        return cpp_library.build(spec)
    from . import triton_library

    return triton_library.build(spec)


def printed(spec: KernelSpec, device: str, use: str = "") -> KernelSource:
    """The source of a specification on a type of device, without building it."""
    if device == "cpu":
        from .cpp_library import isa
        from .cpp_source import source

        return KernelSource(spec.name, ".cpp", source(spec, isa()), use)
    from .triton_source import source_of

    return KernelSource(spec.name, ".py", source_of(spec), use)


@source_printer("latent::generated_attention")
def _printed(node: fx.Node) -> list[KernelSource]:
    call = Call(*fx.node.map_arg(args_of(node), lambda n: n.meta["val"]))
    return [printed(spec_of(call), call.query.device.type)]


def _generated_attention(device: str, *arguments: Any) -> Tensor:
    call = Call(*arguments)
    if call.query.numel() == 0 or call.key.shape[2] == 0:
        nothing = _empty(*arguments).zero_()
        if call.totals:
            nothing[..., -1] = float("-inf")
        return nothing
    if call.used is not None and (call.totals or call.used.shape != call.query.shape[:2]):
        raise ValueError(f"used {tuple(call.used.shape)} is given with totals, or is not [B, H]")
    return kernel_for_forms(forms_of(call), call.cap > 0.0, call.totals, device)(call)


@functools.lru_cache(1024)
def kernel_for_forms(forms: Forms, capped: bool, totals: bool, device: str) -> Kernel:
    """The layers of a model call with the same forms; a cache that grows brings new ones with every token."""
    return kernel_for(spec_of_forms(forms, capped, totals), device)


def _empty(*arguments: Any) -> Tensor:
    """A result that is still to be written."""
    call = Call(*arguments)
    width = (call.key if call.value is None else call.value).shape[-1] + call.totals
    return call.query.new_empty((*call.query.shape[:3], width), dtype=torch.float32 if call.totals else None)


torch.library.impl("latent::generated_attention", "CPU", functools.partial(_generated_attention, "cpu"))
torch.library.impl("latent::generated_attention", "CUDA", functools.partial(_generated_attention, "cuda"))
torch.library.register_fake("latent::generated_attention", _empty)
