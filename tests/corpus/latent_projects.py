"""Latent attention in the manner of published repositories: inference, research and training code, adapters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .latent_attention import (
    BOTH,
    SCALE,
    E,
    H,
    L,
    Layer,
    N,
    R,
    TwoLinears,
    expanded,
    hidden,
    joined,
    latent,
    rope,
    rope_complex,
)


class Stored(Layer):
    """Caches are buffers of the module, with room for more rows and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kv_cache", torch.zeros(4, 16, L), persistent=False)
        self.register_buffer("pe_cache", torch.zeros(4, 16, R), persistent=False)

    def stored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both caches after the tokens were assigned to a slice of them."""
        b, end = x.shape[0], x.shape[1]
        latent, rotary = self.latent(x)
        self.kv_cache[:b, 0:end] = latent
        self.pe_cache[:b, 0:end] = rotary
        return self.kv_cache[:b, :end], self.pe_cache[:b, :end]


@expanded("the slice that is read is the one that was assigned")
class MlaOwnBuffers(Stored):
    """DeepSeek's caches, expanded: slices of the module's buffers are assigned and read."""

    def forward(self, x: Tensor) -> Tensor:
        return joined(self, self.query(x), *self.stored(x))


@latent("absorbed", "none", "it is absorbed already", width=L, expanded=None)
class MlaOwnBuffersAbsorbed(Stored):
    """DeepSeek's `absorb`: the up projection as a view of its weight, four einsums, caches in buffers."""

    def forward(self, x: Tensor) -> Tensor:
        content, position = self.query(x).transpose(1, 2).split([N, R], -1)
        cache, pe_cache = self.stored(x)
        up = self.up.weight.view(H, -1, L)
        content = torch.einsum("bshd,hdc->bshc", content, up[:, :N])
        scores = torch.einsum("bshc,btc->bsht", content, cache) + torch.einsum("bshr,btr->bsht", position, pe_cache)
        scores = scores * SCALE + hidden(x.shape[1]).unsqueeze(1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        out = torch.einsum("bsht,btc->bshc", weights, cache)
        return self.o(torch.einsum("bshc,hdc->bshd", out, up[:, -E:]).flatten(2))


@expanded("tokens before heads until the call, neighbours rotated as complex numbers")
class MlaTrainingCode(Layer):
    """torchtitan: everything is [B, S, H, D] until the transposes before the call."""

    def latent(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        latent, rotary = self.down(x).split([L, R], -1)
        return self.norm(latent), rope_complex(rotary.unsqueeze(2)).squeeze(2)

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        content, position = self.q(x).unflatten(-1, (H, -1)).split([N, R], -1)
        return torch.cat([content, rope_complex(position)], -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        latent, rotary = torch.split(self.down(x), [L, R], dim=-1)
        rotary = rope_complex(rotary.unsqueeze(2))
        content, value = torch.split(self.up(self.norm(latent)).view(b, s, -1, N + E), [N, E], dim=-1)
        key = torch.cat([content, rotary.expand(-1, -1, H, -1)], dim=-1)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        out = F.scaled_dot_product_attention(self.query(x), key, value, is_causal=True, scale=SCALE)
        return self.o(out.transpose(1, 2).contiguous().view(b, s, -1))


@expanded("einops names every axis; what hides is the most negative number")
class MlaEinops(TwoLinears):
    """lucidrains: rearrange and repeat, einsum, masked_fill with the lowest number."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        query = rearrange(self.query(x), "b h n d -> b h n d") * SCALE
        key, value = (rearrange(up(latent), "b n (h d) -> b h n d", h=H) for up in (self.k_up, self.v_up))
        key = torch.cat((key, repeat(rotary, "b n d -> b h n d", h=H)), dim=-1)
        scores = torch.einsum("b h i d, b h j d -> b h i j", query, key)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(mask, -torch.finfo(scores.dtype).max)
        out = torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1, dtype=torch.float32), value)
        return self.o(rearrange(out, "b h n d -> b n (h d)"))


@latent("cached latent", "both", "the latents are concatenated, no positions")
class MlaBookCache(TwoLinears):
    """Teaching code: the cache is an attribute that is None at first; masked_fill_ on raw scores, the scale last."""

    rotary = 0

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        cache = x.new_zeros(b, 0, L)
        latent = torch.cat([cache, self.norm(self.down(x))], dim=1)
        query = self.q(x).view(b, s, H, N).transpose(1, 2)
        key = self.k_up(latent).view(b, s, H, N).transpose(1, 2)
        value = self.v_up(latent).view(b, s, H, E).transpose(1, 2)
        scores = query @ key.transpose(2, 3)
        scores.masked_fill_(torch.triu(torch.ones(s, s), diagonal=1).bool(), -torch.inf)
        weights = torch.softmax(scores / key.shape[-1] ** 0.5, dim=-1)
        return self.o((weights @ value).transpose(1, 2).contiguous().view(b, s, H * E))


@expanded("values are padded with zeros, and what comes of the zeros is cut off")
class MlaPaddedValues(Layer):
    """Kernels of one width: the values are as wide as the keys by zeros."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        content, value = self.up(latent).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        key = torch.cat([content, rotary[:, None].expand(-1, H, -1, -1)], -1)
        value = F.pad(value, [0, N + R - E])
        out = F.scaled_dot_product_attention(self.query(x), key, value, is_causal=True, scale=SCALE)
        return self.o(out[:, :, :, :E].transpose(1, 2).flatten(2))


@expanded("a product with a bias by addmm, on flattened tokens")
class MlaAddmm(Layer):
    """GPT-2's Conv1D as up projection: weights [in, out]."""

    up_bias = True

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        both = torch.addmm(self.up.bias, latent.reshape(-1, L), self.up.weight.mT).view(*x.shape[:2], H, N + E)
        content, value = both.permute(0, 2, 1, 3).split([N, E], -1)
        return self.attention(self.query(x), torch.cat([content, rotary[:, None].expand(-1, H, -1, -1)], -1), value)


@expanded("channels lie before tokens in latents, keys and values")
class MlaChannelsFirst(Layer):
    """Latents [B, L, T]: weights stand on the left, keys are ready to be multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = (t.mT for t in self.latent(x))
        up = self.up.weight.view(H, N + E, L)
        key = torch.einsum("hdl,blt->bhdt", up[:, :N], latent)
        key = torch.cat([key, rotary[:, None].expand(-1, H, -1, -1)], 2)
        value = up[:, N:] @ latent[:, None]
        weights = (self.query(x) @ key * SCALE + hidden(x.shape[1])).softmax(-1)
        return self.o((value @ weights.mT).permute(0, 3, 1, 2).flatten(2))


@expanded("the norm covers latent and rotary part", width=L)
class MlaNormBeforeSplit(Layer):
    """One norm over what the down projection gives, which is cut afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(L + R)

    def latent(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        latent, rotary = self.norm(self.down(x)).split([L, R], -1)
        return latent, rope(rotary, start)

    def forward(self, x: Tensor) -> Tensor:
        return joined(self, self.query(x), *self.latent(x))


@expanded("weights in wider numbers than the latent")
class MlaWideExpansion(Layer):
    """The up projection in float64 beside a float32 model."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        both = F.linear(latent.double(), self.up.weight.double()).to(x.dtype)
        content, value = both.unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        return self.attention(self.query(x), torch.cat([content, rotary[:, None].expand(-1, H, -1, -1)], -1), value)


@expanded("ALiBi is a bias of the scores, without positions in the keys")
class MlaAlibi(TwoLinears):
    """Slopes for positions; the window is the causal one."""

    rotary = 0

    def slopes(self, tokens: int) -> Tensor:
        distance = torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None]
        return 2.0 ** -torch.arange(1.0, H + 1).view(H, 1, 1) * distance + hidden(tokens)

    def reference(self, x: Tensor) -> Tensor:
        return super().reference(x, mask=self.slopes(x.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        latent = self.norm(self.down(x))
        key = self.k_up(latent).unflatten(-1, (H, N)).transpose(1, 2)
        value = self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2)
        return self.attention(self.query(x), key, value, self.slopes(x.shape[1]))


@expanded("the adapter's product is one more matrix on the same latent")
class MlaAdapter(Layer):
    """LoRA on the up projection, not merged: up(c) + scaling · b(a(c))."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Linear(L, 3, bias=False), nn.Linear(3, BOTH, bias=False)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.up.weight + 0.5 * self.lora_b.weight @ self.lora_a.weight
        both = torch.stack([latent @ part.T for part in weight.chunk(H)], 1)
        return both[..., :N], both[..., N:]

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        both = self.up(latent) + self.lora_b(self.lora_a(latent)) * 0.5
        content, value = both.unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        return self.attention(self.query(x), torch.cat([content, rotary[:, None].expand(-1, H, -1, -1)], -1), value)


@expanded("the weight is a product of two, made in every call")
class MlaMergedAdapter(MlaAdapter):
    """LoRA merged in the forward: a linear with W + s · B A."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        both = F.linear(latent, self.up.weight + 0.5 * (self.lora_b.weight @ self.lora_a.weight))
        content, value = both.unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        return self.attention(self.query(x), torch.cat([content, rotary[:, None].expand(-1, H, -1, -1)], -1), value)


@expanded("heads are linear layers of their own, stacked: no one weight makes them")
class MlaHeadModules(Layer):
    """A linear layer for each head; what they give is stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(L, N + E, bias=False) for _ in range(H))

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack([latent @ head.weight.T for head in self.heads], 1)
        return both[..., :N], both[..., N:]

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        content, value = torch.stack([head(latent) for head in self.heads], dim=1).split([N, E], -1)
        return self.attention(self.query(x), torch.cat([content, rotary[:, None].expand(-1, H, -1, -1)], -1), value)
