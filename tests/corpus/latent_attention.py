"""Layers with latent attention as different authors write them, and what a rewrite into the latent may do with each.

    c = norm(x D)     k = [U_k c | rope(x W)]     v = U_v c          absorbed: q U_k against c, U_v behind the attention

`EXPECTED` says for every program what is narrow and which of keys and values can stay in the latent, and why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import MORE, Inputs, Maker, Rand, program
from .references import attend, merge_heads

Form = Literal["expanded", "cached latent", "cached expanded", "absorbed"]
Side = Literal["both", "value only", "key only", "none"]

B, S, OLD, H = 2, 10, 7, 4
C, L = 40, 12
"""Channels of the activations, and of the latent."""
N, R, E = 8, 4, 6
"""Widths of a head: of the key without positions, of its rotary part, of the value."""
BOTH = H * (N + E)
SCALE = (N + R) ** -0.5


@dataclass(frozen=True)
class Expected:
    """What is known about a program of this file."""

    form: Form | None
    """What attention reads and what is cached; None where keys and values have no latent in common."""

    side: Side
    """What may stay in the latent, by algebra."""

    why: str
    width: int = L
    expanded: int | None = BOTH


EXPECTED: dict[str, Expected] = {}


def latent(
    form: Form | None, side: Side, why: str, *, maker: Maker | None = None, sites: int = 1, **known: int | None
) -> Callable:
    """Register a layer under its own name, with what is expected of it."""

    def register(layer: type[Layer]) -> type[Layer]:
        program(MORE, maker or activations, sites=sites)(layer)
        EXPECTED[MORE[-1].name] = Expected(form, side, why, **known)  # type: ignore[arg-type]
        return layer

    return register


expanded = functools.partial(latent, "expanded", "both")
cached = functools.partial(latent, "cached latent", "both")


# ---------------------------------------------------------------- inputs


def activations(rand: Rand) -> Inputs:
    """x_BSC."""
    return (rand(B, S, C),)


def step(rand: Rand, *, new: int = 1, room: int = OLD) -> Inputs:
    """x_BSC of the new tokens, and what a cache holds of the old ones: latent_BTL and key_BTR."""
    old = torch.arange(room)[:, None] < OLD
    return rand(B, new, C), rand(B, room, L) * old, rand(B, room, R) * old


def step_position(rand: Rand) -> Inputs:
    """The same with buffers that have room, and the positions of the new tokens."""
    return *step(rand, new=2, room=OLD + 4), torch.arange(OLD, OLD + 2)


def step_joint(rand: Rand) -> Inputs:
    """x_BSC and a cache of latents and rotary keys in one tensor."""
    x, latent, key = step(rand)
    return x, torch.cat([latent, key], -1)


def step_raw(rand: Rand) -> Inputs:
    """x_BSC and a cache of what the down projection gave, before norm and rotation."""
    return rand(B, 1, C), rand(B, OLD, L + R)


def step_expanded(rand: Rand) -> Inputs:
    """x_BSC and a cache of keys and values of every head."""
    return rand(B, 1, C), rand(B, H, OLD, N + R), rand(B, H, OLD, E)


def padded(rand: Rand) -> Inputs:
    """x_BSC and valid_BT, False for the padding on the left of the first row; later keys are hidden elsewhere."""
    return rand(B, S, C), torch.arange(S) >= torch.tensor([[3], [0]])


# ---------------------------------------------------------------- pieces


def rope(x: Tensor, start: int = 0, dim: int = -2) -> Tensor:
    """The halves of the width rotated by the position along `dim`."""
    half = x.shape[-1] // 2
    position = torch.arange(start, start + x.shape[dim], dtype=x.dtype)
    angle = position[:, None] / 100.0 ** (torch.arange(half, dtype=x.dtype) / half)
    if dim == -3:
        angle = angle[:, None]
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def rope_complex(x: Tensor, start: int = 0) -> Tensor:
    """Neighbours of the width as complex numbers; [B, S, H, R]."""
    angle = torch.arange(start, start + x.shape[1])[:, None] / 100.0 ** (torch.arange(R // 2) / (R // 2))
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(3)


def hidden(queries: int, keys: int | None = None) -> Tensor:
    """[S, T], -inf where the key is later than the query; the queries are the last tokens."""
    keys = queries if keys is None else keys
    return torch.full((queries, keys), float("-inf")).triu(1 + keys - queries)


class Layer(nn.Module):
    """The weights of the plain layer, its pieces, and the definition in terms of them."""

    down_bias = up_bias = False
    rotary = R

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(C, H * (N + self.rotary), bias=False)
        self.down, self.norm = nn.Linear(C, L + self.rotary, bias=self.down_bias), nn.RMSNorm(L)
        self.up = nn.Linear(L, BOTH, bias=self.up_bias)
        self.o = nn.Linear(H * E, C, bias=False)

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        """[B, H, S, N+R], the last part rotated."""
        content, rotary = self.q(x).unflatten(-1, (H, -1)).transpose(1, 2).split([N, self.rotary], -1)
        return torch.cat([content, rope(rotary, start)], -1) if self.rotary else content

    def latent(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """[B, S, L] and [B, S, R], what a cache holds."""
        latent, rotary = self.down(x).split([L, self.rotary], -1)
        return self.norm(latent), rope(rotary, start) if self.rotary else rotary

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, T, N] and [B, H, T, E] by the definition."""
        both = torch.stack([latent @ weight.T for weight in self.up.weight.chunk(H)], 1)
        if self.up.bias is not None:
            both = both + self.up.bias.view(H, 1, -1)
        return both[..., :N], both[..., N:]

    def key_value(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.expand(latent)
        return torch.cat([key, rotary[:, None].expand(-1, H, -1, -1)], -1), value

    def reference(self, x: Tensor, *cache: Tensor, **options) -> Tensor:
        """The definition; what a cache holds comes before the new tokens."""
        start = OLD if cache else 0
        latent, rotary = self.latent(x, start)
        if cache:
            latent, rotary = torch.cat([cache[0][:, :OLD], latent], 1), torch.cat([cache[1][:, :OLD], rotary], 1)
        options.setdefault("mask", hidden(x.shape[1], latent.shape[1]))
        return self.o(merge_heads(attend(self.query(x, start), *self.key_value(latent, rotary), **options)))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Eager attention and the output projection."""
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores + (hidden(query.shape[2], key.shape[2]) if mask is None else mask)
        return self.o((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def joined(layer: Layer, query: Tensor, latent: Tensor, rotary: Tensor, mask: Tensor | None = None) -> Tensor:
    """The plain way from a latent to the output, for layers whose point is elsewhere."""
    key, value = layer.up(latent).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
    key = torch.cat([key, rotary.unsqueeze(1).expand(-1, H, -1, -1)], -1)
    return layer.attention(query, key, value, mask)


# ---------------------------------------------------------------- how keys and values are expanded


@expanded("both come out of one linear layer, cut for each head")
class MlaHuggingFace(Layer):
    """transformers: one linear, view, transpose, split; the key is an empty tensor with two slices copied into it."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        query = self.q(x).view(b, s, H, N + R).transpose(1, 2)
        content, rotary = torch.split(query, [N, R], dim=-1)
        compressed = self.down(x)
        latent, key_rot = torch.split(compressed, [L, R], dim=-1)
        latent = self.norm(latent).view(b, 1, s, L)
        rotary, key_rot = rope(rotary), rope(key_rot.view(b, 1, s, R))
        both = self.up(latent).view(b, s, -1, N + E).transpose(1, 2)
        key_nope, value = torch.split(both, [N, E], dim=-1)
        key = both.new_empty(*both.shape[:-1], N + R)
        key[..., :N].copy_(key_nope)
        key[..., N:].copy_(key_rot.expand(-1, H, -1, -1))
        query = torch.cat((content, rotary), dim=-1)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE)
        return self.o(output.transpose(1, 2).reshape(b, s, -1).contiguous())


@expanded("both come out of one linear layer, cut for each head")
class MlaRemoteCode(Layer):
    """The first DeepSeek code: new_empty for query and key, assignment of slices, eager in float32, dropout off."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.size()
        content, rotary = self.q(x).view(b, s, H, N + R).transpose(1, 2).split([N, R], -1)
        latent, key_rot = self.down(x).split([L, R], -1)
        key_rot = rope(key_rot.view(b, s, 1, R).transpose(1, 2))
        both = self.up(self.norm(latent)).view(b, s, H, N + E).transpose(1, 2)
        key_nope, value = both.split([N, E], dim=-1)
        query, key = x.new_empty(b, H, s, N + R), x.new_empty(b, H, s, N + R)
        query[:, :, :, :N], query[:, :, :, N:] = content, rope(rotary)
        key[:, :, :, :N], key[:, :, :, N:] = key_nope, key_rot
        weights = torch.matmul(query, key.transpose(2, 3)) * SCALE + hidden(s)[None, None]
        weights = F.dropout(F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype), p=0.1, training=False)
        return self.o(torch.matmul(weights, value).transpose(1, 2).contiguous().reshape(b, s, H * E))


class TwoLinears(Layer):
    """Keys and values have a linear layer each."""

    def __init__(self) -> None:
        super().__init__()
        del self.up
        self.k_up, self.v_up = nn.Linear(L, H * N, bias=False), nn.Linear(L, H * E, bias=False)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        weights = zip(self.k_up.weight.chunk(H), self.v_up.weight.chunk(H), strict=True)
        key, value = zip(*((latent @ k.T, latent @ v.T) for k, v in weights), strict=True)
        return torch.stack(key, 1), torch.stack(value, 1)


@expanded("two linear layers of one latent")
class MlaTwoLinears(TwoLinears):
    """Separate up projections, concatenated rotary part, additive mask."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = self.k_up(latent).view(*x.shape[:2], H, N).transpose(1, 2)
        value = self.v_up(latent).view(*x.shape[:2], H, E).transpose(1, 2)
        key = torch.cat([key, rotary.unsqueeze(1).repeat(1, H, 1, 1)], dim=-1)
        return self.attention(self.query(x), key, value)


@expanded("two linear layers of one latent")
class MlaTokensFirst(TwoLinears):
    """Everything in [B, S, H, D]; scores by einsum, heads come first only inside of it."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key_BTHN, value_BTHE = self.k_up(latent).unflatten(-1, (H, N)), self.v_up(latent).unflatten(-1, (H, E))
        key = torch.cat([key_BTHN, rotary[:, :, None].expand(-1, -1, H, -1)], -1)
        query_BSHD = self.q(x).unflatten(-1, (H, N + R))
        query_BSHD = torch.cat([query_BSHD[..., :N], rope(query_BSHD[..., N:], dim=-3)], -1)
        scores_BHST = torch.einsum("bshd,bthd->bhst", query_BSHD, key) * SCALE + hidden(x.shape[1])
        return self.o(torch.einsum("bhst,bthe->bshe", scores_BHST.softmax(-1), value_BTHE).flatten(2))


class HeadWeights(Layer):
    """The up projections are parameters with an axis of heads."""

    def __init__(self) -> None:
        super().__init__()
        del self.up
        self.key_HNL, self.value_HEL = (nn.Parameter(torch.randn(H, width, L) / 3) for width in (N, E))

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        return latent[:, None] @ self.key_HNL.mT, latent[:, None] @ self.value_HEL.mT


@expanded("weights of every head, the same latent for all")
class MlaHeadEinsum(HeadWeights):
    """einsum with weights [H, N, L] puts the heads first."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = torch.einsum("bsl,hnl->bhsn", latent, self.key_HNL)
        value = torch.einsum("bsl,hel->bhse", latent, self.value_HEL)
        key = torch.cat([key, rotary.unsqueeze(1).expand(-1, H, -1, -1)], dim=-1)
        return self.attention(self.query(x), key, value)


@expanded("weights of every head, the same latent for all")
class MlaHeadMatmul(HeadWeights):
    """The latent with an axis of size one against weights [H, L, N]: matmul broadcasts."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key, value = latent.unsqueeze(1) @ self.key_HNL.transpose(1, 2), latent.unsqueeze(1) @ self.value_HEL.mT
        key = torch.cat([key, rotary.unsqueeze(1).expand(-1, H, -1, -1)], dim=-1)
        output = F.scaled_dot_product_attention(self.query(x), key, value, attn_mask=hidden(x.shape[1]))
        return self.o(merge_heads(output))


@expanded("weights of every head, the latent repeated for them")
class MlaBmm(HeadWeights):
    """One batched product for each of keys and values: the batch is the heads, the rows are all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        latent, rotary = self.latent(x)
        rows_HXL = latent.reshape(1, b * s, L).expand(H, -1, -1)
        key = torch.bmm(rows_HXL, self.key_HNL.mT).view(H, b, s, N).transpose(0, 1)
        value = torch.bmm(rows_HXL, self.value_HEL.mT).view(H, b, s, E).transpose(0, 1)
        key = torch.cat([key, rotary[:, None].expand(-1, H, -1, -1)], -1)
        return self.attention(self.query(x), key, value)


@expanded("one matrix product with a weight stored [in, out]")
class MlaTransposedWeight(Layer):
    """JAX layout: weights [L, H, N + E], one matmul with a flattened weight."""

    def __init__(self) -> None:
        super().__init__()
        del self.up
        self.up_LHD = nn.Parameter(torch.randn(L, H, N + E) / 3)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum("btl,lhd->bhtd", latent, self.up_LHD).split([N, E], -1)

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        both = torch.matmul(latent, self.up_LHD.flatten(1)).reshape(*x.shape[:2], H, N + E)
        key = torch.cat([both[..., :N], rotary.unsqueeze(2).expand(-1, -1, H, -1)], -1)
        return self.attention(self.query(x), key.permute(0, 2, 1, 3), both[..., N:].permute(0, 2, 1, 3))


@expanded("one linear layer: the keys of all heads, then the values of all")
class MlaBlocks(Layer):
    """The up projection is cut before there are heads."""

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.up.weight.split([H * N, H * E])
        return latent[:, None] @ key.view(H, N, L).mT, latent[:, None] @ value.view(H, E, L).mT

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key, value = self.up(latent).split([H * N, H * E], dim=-1)
        key = key.view(*x.shape[:2], H, N).transpose(1, 2)
        key = torch.cat((key, rotary[:, None].expand(-1, H, -1, -1)), -1)
        return self.attention(self.query(x), key, value.view(*x.shape[:2], H, E).transpose(1, 2))


@expanded("a convolution of one token is a linear layer")
class MlaConvolution(TwoLinears):
    """Up projections are convolutions of kernel one, tokens last."""

    def __init__(self) -> None:
        super().__init__()
        del self.k_up, self.v_up
        self.k_up, self.v_up = nn.Conv1d(L, H * N, 1, bias=False), nn.Conv1d(L, H * E, 1, bias=False)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.k_up.weight[..., 0].view(H, N, L), self.v_up.weight[..., 0].view(H, E, L)
        return latent[:, None] @ key.mT, latent[:, None] @ value.mT

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = self.k_up(latent.mT).view(x.shape[0], H, N, -1).mT
        value = self.v_up(latent.mT).view(x.shape[0], H, E, -1).mT
        key = torch.cat([key, rotary[:, None].expand(-1, H, -1, -1)], -1)
        return self.attention(self.query(x), key, value)


@expanded("the latent serves two key heads, each of two query heads", expanded=2 * (N + E))
class MlaGrouped(Layer):
    """Two key heads for four query heads, repeated after the expansion."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(L, 2 * (N + E), bias=False)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack([latent @ weight.T for weight in self.up.weight.chunk(2)], 1).repeat_interleave(2, 1)
        return both[..., :N], both[..., N:]

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key, value = self.up(latent).unflatten(-1, (2, -1)).transpose(1, 2).split([N, E], -1)
        key = torch.cat([key, rotary[:, None].expand(-1, 2, -1, -1)], -1)
        key, value = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (key, value))
        return self.attention(self.query(x), key, value)


@expanded("the latent serves two key heads, each of two query heads", expanded=2 * (N + E))
class MlaGroupedCall(MlaGrouped):
    """The same with the library call, which repeats the heads itself."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key, value = self.up(latent).unflatten(-1, (2, -1)).transpose(1, 2).split([N, E], -1)
        key = torch.cat([key, rotary[:, None].expand(-1, 2, -1, -1)], -1)
        output = F.scaled_dot_product_attention(self.query(x), key, value, is_causal=True, enable_gqa=True)
        return self.o(merge_heads(output))


# ---------------------------------------------------------------- how the key is put together


@expanded("an empty tensor filled slice by slice is a concatenation")
class MlaSetitem(TwoLinears):
    """Zeros in [B, S, H, D], two assignments with an ellipsis, the second broadcast over heads."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = torch.zeros(*x.shape[:2], H, N + R)
        key[..., :N] = self.k_up(latent).unflatten(-1, (H, N))
        key[..., N:] = rotary[:, :, None]
        value = self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2)
        return self.attention(self.query(x), key.transpose(1, 2), value)


@expanded("a sum of tensors padded with zeros on either side is a concatenation")
class MlaPadded(TwoLinears):
    """Both parts of the key are padded to the full width and added."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = self.k_up(latent).unflatten(-1, (H, N)).transpose(1, 2)
        key = F.pad(key, (0, R)) + F.pad(rotary, (N, 0))[:, None]
        return self.attention(self.query(x), key, self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2))


@expanded("the scores are two products, one of which has the latent behind its keys")
class MlaTwoProducts(TwoLinears):
    """Scores of content and of position are added; no key of full width exists."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        content, position = self.query(x).split([N, R], -1)
        key_BTHN = self.k_up(latent).unflatten(-1, (H, N))
        scores = torch.einsum("bhsn,bthn->bhst", content, key_BTHN)
        scores = (scores + torch.einsum("bhsr,btr->bhst", position, rotary)) * SCALE + hidden(x.shape[1])
        value_BTHE = self.v_up(latent).unflatten(-1, (H, E))
        return self.o(torch.einsum("bhst,bthe->bshe", scores.softmax(-1), value_BTHE).flatten(2))


@expanded("the order of the parts of a key does not matter")
class MlaRotaryFirst(TwoLinears):
    """The rotary part comes first, in queries and in keys."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        content, position = self.query(x).split([N, R], -1)
        key = self.k_up(latent).unflatten(-1, (H, N)).transpose(1, 2)
        key = torch.cat([rotary[:, None].expand(-1, H, -1, -1), key], -1)
        value = self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2)
        return self.attention(torch.cat([position, content], -1), key, value)


@expanded("no rotary part: the whole key comes from the latent")
class MlaWithoutPositions(Layer):
    """Kimi Linear: the attention layers have no positions at all."""

    rotary = 0

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.up(self.norm(self.down(x))).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        output = F.scaled_dot_product_attention(self.query(x), key, value, is_causal=True)
        return self.o(merge_heads(output))


@expanded("the rotary part is a head of its own for each head, beside a latent that is shared")
class MlaRotaryPerHead(TwoLinears):
    """Rotary keys of every head, projected from the activations; scores need two products, or a repeated latent."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.rot = nn.Linear(C, L, bias=False), nn.Linear(C, H * R, bias=False)

    def latent(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        return self.norm(self.down(x)), rope(self.rot(x).unflatten(-1, (H, R)).transpose(1, 2), start)

    def key_value(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.expand(latent)
        return torch.cat([key, rotary], -1), value

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary_BHTR = self.latent(x)
        key = torch.cat([self.k_up(latent).unflatten(-1, (H, N)).transpose(1, 2), rotary_BHTR], -1)
        return self.attention(self.query(x), key, self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2))


@expanded("a rotation by complex numbers of the part that is not from the latent")
class MlaComplexRotation(Layer):
    """DeepSeek inference, naive: complex rotation in [B, S, H, R], einsum scores in [B, S, H, T]."""

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        content, rotary = self.q(x).unflatten(-1, (H, -1)).split([N, R], -1)
        return torch.cat([content, rope_complex(rotary, start)], -1).transpose(1, 2)

    def latent(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        latent, rotary = self.down(x).split([L, R], -1)
        return self.norm(latent), rope_complex(rotary.unsqueeze(2), start).squeeze(2)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.size()
        content, position = torch.split(self.q(x).view(b, s, H, N + R), [N, R], dim=-1)
        query = torch.cat([content, rope_complex(position)], dim=-1)
        latent, key_rot = torch.split(self.down(x), [L, R], dim=-1)
        key_rot = rope_complex(key_rot.unsqueeze(2))
        key_nope, value = torch.split(self.up(self.norm(latent)).view(b, s, H, N + E), [N, E], dim=-1)
        key = torch.cat([key_nope, key_rot.expand(-1, -1, H, -1)], dim=-1)
        scores = torch.einsum("bshd,bthd->bsht", query, key) * SCALE
        scores += hidden(s).unsqueeze(1)
        scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        return self.o(torch.einsum("bsht,bthd->bshd", scores, value).flatten(2))
