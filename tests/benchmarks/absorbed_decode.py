"""`python tests/benchmarks/absorbed_decode.py [absorbed|grouped|prefill]`: generated C++ kernels beside ATen's forms.

Attention alone, without projections. All forms of a shape are timed in turn in one process, so that a disturbance hits
each of them; medians are printed. The roofline is the larger of flops / peak and bytes / bandwidth: the peak of a large
matrix product, in the same dtype or in float32, whichever is faster, and the bandwidth of a copy of the cache, measured
in the same turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from latent.kernels.generated import kernel_for
from latent.kernels.spec import Call, spec_of
from torch import Tensor

Form = Callable[[], Any]


def medians(forms: dict[str, Form], rounds: int, budget: float = 0.05) -> dict[str, float]:
    """Milliseconds of each form: the median over rounds of the median within a turn of `budget` seconds."""
    turns: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            times: list[float] = []
            end = time.perf_counter() + budget
            while not times or time.perf_counter() < end:
                start = time.perf_counter()
                form()
                times.append((time.perf_counter() - start) * 1e3)
            turns[name].append(statistics.median(times))
    return {name: statistics.median(times) for name, times in turns.items()}


def call_of(query: Tensor, key: Tensor, value: Tensor | None, **more: Any) -> Call:
    rest: dict[str, Any] = dict(query_rope=None, key_rope=None, mask=None, sinks=None, cap=0.0)
    rest |= dict(causal=False, window=0, offset=key.shape[2] - query.shape[2], scale=query.shape[-1] ** -0.5)
    return Call(query=query, key=key, value=value, **(rest | more))


def generated(call: Call) -> Form:
    kernel = kernel_for(spec_of(call), "cpu")
    return lambda: kernel(call)


def absorbed(heads: int, tokens: int, dtype: torch.dtype, latent: int = 512, rope: int = 64) -> dict[str, Form]:
    """One token of H heads over the latents and rotary keys of a DeepSeek cache."""
    q, qr = torch.randn(1, heads, 1, latent, dtype=dtype), torch.randn(1, heads, 1, rope, dtype=dtype)
    ckv, kpe = torch.randn(1, 1, tokens, latent, dtype=dtype), torch.randn(1, 1, tokens, rope, dtype=dtype)
    scale = (latent + rope) ** -0.5
    joint, q_joint = torch.cat((ckv, kpe), -1), torch.cat((q, qr), -1)
    rows, q_rows, qr_rows = q_joint.transpose(1, 2), q[:, :, 0], qr[:, :, 0]
    c, p = ckv[:, 0], kpe[:, 0]

    def bmm() -> Tensor:
        scores = torch.baddbmm(torch.bmm(q_rows, c.mT), qr_rows, p.mT)
        return torch.bmm((scores.float() * scale).softmax(-1).to(dtype), c)

    forms: dict[str, Form] = {
        "generated": generated(call_of(q, ckv, None, query_rope=qr, key_rope=kpe, scale=scale)),
        "bmm": bmm,
        "sdpa rows, V = K": lambda: F.scaled_dot_product_attention(rows, joint, joint, scale=scale),
    }
    if tokens <= 8192:
        forms["sdpa rows, V view"] = lambda: F.scaled_dot_product_attention(
            rows, joint, joint[..., :latent], scale=scale
        )
        forms["sdpa enable_gqa"] = lambda: F.scaled_dot_product_attention(
            q_joint, joint, joint, scale=scale, enable_gqa=True
        )
    return forms


def grouped(heads: int, key_heads: int, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Form]:
    """One token of grouped-query attention."""
    q = torch.randn(1, heads, 1, width, dtype=dtype)
    k, v = (torch.randn(1, key_heads, tokens, width, dtype=dtype) for _ in range(2))
    rows = q.view(1, key_heads, heads // key_heads, width)

    def bmm() -> Tensor:
        scores = torch.matmul(rows, k.mT).float() * width**-0.5
        return torch.matmul(scores.softmax(-1).to(dtype), v)

    return {
        "generated": generated(call_of(q, k, v)),
        "bmm": bmm,
        "sdpa rows": lambda: F.scaled_dot_product_attention(rows, k, v),
        "sdpa enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }


def prefill(heads: int, width: int, value_width: int, tokens: int, window: int) -> dict[str, Form]:
    """As many queries as keys."""
    q, k = (torch.randn(1, heads, tokens, width) for _ in range(2))
    v = torch.randn(1, heads, tokens, value_width)
    forms: dict[str, Form] = {
        "generated": generated(call_of(q, k, v, causal=True)),
        "generated, dense": generated(call_of(q, k, v)),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    if window:
        forms[f"generated, window {window}"] = generated(call_of(q, k, v, causal=True, window=window))
        del forms["sdpa"]
    if width != value_width:
        wide = F.pad(v, (0, width - value_width))
        forms["sdpa, V padded"] = lambda: F.scaled_dot_product_attention(q, k, wide, is_causal=True)
    return forms


def matrix_product(dtype: torch.dtype, size: int) -> tuple[Form, float]:
    """A product of square matrices and its flops."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return lambda: torch.mm(a, b), 2.0 * size**3


def copy(size: int) -> tuple[Form, float]:
    """A copy of so many bytes, and what it moves: they are read and written."""
    a, b = (torch.zeros(size // 4, dtype=torch.float32) for _ in range(2))
    return lambda: b.copy_(a), 2.0 * size


def lines(which: str, rounds: int) -> Iterator[str]:
    if which == "absorbed":
        for dtype in (torch.bfloat16, torch.float32):
            for heads in (16, 128):
                for tokens in (4096, 65536):
                    flops, size = 2.0 * heads * tokens * 1088, tokens * 576 * dtype.itemsize
                    title = f"absorbed H {heads} T {tokens} {dtype}"
                    yield measured(title, absorbed(heads, tokens, dtype), flops, size, dtype, rounds)
    elif which == "grouped":
        for heads, key_heads, width in ((9, 3, 64), (16, 16, 128), (32, 8, 128)):
            for dtype in (torch.float32, torch.bfloat16):
                for tokens in (512, 4096):
                    flops, size = 4.0 * heads * tokens * width, 2 * key_heads * tokens * width * dtype.itemsize
                    title = f"H {heads} K {key_heads} D {width} T {tokens} {dtype}"
                    yield measured(title, grouped(heads, key_heads, width, tokens, dtype), flops, size, dtype, rounds)
    else:
        for heads, width, value_width, tokens, window in ((16, 128, 128, 2048, 0), (16, 192, 128, 2048, 0)):
            flops = 1.0 * heads * tokens * tokens * (width + value_width)
            title = f"prefill H {heads} D {width} E {value_width} S {tokens}"
            forms = prefill(heads, width, value_width, tokens, window)
            yield measured(title, forms, flops, 0, torch.float32, rounds)
        yield measured("prefill H 2 D 128 S 8192", prefill(2, 128, 128, 8192, 512), 0, 0, torch.float32, rounds)


def measured(title: str, forms: dict[str, Form], flops: float, size: int, dtype: torch.dtype, rounds: int) -> str:
    wide, wide_flops = matrix_product(torch.float32, 1536)
    narrow, narrow_flops = matrix_product(dtype, 256)  # without instructions for it, bfloat16 is slower than float32
    moved, moved_bytes = copy(max(size, 4096))
    ms = medians(forms | {"wide": wide, "narrow": narrow, "copy": moved}, rounds)
    peak = max(wide_flops / ms.pop("wide"), narrow_flops / ms.pop("narrow"))
    bandwidth = moved_bytes / ms.pop("copy")
    bound = max(flops / peak, size / bandwidth)
    own = ms["generated"]
    others = "  ".join(f"{name} {t:.3f} (x{t / own:.2f})" for name, t in ms.items() if name != "generated")
    roof = f"{bound / own:.0%} of the roofline [{peak / 1e6:.0f} GFLOP/s, {bandwidth / 1e6:.0f} GB/s]" if flops else ""
    return f"{title}: generated {own:.3f} ms, {roof}\n    {others}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="*", default=["absorbed", "grouped", "prefill"])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        for which in given.which:
            for line in lines(which, given.rounds):
                print(line, flush=True)


if __name__ == "__main__":
    main()
