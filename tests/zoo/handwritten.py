"""Models as people write them without a library: minimal GPT, einops, and the transformer of torch.nn."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, einsum, nn


class CausalSelfAttention(nn.Module):
    """One linear for q, k and v, a triangular buffer, masked_fill and softmax."""

    bias: Tensor

    def __init__(self, width: int, heads: int, block: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attn_dropout = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        out: Tensor = self.c_proj(y)
        return out


class Block(nn.Module):
    """Norm, attention, norm, feed-forward, both with a residual."""

    def __init__(self, width: int, heads: int, block: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, block)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 56), nn.GELU(), nn.Linear(56, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class NanoGPT(nn.Module):
    """A GPT in the style of minimal teaching repositories."""

    def __init__(
        self, vocabulary: int = 131, width: int = 32, heads: int = 4, layers: int = 2, block: int = 24
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(block, width)
        self.h = nn.ModuleList(Block(width, heads, block) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        out: Tensor = self.lm_head(self.ln_f(x))
        return out


class EinopsAttention(nn.Module):
    """Grouped heads and cross attention with rearrange and einsum, padding by a boolean mask."""

    def __init__(self, width: int, heads: int, key_heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.groups, self.scale = heads, heads // key_heads, head_width**-0.5
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * key_heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        kv = x if context is None else context
        k, v = rearrange(self.to_kv(kv), "b n (two h d) -> two b h n d", two=2, h=self.heads // self.groups)
        k, v = (repeat(t, "b h n d -> b (h g) n d", g=self.groups) for t in (k, v))
        sim = einsum("b h i d, b h j d -> b h i j", q * self.scale, k)
        if mask is not None:
            sim = sim.masked_fill(~rearrange(mask, "b j -> b 1 1 j"), -torch.finfo(sim.dtype).max)
        attn = (sim - sim.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        heads = einsum("b h i j, b h j d -> b h i d", attn, v)
        out: Tensor = self.to_out(rearrange(heads, "b h n d -> b n (h d)"))
        return out


class EinopsTransformer(nn.Module):
    """Self and cross attention in turns over continuous inputs."""

    def __init__(
        self, width: int = 32, heads: int = 4, key_heads: int = 2, head_width: int = 10, layers: int = 2
    ) -> None:
        super().__init__()
        attention = (width, heads, key_heads, head_width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.selves = nn.ModuleList(EinopsAttention(*attention) for _ in range(layers))
        self.crosses = nn.ModuleList(EinopsAttention(*attention) for _ in range(layers))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        norms = iter(self.norms)
        for own, cross in zip(self.selves, self.crosses, strict=True):
            x = own(next(norms)(x)) + x
            x = cross(next(norms)(x), context=context, mask=mask) + x
        return x


class TorchTransformer(nn.Module):
    """`torch.nn.Transformer` with a causal target mask and a padded source."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.transformer = nn.Transformer(width, heads, layers, layers, 56, batch_first=True, norm_first=True)

    def forward(self, src: Tensor, tgt: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tgt.size(1), device=tgt.device, dtype=tgt.dtype)
        out: Tensor = self.transformer(
            src,
            tgt,
            tgt_mask=causal,
            src_key_padding_mask=src_key_padding_mask,
            memory_key_padding_mask=src_key_padding_mask,
            tgt_is_causal=True,
        )
        return out
