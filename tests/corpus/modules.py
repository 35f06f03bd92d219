"""Whole attention layers, as published models write them, with their weights."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import MORE, program
from .inputs import HEADS, B, C, D, S, image, tokens, tokens_context, valid_keys
from .references import attend, attend_channels, attend_channels_first, merge_heads, split_heads

more = functools.partial(program, MORE, sites=1)


@more(tokens)
class CausalNanogpt(nn.Module):
    """nanoGPT without the library call: a registered buffer of ones, dropout of probability 0.1 in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(b, t, HEADS, c // HEADS).transpose(1, 2)
        q = q.view(b, t, HEADS, c // HEADS).transpose(1, 2)
        v = v.view(b, t, HEADS, c // HEADS).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.dropout(F.softmax(att, dim=-1))
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(b, t, c))

    def reference(self, x: Tensor) -> Tensor:
        return self.c_proj(attend_channels(*self.c_attn(x).chunk(3, -1), HEADS, causal=True))


class Projections(nn.Module):
    """Four linear layers, and the definition that every layer below is compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))

    def reference(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        return self.o(attend_channels(self.q(x), self.k(source), self.v(source), HEADS))


@more(tokens)
class ProjectedBert(Projections):
    """BERT: view and permute in a helper, division, additive zeros as a mask, tuple of sizes for the last view."""

    def forward(self, x: Tensor) -> Tensor:
        def transpose_for_scores(y: Tensor) -> Tensor:
            return y.view(*y.size()[:-1], HEADS, D).permute(0, 2, 1, 3)

        query, key, value = (transpose_for_scores(layer(x)) for layer in (self.q, self.k, self.v))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(D)
        probabilities = nn.functional.softmax(scores + torch.zeros(x.size(0), 1, 1, x.size(1)), dim=-1)
        context = torch.matmul(probabilities, value).permute(0, 2, 1, 3).contiguous()
        return self.o(context.view(*context.size()[:-2], C))


@more(tokens_context)
class ProjectedDiffusers(Projections):
    """diffusers before the library call: heads go to the batch, baddbmm without a mask; cross attention."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def head_to_batch(y: Tensor) -> Tensor:
            b, s, c = y.shape
            return y.reshape(b, s, HEADS, c // HEADS).permute(0, 2, 1, 3).reshape(b * HEADS, s, c // HEADS)

        query, key, value = (head_to_batch(y) for y in (self.q(x), self.k(context), self.v(context)))
        empty = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device)
        scores = torch.baddbmm(empty, query, key.transpose(-1, -2), beta=0, alpha=D**-0.5)
        output = torch.bmm(scores.softmax(dim=-1).to(value.dtype), value)
        output = output.reshape(-1, HEADS, x.shape[1], D).permute(0, 2, 1, 3)
        return self.o(output.reshape(-1, x.shape[1], C))


@more(tokens_context)
class ProjectedPerHead(Projections):
    """The original paper as annotated code: layers and inputs zipped, view(b, -1, heads, width); cross attention."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        pairs = zip((self.q, self.k, self.v), (x, context, context), strict=True)
        query, key, value = [layer(y).view(y.size(0), -1, HEADS, D).transpose(1, 2) for layer, y in pairs]
        p_attn = (torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))).softmax(dim=-1)
        y = torch.matmul(p_attn, value)
        return self.o(y.transpose(1, 2).contiguous().view(x.size(0), -1, HEADS * D))


@more(lambda rand: (rand(S, B, C), valid_keys(S)))
class ProjectedFairseq(Projections):
    """fairseq: tokens first, heads fold into the batch, unfolded only to fill the padding, softmax in float32."""

    def forward(self, x_SBC: Tensor, valid_BT: Tensor) -> Tensor:
        tgt_len, bsz, embed_dim = x_SBC.size()
        q = self.q(x_SBC) * D**-0.5
        q = q.contiguous().view(tgt_len, bsz * HEADS, D).transpose(0, 1)
        k = self.k(x_SBC).contiguous().view(-1, bsz * HEADS, D).transpose(0, 1)
        v = self.v(x_SBC).contiguous().view(-1, bsz * HEADS, D).transpose(0, 1)
        weights = torch.bmm(q, k.transpose(1, 2)).view(bsz, HEADS, tgt_len, -1)
        weights = weights.masked_fill(~valid_BT.unsqueeze(1).unsqueeze(2).to(torch.bool), float("-inf"))
        weights = F.softmax(weights.view(bsz * HEADS, tgt_len, -1), dim=-1, dtype=torch.float32).type_as(weights)
        attn = torch.bmm(weights, v)
        return self.o(attn.transpose(0, 1).contiguous().view(tgt_len, bsz, embed_dim))

    def reference(self, x_SBC: Tensor, valid_BT: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(x_SBC).transpose(0, 1), HEADS) for layer in (self.q, self.k, self.v))
        return self.o(merge_heads(attend(q, k, v, valid_BT[:, None, None, :]))).transpose(0, 1)


@more(tokens)
class ProjectedParallelGptj(Projections):
    """GPT-J: the buffer's causal slice with torch.where and a tensor for the lowest float, beside a parallel MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))
        self.register_buffer("causal", torch.tril(torch.ones(32, 32, dtype=torch.bool)).view(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).view(*x.shape[:2], HEADS, D).permute(0, 2, 1, 3) for layer in (self.q, self.k, self.v)
        )
        causal = self.causal[:, :, key.size(-2) - query.size(-2) : key.size(-2), : key.size(-2)]
        weights = torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(-1, -2))
        lowest = torch.tensor(torch.finfo(weights.dtype).min, dtype=weights.dtype).to(weights.device)
        weights = torch.where(causal, weights, lowest) / torch.sqrt(torch.tensor(D, dtype=torch.float32))
        weights = nn.functional.softmax(weights, dim=-1).to(value.dtype)
        output = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        return self.o(output.view(*output.shape[:-2], C)) + self.mlp(x) + x

    def reference(self, x: Tensor) -> Tensor:
        return self.o(attend_channels(self.q(x), self.k(x), self.v(x), HEADS, causal=True)) + self.mlp(x) + x


@more(image)
class ConvolutionalNonLocal(nn.Module):
    """Non-local networks: 1x1 convolutions, views to tokens, no scale, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(C, C // 2, 1) for _ in range(3))
        self.out = nn.Conv2d(C // 2, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        g_x = self.g(x).view(batch, C // 2, -1).permute(0, 2, 1)
        theta_x = self.theta(x).view(batch, C // 2, -1).permute(0, 2, 1)
        phi_x = self.phi(x).view(batch, C // 2, -1)
        f_div = F.softmax(torch.matmul(theta_x, phi_x), dim=-1)
        y = torch.matmul(f_div, g_x).permute(0, 2, 1).contiguous()
        return self.out(y.view(batch, C // 2, *x.size()[2:])) + x

    def reference(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        return self.out(attend_channels_first(query, key, value, scale=1.0).view(B, C // 2, *x.shape[2:])) + x


@more(image)
class ConvolutionalReduced(nn.Module):
    """PVT, SegFormer: keys and values come from an image that a strided convolution made smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(C, C, 2, stride=2)
        self.q, self.kv, self.norm = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        x_BSC = x.flatten(2).transpose(1, 2)
        query = self.q(x_BSC).reshape(x.shape[0], -1, HEADS, D).permute(0, 2, 1, 3)
        small = self.norm(self.reduce(x).reshape(x.shape[0], C, -1).permute(0, 2, 1))
        key, value = self.kv(small).reshape(x.shape[0], -1, 2, HEADS, D).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((query @ key.transpose(-2, -1)) * D**-0.5).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).reshape(x_BSC.shape)

    def reference(self, x: Tensor) -> Tensor:
        small = self.norm(self.reduce(x).flatten(2).mT)
        return attend_channels(self.q(x.flatten(2).mT), *self.kv(small).chunk(2, -1), HEADS)


@more(image)
class WindowedSwin(nn.Module):
    """Swin, shifted: roll, windows into the batch, a table of relative biases, a mask for each window, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.table = nn.Parameter(torch.randn(9, HEADS))
        y, x = torch.arange(4) // 2, torch.arange(4) % 2
        self.register_buffer("index", (y[:, None] - y + 1) * 3 + x[:, None] - x + 1)
        region = torch.zeros(4, 6)
        region[3:], region[:, 5:] = 1, region[:, 5:] + 2
        region = region.view(2, 2, 3, 2).permute(0, 2, 1, 3).reshape(6, 4)
        self.register_buffer("mask", (region[:, None] != region[:, :, None]) * -100.0)

    def windows(self, x: Tensor) -> Tensor:
        """[B, C, 4, 6] -> [B * 6 windows, 4 tokens, C]."""
        x = torch.roll(x.permute(0, 2, 3, 1), (-1, -1), (1, 2))
        return x.reshape(-1, 2, 2, 3, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, C)

    def image(self, x: Tensor) -> Tensor:
        x = x.view(-1, 2, 3, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6, C)
        return torch.roll(x, (1, 1), (1, 2)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.windows(x))
        n = qkv.shape[1]
        q, k, v = qkv.reshape(-1, n, 3, HEADS, D).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * D**-0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        attn = attn.view(-1, 6, HEADS, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, HEADS, n, n).softmax(-1)
        return self.image((attn @ v).transpose(1, 2).reshape(-1, n, C))

    def reference(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(y, HEADS) for y in self.qkv(self.windows(x)).chunk(3, -1))
        bias = self.table[self.index].permute(2, 0, 1) + self.mask.repeat(B, 1, 1)[:, None]
        return self.image(merge_heads(attend(q, k, v, bias)))
