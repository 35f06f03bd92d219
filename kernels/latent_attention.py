"""latent::latent_attention: attention over latents, with the weights that lead to and from them.

    key[h j]   = up_key[h] latent[j]      joined with key_rope[j]
    value[h j] = up_value[h] latent[j] + value_bias[h]

    absorbed:  softmax( scale · ((q up_key) · latent + q_rope · key_rope) ) latent up_valueᵀ
    expanded:  keys and values of every head first, then ordinary attention

Dimensions: B batch, H query heads, K heads of the weights (H = K · G), L heads of the latents (K a multiple of L), S
query tokens, T key tokens, D and E the widths of keys and values of a head, R of the rotary part, C of the latents.
Both forms are exact (DeepSeek-V2, arXiv 2405.04434). Which one is faster depends on S: see `crossover`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..rewriter.autocast import in_own_dtypes
from ..rewriter.kernel_sources import KernelSource
from ..rewriter.nodes import args_of
from ..rewriter.registry import LibraryCall, lowering, source_printer
from ..rewriter.sizes import concrete, fake_mode_of_value
from .crossover import Widths, explain, threshold
from .gemv import suits
from .generated import DTYPES, kernel_for, printed, reference, unavailable
from .machine import fast_dtype, quick
from .spec import Call, KernelSpec, MaskKind, spec_of

BLOCK = 1024
"""Key tokens whose keys and values exist at a time in the expanded form."""

ARGUMENTS = (
    "(Tensor query, Tensor? query_rope, Tensor latent, Tensor? key_rope, Tensor? value_latent, Tensor up_key, "
    "Tensor up_value, Tensor? value_bias, Tensor? mask, Tensor? sinks, float scale, float cap, bool causal, int window)"
    " -> Tensor"
)
torch.library.define("latent::latent_attention", ARGUMENTS)
torch.library.define("latent::latent_attention_either", ARGUMENTS)


class LatentCall(NamedTuple):
    """The arguments. query [B, H, S, D], query_rope [B, H, S, R], latent [B, L, T, C], key_rope [B, L or K, T, R],
    value_latent [B, L, T, C'] (None: the latent of the keys), up_key [K, D, C], up_value [K, E, C'], value_bias
    [1 or K, E]; the rest as in `spec.Call`."""

    query: Tensor
    query_rope: Tensor | None
    latent: Tensor
    key_rope: Tensor | None
    value_latent: Tensor | None
    up_key: Tensor
    up_value: Tensor
    value_bias: Tensor | None
    mask: Tensor | None
    sinks: Tensor | None
    scale: float
    cap: float
    causal: bool
    window: int

    @property
    def rope_per_head(self) -> bool:
        """Whether heads that share a latent have rotary keys of their own."""
        return self.key_rope is not None and self.key_rope.shape[1] != self.latent.shape[1]


Core = Callable[[Call], Tensor]
PerHead = Callable[[Tensor, Tensor], Tensor]


def _per_head(rows_BHSX: Tensor, weight_KXY: Tensor) -> Tensor:
    """[B, H, S, X] times the matrix of its head, [K, X, Y]: [B, H, S, Y]. Each matrix is read once."""
    rows = _by_matrix(rows_BHSX, len(weight_KXY))
    if rows.shape[1] == 1 and fast_dtype(rows.device.type, rows.dtype) != rows.dtype:
        # a library that multiplies this dtype in software takes ten times as long as reading the matrix does
        return _by_head((rows.transpose(1, 2) * weight_KXY).sum(1, keepdim=True), rows_BHSX)
    return _by_head(rows @ weight_KXY, rows_BHSX)


def _per_head_by_kernel(rows_BHSX: Tensor, weight_KXY: Tensor) -> Tensor:
    """The same, by the kernel for few rows where they are few; without gradients."""
    rows = _by_matrix(rows_BHSX, len(weight_KXY))
    if not suits(rows, [weight_KXY.mT]):
        return _per_head(rows_BHSX, weight_KXY)
    return _by_head(torch.ops.latent.gemv(rows, [weight_KXY.mT], [None])[0], rows_BHSX)


def _by_matrix(rows_BHSX: Tensor, K: int) -> Tensor:
    """[K, B · H / K · S, X]: the rows that each of K matrices is multiplied by."""
    B, H, S, X = rows_BHSX.shape
    return rows_BHSX.reshape(B, K, H // K * S, X).transpose(0, 1).reshape(K, B * (H // K) * S, X)


def _by_head(rows: Tensor, like_BHSX: Tensor) -> Tensor:
    """The way back: [B, H, S, Y]."""
    B, H, S, _ = like_BHSX.shape
    K, _, Y = rows.shape
    return rows.reshape(K, B, H // K * S, Y).transpose(0, 1).reshape(B, H, S, Y)


def absorbed(call: LatentCall, core: Core, per_head: PerHead = _per_head) -> Tensor:
    """Attend in the latent space: [B, H, S, E]."""
    query = per_head(call.query, call.up_key)
    query_rope, key_rope, mask = call.query_rope, call.key_rope, call.mask
    if call.rope_per_head:
        mask, query_rope, key_rope = _rope_as_bias(call), None, None
    attended = core(
        Call(
            query,
            query_rope,
            call.latent,
            key_rope,
            call.value_latent,
            mask,
            call.sinks,
            call.scale,
            call.cap,
            call.causal,
            call.window,
            0,
            totals=call.value_bias is not None,
        )
    )
    up_value = call.up_value.transpose(1, 2)
    if call.value_bias is None:
        return per_head(attended, up_value)
    attended, total = attended[..., :-1].to(query.dtype), attended[..., -1:]
    out = per_head(attended, up_value)
    bias_HE = call.value_bias.repeat_interleave(out.shape[1] // call.value_bias.shape[0], 0)
    return out + (bias_HE[:, None] * _weight_of_keys(total, call.sinks)).to(out.dtype)


def _weight_of_keys(total_BHS1: Tensor, sinks_H: Tensor | None) -> Tensor:
    """What the weights of a row sum to, given the log of its sum: 1, less the sink's share; 0 without any key."""
    if sinks_H is None:
        return (total_BHS1 > float("-inf")).to(total_BHS1.dtype)
    return -torch.expm1(sinks_H.view(1, -1, 1, 1) - total_BHS1)


def _rope_as_bias(call: LatentCall) -> Tensor:
    """scale · q_rope · k_rope of every head, with the mask: what the latent scores are added to."""
    assert call.query_rope is not None and call.key_rope is not None
    B, H, S, R = call.query_rope.shape
    K, T = call.key_rope.shape[1:3]
    rows = call.query_rope.reshape(B, K, H // K * S, R)
    bias = (rows @ call.key_rope.transpose(-1, -2)).reshape(B, H, S, T) * call.scale
    if call.mask is None:
        return bias
    return bias.masked_fill(~call.mask, float("-inf")) if call.mask.dtype == torch.bool else bias + call.mask


def expanded(call: LatentCall) -> Tensor:
    """Keys and values of every head and then attention, differentiable: [B, H, S, E]."""
    key, key_rope, value = _expand(call, 0, call.latent.shape[2])
    if key_rope is not None:
        key = torch.cat((key, key_rope), -1)
    query = call.query if call.query_rope is None else torch.cat((call.query, call.query_rope), -1)
    from .attention import attention

    grouped = key.shape[1] != query.shape[1]
    return attention(query, key, value, call.mask, call.sinks, call.scale, call.cap, call.causal, call.window, grouped)


def _expand(call: LatentCall, start: int, stop: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Keys [B, K, t, D], their rotary parts and values [B, K, t, E] of the tokens from `start` to `stop`."""
    K = call.up_key.shape[0]

    def up(latent_BLTC: Tensor, weight_KXC: Tensor) -> Tensor:
        B, L, _, C = latent_BLTC.shape
        latent = latent_BLTC[:, :, start:stop].to(weight_KXC.dtype)
        X = weight_KXC.shape[1]
        if L == 1:  # one product for all heads
            wide = F.linear(latent.reshape(B, -1, C), weight_KXC.reshape(K * X, C))
            return wide.reshape(B, -1, K, X).transpose(1, 2)
        return latent.repeat_interleave(K // L, 1) @ weight_KXC.transpose(1, 2)

    key = up(call.latent, call.up_key)
    value = up(call.latent if call.value_latent is None else call.value_latent, call.up_value)
    if call.value_bias is not None:
        value = value + call.value_bias[:, None]
    rope = call.key_rope
    if rope is not None:
        rope = rope[:, :, start:stop].to(key.dtype)
        rope = rope.expand(-1, K, -1, -1) if rope.shape[1] == 1 else rope.repeat_interleave(K // rope.shape[1], 1)
    return key, rope, value


def plain(*arguments: Any) -> Tensor:
    """The reference body: absorbed, in plain operators."""
    return absorbed(LatentCall(*arguments), reference)


torch.library.impl("latent::latent_attention", "CompositeImplicitAutograd", in_own_dtypes(plain))


# ** the expanded form, a block of keys at a time **


def expanded_in_blocks(call: LatentCall, block: int = BLOCK) -> Tensor:
    """Keys and values of `block` tokens at a time, their results joined by the logs of their sums: [B, H, S, E].

    Blocks that no query sees, by the causal flag, the window or the mask, are not expanded.
    """
    dtype = call.query.dtype
    B, H, S, _ = call.query.shape
    T, E = call.latent.shape[2], call.up_value.shape[1]
    call = _in_dtype(call, fast_dtype(call.query.device.type, dtype))
    out = call.query.new_zeros((B, H, S, E), dtype=torch.float32)
    total = call.query.new_full((B, H, S, 1), float("-inf"), dtype=torch.float32)
    for start in range(0, T, block):
        stop = min(start + block, T)
        rows = slice(min(start, S) if call.causal else 0, min(S, stop - 1 + call.window) if call.window else S)
        if rows.start >= rows.stop:
            continue
        mask = _part_of(call.mask, rows, slice(start, stop))
        if mask is not None and _hides_all(mask):
            continue
        key, key_rope, value = _expand(call, start, stop)
        part = Call(
            call.query[:, :, rows],
            None if call.query_rope is None else call.query_rope[:, :, rows],
            key,
            key_rope,
            value,
            mask,
            None,
            call.scale,
            call.cap,
            call.causal,
            call.window,
            rows.start - start,
            totals=True,
        )
        result = kernel_for(spec_of(part), call.query.device.type)(part)
        _join(out[:, :, rows], total[:, :, rows], result[..., :E], result[..., E:])
    if call.sinks is not None:
        out *= torch.sigmoid(total - call.sinks.float().view(1, H, 1, 1))
    return out.to(dtype)


def _in_dtype(call: LatentCall, dtype: torch.dtype) -> LatentCall:
    """The call with queries and weights in another dtype; latents follow a block at a time."""
    if dtype == call.query.dtype:
        return call
    rope, bias = (None if t is None else t.to(dtype) for t in (call.query_rope, call.value_bias))
    up_key, up_value = call.up_key.to(dtype), call.up_value.to(dtype)
    return call._replace(query=call.query.to(dtype), query_rope=rope, up_key=up_key, up_value=up_value, value_bias=bias)


def _part_of(mask: Tensor | None, rows: slice, columns: slice) -> Tensor | None:
    """The part of a mask [B|1, H|1, S|1, T|1] for some queries and keys."""
    if mask is None:
        return None
    mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
    return mask[..., columns] if mask.shape[3] > 1 else mask


def _hides_all(mask: Tensor) -> bool:
    return not bool(mask.any()) if mask.dtype == torch.bool else bool((mask == float("-inf")).all())


def _join(out: Tensor, total: Tensor, part: Tensor, part_total: Tensor) -> None:
    """Two softmaxes over disjoint keys become one, in place."""
    both = torch.logaddexp(total, part_total)
    finite = both.clamp(min=torch.finfo(torch.float32).min)
    out.mul_(torch.exp(total - finite)).add_(part * torch.exp(part_total - finite))
    total.copy_(both)


# ** the choice **


def _generated(call: Call) -> Tensor:
    result: Tensor = torch.ops.latent.generated_attention(*call)
    return result


def absorbed_by_kernel(*arguments: Any) -> Tensor:
    """The absorbed form around a generated kernel."""
    return absorbed(LatentCall(*arguments), _generated, _per_head_by_kernel)


def expanded_with_gradient(*arguments: Any) -> Tensor:
    return expanded(LatentCall(*arguments))


def widths_of(call: LatentCall) -> Widths:
    rope = 0 if call.query_rope is None else call.query_rope.shape[-1]
    return Widths(call.up_key.shape[2], call.up_key.shape[1], call.up_value.shape[1], rope)


def threshold_of(call: LatentCall) -> int:
    """The number of query tokens from which on the expanded form is predicted to be faster on this machine."""
    query = call.query
    device = query.device.type
    machine = quick(device, fast_dtype(device, query.dtype))
    return threshold(widths_of(call), query.shape[1], call.latent.shape[2], machine, query.dtype.itemsize)


def either(*arguments: Any) -> Tensor:
    """The form that is predicted to be faster for this many queries."""
    call = LatentCall(*arguments)
    if call.query.shape[2] < threshold_of(call):
        # strides as `shape_of_result` says, for batches too
        return absorbed(call, _generated, _per_head_by_kernel).contiguous()
    return expanded_in_blocks(call)


def shape_of_result(
    query: Tensor,
    query_rope: Any,
    latent: Any,
    key_rope: Any,
    value_latent: Any,
    up_key: Any,
    up_value: Tensor,
    *rest: Any,
) -> Tensor:
    return query.new_empty((*query.shape[:3], up_value.shape[1]))


torch.library.impl("latent::latent_attention_either", "CPU", in_own_dtypes(either))
torch.library.impl("latent::latent_attention_either", "CUDA", in_own_dtypes(either))
torch.library.register_fake("latent::latent_attention_either", shape_of_result)


@source_printer("latent::latent_attention_either")
def _printed(node: fx.Node) -> list[KernelSource]:
    """The kernels of both forms."""
    call = LatentCall(*fx.node.map_arg(args_of(node), lambda n: n.meta["val"]))
    device, seen = call.query.device.type, []

    def core(inner: Call) -> Tensor:
        seen.append(spec_of(inner))
        return inner.query.new_empty((*inner.query.shape[:3], seen[0].out_width))

    with fake_mode_of_value(call):
        absorbed(call, core)
    return [printed(seen[0], device, "absorbed"), printed(_block_spec(call), device, "expanded")]


def _block_spec(call: LatentCall) -> KernelSpec:
    """What `expanded_in_blocks` asks of its kernel."""
    dtype = fast_dtype(call.query.device.type, call.query.dtype)
    mask: MaskKind = "none" if call.mask is None else "bool" if call.mask.dtype == torch.bool else "additive"
    return KernelSpec(
        dtype=dtype,
        width=call.up_key.shape[1],
        rope_width=0 if call.query_rope is None else call.query_rope.shape[-1],
        value_width=call.up_value.shape[1],
        mask=mask,
        mask_dtype=call.mask.dtype if call.mask is not None and mask == "additive" else None,
        capped=call.cap > 0.0,
        totals=True,
    )


@lowering("latent::latent_attention")
def choose(node: fx.Node, gradients: bool) -> tuple[LibraryCall | Callable[..., Tensor] | None, str]:
    """The form for one node, or the operator that chooses at run time, and the reason in words."""
    call = LatentCall(*args_of(node))
    query = node.meta["val"]
    if gradients:
        return expanded_with_gradient, "expanded: gradients are needed"
    if query.dtype not in DTYPES or isinstance(call.scale, fx.Node):
        return None, "absorbed, in plain operators"
    lost = unavailable(query.device.type)
    reason = _reason(LatentCall(*fx.node.map_arg(args_of(node), lambda n: n.meta["val"])))
    reason = f"{reason}; plain operators: {lost}" if lost else reason
    if query.shape[2] == 1:
        return (None if lost else absorbed_by_kernel), reason
    target = torch.ops.latent.latent_attention_either.default
    return LibraryCall(target, tuple(call), {}), f"{reason}; decided again at each call"


def _reason(call: LatentCall) -> str:
    """The formula, its numbers for the example sizes, and the choice."""
    widths = Widths(*(concrete(width) for width in widths_of(call)))
    S, T = concrete(call.query.shape[2]), concrete(call.latent.shape[2])
    return explain(widths, concrete(call.query.shape[1]), T, S)
