"""Latent attention in which the latent, the queries, the masks or the softmax are what differs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .latent_attention import (
    BOTH,
    SCALE,
    C,
    E,
    H,
    HeadWeights,
    L,
    Layer,
    N,
    R,
    S,
    TwoLinears,
    expanded,
    hidden,
    joined,
    latent,
    padded,
    rope,
)
from .references import attend, merge_heads

# ---------------------------------------------------------------- how the latent is made


@expanded("what makes the latent does not matter")
class MlaLayerNorm(Layer):
    """A layer norm on the latent, and a bias in the down projection."""

    down_bias = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(L)

    def forward(self, x: Tensor) -> Tensor:
        return joined(self, self.query(x), *self.latent(x))


@expanded("what makes the latent does not matter")
class MlaWithoutNorm(Layer):
    """Nothing between down and up: a factorised projection, as converted models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return joined(self, self.query(x), *self.latent(x))


@expanded("an activation before the up projection belongs to the making of the latent")
class MlaActivatedLatent(Layer):
    """SiLU on the latent: keys and values are linear in what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return joined(self, self.query(x), *self.latent(x))


@expanded("queries may have a latent of their own")
class MlaQueryLatent(Layer):
    """DeepSeek-V3: the queries come from a normalised latent too."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Sequential(nn.Linear(C, 16, bias=False), nn.RMSNorm(16), nn.Linear(16, H * (N + R), bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return joined(self, self.query(x), *self.latent(x))


@expanded("one linear layer makes three things, one of which is the latent")
class MlaFusedDown(Layer):
    """MiniCPM and vLLM: query latent, latent and rotary key are cut from one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.q, self.q_norm = (
            nn.Linear(C, 16 + L + R, bias=False),
            nn.Linear(16, H * (N + R)),
            nn.RMSNorm(16),
        )

    def reference(self, x: Tensor) -> Tensor:
        mixed = x @ self.down.weight.T
        query = self.q(self.q_norm(mixed[..., :16])).unflatten(-1, (H, -1)).transpose(1, 2)
        query = torch.cat([query[..., :N], rope(query[..., N:])], -1)
        key, value = self.key_value(self.norm(mixed[..., 16:-R]), rope(mixed[..., -R:]))
        return self.o(merge_heads(attend(query, key, value, hidden(x.shape[1]))))

    def forward(self, x: Tensor) -> Tensor:
        query, latent, rotary = self.down(x).split([16, L, R], dim=-1)
        content, position = self.q(self.q_norm(query)).unflatten(-1, (H, -1)).transpose(1, 2).split([N, R], -1)
        return joined(self, torch.cat([content, rope(position)], -1), self.norm(latent), rope(rotary))


@expanded("the bias of a key is the same for every key and cancels; that of a value is added behind")
class MlaBiases(Layer):
    """Biases in the down and in the up projection."""

    down_bias = up_bias = True

    def forward(self, x: Tensor) -> Tensor:
        return joined(self, self.query(x), *self.latent(x))


@expanded("a number times the latent is a number times the weights")
class MlaScaledLatent(Layer):
    """LongCat: latents are scaled after their norm, queries too."""

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return super().query(x, start) * (C / 16) ** 0.5

    def latent(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        latent, rotary = super().latent(x, start)
        return latent * (C / L) ** 0.5, rotary

    def forward(self, x: Tensor) -> Tensor:
        return joined(self, self.query(x), *self.latent(x))


@expanded("a norm in another precision belongs to the making of the latent")
class MlaNormSpelledOut(Layer):
    """The norm by its formula in float64, its weight multiplied after the cast back."""

    def latent(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        latent, rotary = self.down(x).split([L, R], -1)
        wide = latent.double()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.norm.weight * wide.to(latent.dtype), rope(rotary, start)

    def forward(self, x: Tensor) -> Tensor:
        return joined(self, self.query(x), *self.latent(x))


@expanded("one latent, an up projection of its own for each of two layers", sites=2)
class MlaSharedLatent(Layer):
    """Two attentions over one latent: the second has queries made of the output of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(L, BOTH, bias=False)

    def reference(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        for weight in (self.up.weight, self.second.weight):
            both = torch.stack([latent @ part.T for part in weight.chunk(H)], 1)
            key = torch.cat([both[..., :N], rotary[:, None].expand(-1, H, -1, -1)], -1)
            x = self.o(merge_heads(attend(self.query(x), key, both[..., N:], hidden(x.shape[1]))))
        return x

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        for up in (self.up, self.second):
            key, value = up(latent).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
            key = torch.cat([key, rotary.unsqueeze(1).expand(-1, H, -1, -1)], -1)
            x = self.attention(self.query(x), key, value)
        return x


@expanded("two latents, each for half of the heads", expanded=None)
class MlaGroupedLatents(HeadWeights):
    """GLA: every two heads have a latent of their own; the weights have an axis of latents."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(C, 2 * L + R, bias=False)

    def latent(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        latent, rotary = self.down(x).split([2 * L, R], -1)
        return self.norm(latent.unflatten(-1, (2, L))), rope(rotary, start)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        latent_BHTL = latent.transpose(1, 2).repeat_interleave(2, 1)
        return latent_BHTL @ self.key_HNL.mT, latent_BHTL @ self.value_HEL.mT

    def forward(self, x: Tensor) -> Tensor:
        latent_BTGL, rotary = self.latent(x)
        key_BTGHN = torch.einsum("btgl,ghnl->btghn", latent_BTGL, self.key_HNL.unflatten(0, (2, 2)))
        value_BTGHE = torch.einsum("btgl,ghel->btghe", latent_BTGL, self.value_HEL.unflatten(0, (2, 2)))
        key = torch.cat([key_BTGHN.flatten(2, 3), rotary[:, :, None].expand(-1, -1, H, -1)], -1)
        return self.attention(self.query(x), key.transpose(1, 2), value_BTGHE.flatten(2, 3).transpose(1, 2))


# ---------------------------------------------------------------- masks, softmaxes and scales


@expanded("how the softmax is written does not matter", maker=padded)
class MlaSoftmaxByHand(Layer):
    """Exponentials of the scores less their maximum, over their sum; a mask of booleans with padding."""

    def reference(self, x: Tensor, valid_BT: Tensor) -> Tensor:
        mask = (valid_BT[:, None, None] & ~hidden(S).isinf()) | torch.eye(S, dtype=torch.bool)
        return super().reference(x, mask=mask)

    def forward(self, x: Tensor, valid_BT: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key, value = self.up(latent).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        key = torch.cat([key, rotary.unsqueeze(1).expand(-1, H, -1, -1)], -1)
        seen = (valid_BT[:, None, None] & torch.ones(S, S, dtype=torch.bool).tril()) | torch.eye(S, dtype=torch.bool)
        scores = (self.query(x) @ key.mT * SCALE).masked_fill(~seen, torch.finfo(x.dtype).min)
        exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
        output = exponentials / exponentials.sum(-1, keepdim=True) @ value
        return self.o(output.transpose(1, 2).flatten(2))


@expanded("a mask of booleans hides what a mask hides", maker=padded)
class MlaPaddingMask(Layer):
    """The library call with a mask of booleans made of padding and order; one cell of every row stays open."""

    def reference(self, x: Tensor, valid_BT: Tensor) -> Tensor:
        mask = (valid_BT[:, None, None] & ~hidden(S).isinf()) | torch.eye(S, dtype=torch.bool)
        return super().reference(x, mask=mask)

    def forward(self, x: Tensor, valid_BT: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key, value = self.up(latent).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        key = torch.cat([key, rotary.unsqueeze(1).expand(-1, H, -1, -1)], -1)
        index = torch.arange(x.shape[1])
        seen = (valid_BT[:, None, None] & (index <= index[:, None])) | (index == index[:, None])
        return self.o(merge_heads(F.scaled_dot_product_attention(self.query(x), key, value, attn_mask=seen)))


class Sinks(Layer):
    """A learned logit of each head takes part in the softmax and has no value."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(H))

    def with_sinks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The definition: one more key, whose score is the sink and whose value is zero."""
        scores = query.double() @ key.double().mT * SCALE + hidden(query.shape[2], key.shape[2])
        total = scores.exp().sum(-1, keepdim=True) + self.sinks.double().exp()[:, None, None]
        return self.o(merge_heads((scores.exp() / total @ value.double()).to(value.dtype)))

    def reference(self, x: Tensor) -> Tensor:
        return self.with_sinks(self.query(x), *self.key_value(*self.latent(x)))

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key, value = self.up(latent).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        key = torch.cat([key, rotary.unsqueeze(1).expand(-1, H, -1, -1)], -1)
        scores = self.query(x) @ key.mT * SCALE + hidden(x.shape[1])
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        return self.o((weights @ value).transpose(1, 2).flatten(2))


@expanded("sinks change the weights, not what is linear")
class MlaSinks(Sinks):
    """Sinks concatenated to the scores, as in gpt-oss."""


@expanded("the bias of a key is one more column, which does not cancel beside a sink")
class MlaSinksAndBiases(Sinks):
    """The same with a bias in the up projection."""

    up_bias = True


@expanded("a soft cap is between scores and softmax")
class MlaSoftCap(TwoLinears):
    """The scores are capped by a hyperbolic tangent before the mask."""

    def reference(self, x: Tensor) -> Tensor:
        key, value = self.key_value(*self.latent(x))
        scores = 5.0 * torch.tanh(self.query(x).double() @ key.double().mT * SCALE / 5.0) + hidden(x.shape[1])
        return self.o(merge_heads((scores.softmax(-1) @ value.double()).to(value.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = torch.cat([self.k_up(latent).unflatten(-1, (H, N)), rotary[:, :, None].expand(-1, -1, H, -1)], -1)
        scores = torch.matmul(self.query(x), key.permute(0, 2, 3, 1)) * SCALE
        scores = torch.tanh(scores / 5.0) * 5.0 + hidden(x.shape[1])
        value = self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2)
        return self.o(merge_heads(scores.softmax(-1) @ value))


@expanded("the scale is not that of the width, and stays what it is")
class MlaYarn(Layer):
    """YaRN: the scale of the scores is multiplied by the square of a number made of the factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling = SCALE * (0.1 * 0.7 * math.log(40.0) + 1.0) ** 2

    def reference(self, x: Tensor) -> Tensor:
        return super().reference(x, scale=self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key, value = self.up(latent).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        key = torch.cat([key, rotary.unsqueeze(1).expand(-1, H, -1, -1)], -1)
        output = F.scaled_dot_product_attention(self.query(x), key, value, is_causal=True, scale=self.scaling)
        return self.o(merge_heads(output))


@expanded("values may be wider than keys", expanded=H * (N + 10))
class MlaWideValues(Layer):
    """Values of width 10 beside keys of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.o = nn.Linear(L, H * (N + 10), bias=False), nn.Linear(H * 10, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key, value = self.up(latent).unflatten(-1, (H, -1)).transpose(1, 2).split([N, 10], -1)
        key = torch.cat([key, rotary.unsqueeze(1).expand(-1, H, -1, -1)], -1)
        return self.attention(self.query(x), key, value)


@latent("absorbed", "none", "nothing is expanded", expanded=None)
class MlaAbsorbed(HeadWeights):
    """DeepSeek inference, absorb: weights of every head on both sides of an attention over the latent."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        content, position = self.query(x).split([N, R], -1)
        query_BHSL = torch.einsum("bhsn,hnl->bhsl", content, self.key_HNL)
        scores = torch.einsum("bhsl,btl->bhst", query_BHSL, latent) + torch.einsum("bhsr,btr->bhst", position, rotary)
        weights = (scores * SCALE + hidden(x.shape[1])).softmax(-1)
        mixed_BHSL = torch.einsum("bhst,btl->bhsl", weights, latent)
        return self.o(torch.einsum("bhsl,hel->bshe", mixed_BHSL, self.value_HEL).flatten(2))


@latent("absorbed", "none", "nothing is expanded", expanded=None)
class MlaAbsorbedCall(Layer):
    """The same from one weight for both, with one key of latent and rotary part and the library call."""

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        content, position = self.query(x).split([N, R], -1)
        key_HNL, value_HEL = self.up.weight.view(H, N + E, L).split([N, E], 1)
        query = torch.cat([torch.matmul(content, key_HNL), position], -1)
        key = torch.cat([latent, rotary], -1)[:, None]
        mixed = F.scaled_dot_product_attention(
            query, key, latent[:, None], is_causal=True, scale=SCALE, enable_gqa=True
        )
        return self.o(merge_heads(mixed @ value_HEL.mT))
