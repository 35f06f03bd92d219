"""What a generated attention kernel computes, and what one call gives it.

    out[b h i] = sum_j p[b h i j] value[b k j],    p = softmax over j of  mask(cap(scale · (q·k + q_rope·k_rope)))

B batch, K key heads, H = K · G query heads (G minor), S query tokens, T key tokens. A key is one tensor or two whose
products are added: the latent of width d_c and the rotary part of width d_r. Without a value tensor the values are the
first part of the keys, so that one read of a latent serves both.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MaskKind = Literal["none", "bool", "additive"]


class Call(NamedTuple):
    """The arguments of `latent::generated_attention`, in order.

    query [B, H, S, D], query_rope [B, H, S, R] or None, key [B, K, T, D], key_rope [B, K, T, R] or None, value
    [B, K, T, E] or None (then the keys are the values), mask broadcasting to [B, H, S, T] (bool: True is visible;
    else added to the scaled scores) or None, sinks [H] or None: scores without a value that take part in the softmax.
    cap > 0: scores become cap · tanh(score / cap). Key j is visible to query i if j <= i + offset (with `causal`) and
    j > i + offset - window (with window > 0). With `totals` the result is float32 [B, H, S, E + 1] and its
    last column the log of the sum of exponentials, -inf for rows that see no key: what joins results over parts of the
    keys. Rows of heads that are not `used` [B, H] are zeros (not with totals). Any strides, but the last dimension of
    q, k and v is contiguous.
    """

    query: Tensor
    query_rope: Tensor | None
    key: Tensor
    key_rope: Tensor | None
    value: Tensor | None
    mask: Tensor | None
    sinks: Tensor | None
    scale: float
    cap: float
    causal: bool
    window: int
    offset: int
    totals: bool = False
    used: Tensor | None = None


@dataclass(frozen=True)
class KernelSpec:
    """What is fixed when a kernel is generated. Batch, heads, lengths, strides, scale, cap and window are arguments."""

    dtype: torch.dtype
    """Of queries, keys, values and the result: float32, bfloat16 or float16. Sums are float32."""

    width: int
    """D, the width of the first part of the keys (d_c of a latent)."""

    rope_width: int = 0
    """R, the width of the second part of the keys; 0: there is none."""

    value_width: int | None = None
    """E; None: the values are the first part of the keys."""

    mask: MaskKind = "none"
    mask_dtype: torch.dtype | None = None
    """Of an additive mask."""

    capped: bool = False
    sinks: bool = False
    totals: bool = False

    @property
    def out_width(self) -> int:
        return self.width if self.value_width is None else self.value_width

    @property
    def name(self) -> str:
        """Legible and unique: attention_bf16_512x64_latent_bool."""
        short = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
        widths = f"{self.width}x{self.rope_width}" if self.rope_width else str(self.width)
        value = "latent" if self.value_width is None else str(self.value_width)
        mask = "" if self.mask == "none" else f"_{self.mask}"
        if self.mask_dtype is not None and self.mask_dtype != self.dtype:
            mask += "_" + str(self.mask_dtype).removeprefix("torch.")
        return (
            f"attention_{short}_{widths}_{value}{mask}"
            + "_cap" * self.capped
            + "_sinks" * self.sinks
            + "_totals" * self.totals
        )


Form = tuple[torch.dtype, torch.Size]
Forms = tuple[Form | None, ...]


def forms_of(call: Call) -> Forms:
    """Dtype and shape of every tensor of a call, in order."""
    return tuple([None if tensor is None else (tensor.dtype, tensor.shape) for tensor in call[:7]])


def spec_of(call: Call) -> KernelSpec:
    """The specification that a call needs. Raises ValueError for tensors that do not belong together."""
    return spec_of_forms(forms_of(call), call.cap > 0.0, call.totals)


def spec_of_forms(forms: Forms, capped: bool, totals: bool) -> KernelSpec:
    """The same, from dtypes and shapes alone."""
    query, query_rope, key, key_rope, value, mask, sinks = forms
    assert query is not None and key is not None
    (dtype, (B, H, S, D)), (_, (_, K, T, _)) = query, key
    if key[1] != (B, K, T, D) or K == 0 or H % K:
        raise ValueError(f"queries {tuple(query[1])} and keys {tuple(key[1])} do not fit: [B H S D] and [B K T D]")
    if value is not None and value[1][:3] != (B, K, T):
        raise ValueError(f"values {tuple(value[1])} do not fit keys {tuple(key[1])}: [B K T E] and [B K T D]")
    if (query_rope is None) != (key_rope is None):
        raise ValueError("a rotary part is given for the queries alone, or for the keys alone")
    if query_rope is not None and key_rope is not None:
        R = query_rope[1][-1]
        if query_rope[1] != (B, H, S, R) or key_rope[1] != (B, K, T, R):
            raise ValueError(f"the rotary parts {tuple(query_rope[1])}, {tuple(key_rope[1])} do not fit")
    dtypes = [form[0] for form in (query, query_rope, key, key_rope, value) if form is not None]
    if any(other != dtype for other in dtypes):
        raise ValueError(f"mixed dtypes: {[str(other) for other in dtypes]}")
    if mask is not None and (
        len(mask[1]) != 4 or any(m not in (1, n) for m, n in zip(mask[1], (B, H, S, T), strict=True))
    ):
        raise ValueError(f"a mask {tuple(mask[1])} does not broadcast to {(B, H, S, T)}")
    if sinks is not None and sinks[1] != (H,):
        raise ValueError(f"sinks {tuple(sinks[1])} are not one for each of {H} heads")
    kind: MaskKind = "none" if mask is None else "bool" if mask[0] == torch.bool else "additive"
    return KernelSpec(
        dtype=dtype,
        width=D,
        rope_width=0 if query_rope is None else query_rope[1][-1],
        value_width=None if value is None else value[1][-1],
        mask=kind,
        mask_dtype=mask[0] if mask is not None and kind == "additive" else None,
        capped=capped,
        sinks=sinks is not None,
        totals=totals,
    )


def of_used(out: Tensor, used: Tensor | None) -> Tensor:
    """[B, H, S, E] with zeros for the heads that are not used."""
    return out if used is None else out.masked_fill(~used[:, :, None, None], 0)


def digest(source: str) -> str:
    """The content address of a generated source."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]
