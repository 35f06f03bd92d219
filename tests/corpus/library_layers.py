"""PyTorch's own layers, which run closed operators."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import MORE, program
from .inputs import HEADS, B, C, S, T, image, tokens, tokens_context, valid_keys
from .references import attend, attend_channels, multihead, split_heads

more = functools.partial(program, MORE, sites=1)


@more(tokens_context)
class MultiheadWithoutWeights(nn.Module):
    """nn.MultiheadAttention, batch first, weights not asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, HEADS, batch_first=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.attention(x, context, context, need_weights=False)[0]

    def reference(self, x: Tensor, context: Tensor) -> Tensor:
        return multihead(self.attention, x, context)


@more(tokens_context)
class MultiheadWithWeights(MultiheadWithoutWeights):
    """The same with weights, averaged over heads, as a second output."""

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, context, context)

    def reference(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        weights, biases = self.attention.in_proj_weight.chunk(3), self.attention.in_proj_bias.chunk(3)
        query = split_heads(F.linear(x, weights[0], biases[0]), HEADS)
        key = split_heads(F.linear(context, weights[1], biases[1]), HEADS)
        everything = torch.eye(T).expand(B, HEADS, T, T)
        return multihead(self.attention, x, context), attend(query, key, everything).mean(1)


@more(lambda rand: (rand(S, B, C), valid_keys(S)))
class MultiheadTokensFirst(nn.Module):
    """nn.MultiheadAttention as it was first: [S, B, C], a padding mask and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, HEADS)

    def forward(self, x_SBC: Tensor, valid_BT: Tensor) -> Tensor:
        future_ST = torch.ones(x_SBC.shape[0], x_SBC.shape[0], dtype=torch.bool).triu(1)
        options = {"key_padding_mask": ~valid_BT, "attn_mask": future_ST, "need_weights": False}
        return self.attention(x_SBC, x_SBC, x_SBC, **options)[0]

    def reference(self, x_SBC: Tensor, valid_BT: Tensor) -> Tensor:
        keep = torch.ones(S, S, dtype=torch.bool).tril() & valid_BT[:, None, None, :]
        x = x_SBC.transpose(0, 1)
        return multihead(self.attention, x, x, mask=keep).transpose(0, 1)


@more(lambda rand: (rand(S, B, C),))
class MultiheadTokensFirstWithWeights(nn.Module):
    """The same without masks, and with the weights of each head as a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, HEADS, dropout=0.1)

    def forward(self, x_SBC: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x_SBC, x_SBC, x_SBC, need_weights=True, average_attn_weights=False)


@more(tokens)
class MultiheadExtraKeys(nn.Module):
    """nn.MultiheadAttention with a learned key and value, and a zero key, behind all others."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, HEADS, add_bias_kv=True, add_zero_attn=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@more(image)
class MultiheadPoolClip(nn.Module):
    """CLIP's pooling: F.multi_head_attention_forward, one query (the mean), separate weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.c = (nn.Linear(C, C) for _ in range(4))
        self.position = nn.Parameter(torch.randn(4 * 6 + 1, C) / C**0.5)

    def prepared(self, x: Tensor) -> Tensor:
        x = x.flatten(start_dim=2).permute(2, 0, 1)
        return torch.cat([x.mean(dim=0, keepdim=True), x], dim=0) + self.position[:, None, :]

    def forward(self, x: Tensor) -> Tensor:
        x = self.prepared(x)
        output, _ = F.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=HEADS,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c.weight,
            out_proj_bias=self.c.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return output.squeeze(0)

    def reference(self, x: Tensor) -> Tensor:
        x = self.prepared(x).transpose(0, 1)
        return self.c(attend_channels(self.q(x[:, :1]), self.k(x), self.v(x), HEADS)).squeeze(1)


@more(tokens)
class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer in evaluation: one closed operator for the whole layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(C, HEADS, 2 * C, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def reference(self, x: Tensor) -> Tensor:
        layer = self.layer
        x = layer.norm1(x + multihead(layer.self_attn, x, x))
        return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))


@more(tokens)
class EncoderLayerNormFirst(nn.Module):
    """The same with an activation that the closed operator does not know, normalised first, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(C, HEADS, 2 * C, activation=F.silu, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, src_mask=mask, is_causal=True)

    def reference(self, x: Tensor) -> Tensor:
        layer = self.layer
        normal = layer.norm1(x)
        x = x + multihead(layer.self_attn, normal, normal, causal=True)
        return x + layer.linear2(F.silu(layer.linear1(layer.norm2(x))))


@program(MORE, tokens_context, sites=2)
class DecoderLayer(nn.Module):
    """nn.TransformerDecoderLayer: self attention, then cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(C, HEADS, 2 * C, batch_first=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.layer(x, context)

    def reference(self, x: Tensor, context: Tensor) -> Tensor:
        layer = self.layer
        x = layer.norm1(x + multihead(layer.self_attn, x, x))
        x = layer.norm2(x + multihead(layer.multihead_attn, x, context))
        return layer.norm3(x + layer.linear2(layer.linear1(x).relu()))
