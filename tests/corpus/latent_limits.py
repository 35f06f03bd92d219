"""Latents of which only keys or only values can stay in the latent, or neither: the limits of absorption."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .latent_attention import BOTH, C, E, H, L, Layer, N, R, TwoLinears, hidden, joined, latent, rope
from .references import attend, merge_heads


class Parts(TwoLinears):
    """Layers that differ in how keys and values are made of latent and rotary part."""

    def key_value(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def heads(self, x: Tensor, width: int) -> Tensor:
        return x.unflatten(-1, (H, width)).transpose(1, 2)


def beside(key: Tensor, rotary: Tensor) -> Tensor:
    """The rotary part beside the keys of every head."""
    return torch.cat([key, rotary[:, None].expand(-1, H, -1, -1)], -1)


@latent("expanded", "value only", "keys are rotated after the expansion, by their position")
class MlaRotatedKeys(TwoLinears):
    """All of the key is expanded from the latent, then rotated: a converted model that keeps its positions."""

    rotary = 0

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return rope(self.q(x).unflatten(-1, (H, -1)).transpose(1, 2), start)

    def key_value(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.expand(latent)
        return rope(key), value

    def forward(self, x: Tensor) -> Tensor:
        latent = self.norm(self.down(x))
        key = rope(self.k_up(latent).unflatten(-1, (H, N)).transpose(1, 2))
        return self.attention(self.query(x), key, self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2))


@latent("expanded", "value only", "a part of the key is rotated after the expansion", expanded=H * (N + R + E))
class MlaPartlyRotatedKeys(Layer):
    """The rotary part of every head comes from the latent as well."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(C, L, bias=False), nn.Linear(L, H * (N + R + E), bias=False)

    def reference(self, x: Tensor) -> Tensor:
        latent = self.norm(self.down(x))
        both = torch.stack([latent @ weight.T for weight in self.up.weight.chunk(H)], 1)
        key = torch.cat([both[..., :N], rope(both[..., N : N + R])], -1)
        return self.o(merge_heads(attend(self.query(x), key, both[..., N + R :], hidden(x.shape[1]))))

    def forward(self, x: Tensor) -> Tensor:
        both = self.up(self.norm(self.down(x))).unflatten(-1, (H, -1)).transpose(1, 2)
        content, position, value = both.split([N, R, E], -1)
        return self.attention(self.query(x), torch.cat([content, rope(position)], -1), value)


@latent("expanded", "value only", "keys are normalised after the expansion")
class MlaNormedKeys(TwoLinears):
    """A norm on the keys of every head."""

    def __init__(self) -> None:
        super().__init__()
        self.k_norm = nn.RMSNorm(N)

    def key_value(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.expand(latent)
        return beside(self.k_norm(key), rotary), value

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = self.k_norm(self.k_up(latent).unflatten(-1, (H, N))).transpose(1, 2)
        value = self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2)
        return self.attention(self.query(x), beside(key, rotary), value)


@latent("expanded", "value only", "keys are normalised over all heads after the expansion")
class MlaNormedAllKeys(TwoLinears):
    """A norm on the keys of all heads together, before there are heads."""

    def __init__(self) -> None:
        super().__init__()
        self.k_norm = nn.RMSNorm(H * N)

    def key_value(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.expand(latent)
        key = self.k_norm(key.transpose(1, 2).flatten(2)).unflatten(-1, (H, N)).transpose(1, 2)
        return beside(key, rotary), value

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = self.k_norm(self.k_up(latent)).view(*x.shape[:2], H, N).transpose(1, 2)
        value = self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2)
        return self.attention(self.query(x), beside(key, rotary), value)


@latent("expanded", "none", "an activation follows the expansion")
class MlaActivatedExpansion(Layer):
    """SiLU on keys and values."""

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().expand(latent)
        return F.silu(key), F.silu(value)

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key, value = F.silu(self.up(latent)).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        return self.attention(self.query(x), beside(key, rotary), value)


@latent("expanded", "key only", "an activation follows the expansion of the values")
class MlaActivatedValues(TwoLinears):
    """SiLU on values alone."""

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().expand(latent)
        return key, F.silu(value)

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = self.k_up(latent).unflatten(-1, (H, N)).transpose(1, 2)
        value = F.silu(self.v_up(latent)).unflatten(-1, (H, E)).transpose(1, 2)
        return self.attention(self.query(x), beside(key, rotary), value)


@latent(None, "none", "every token has a matrix of its own")
class MlaWeightsOfTokens(Layer):
    """The up projection is a sum of two, each weighed by a gate of the token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up_ZDL = nn.Linear(C, 2), nn.Parameter(torch.randn(2, BOTH, L) / 3)

    def reference(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        gates = self.gate(x).sigmoid()
        both = sum(gates[..., z, None] * (latent @ self.up_ZDL[z].T) for z in range(2))
        key, value = both.unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        return self.o(merge_heads(attend(self.query(x), beside(key, rotary), value, hidden(x.shape[1]))))

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        weight_BTDL = torch.einsum("btz,zdl->btdl", self.gate(x).sigmoid(), self.up_ZDL)
        both = torch.einsum("btl,btdl->btd", latent, weight_BTDL)
        key, value = both.unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        return self.attention(self.query(x), beside(key, rotary), value)


@latent(None, "none", "every token has a gate of its own behind the expansion")
class MlaGatedByToken(Layer):
    """EG-MLA: what is expanded is multiplied by a gate that belongs to the token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(C, BOTH)

    def reference(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        both = torch.stack([latent @ weight.T for weight in self.up.weight.chunk(H)], 1)
        both = both * self.gate(x).unflatten(-1, (H, -1)).transpose(1, 2)
        key, value = both.split([N, E], -1)
        return self.o(merge_heads(attend(self.query(x), beside(key, rotary), value, hidden(x.shape[1]))))

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        both = self.up(latent) * self.gate(x)
        key, value = both.unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        return self.attention(self.query(x), beside(key, rotary), value)


@latent(None, "value only", "keys have an addend that depends on the token")
class MlaKeysWithPositions(TwoLinears):
    """A learned vector for each position and head is added to the keys."""

    rotary = 0

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16, H * N))

    def key_value(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.expand(latent)
        return key + self.positions[: key.shape[2]].unflatten(-1, (H, N)).transpose(0, 1), value

    def forward(self, x: Tensor) -> Tensor:
        latent = self.norm(self.down(x))
        key = (self.k_up(latent) + self.positions[: x.shape[1]]).unflatten(-1, (H, N)).transpose(1, 2)
        return self.attention(self.query(x), key, self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2))


@latent(None, "value only", "keys are mixed over tokens after the expansion")
class MlaConvolvedKeys(TwoLinears):
    """A causal convolution over the tokens of every channel of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(H * N, H * N, 3, padding=2, groups=H * N, bias=False)

    def key_value(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.expand(latent)
        key = F.pad(key.transpose(1, 2).flatten(2), (0, 0, 2, 0))
        key = sum(key[:, n : n + latent.shape[1]] * self.conv.weight[:, 0, n] for n in range(3))
        return beside(key.unflatten(-1, (H, N)).transpose(1, 2), rotary), value

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = self.conv(self.k_up(latent).mT)[..., : x.shape[1]].mT
        value = self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2)
        return self.attention(self.query(x), beside(key.unflatten(-1, (H, N)).transpose(1, 2), rotary), value)


@latent(None, "both", "keys and values have a latent each; either can stay in its own", width=L, expanded=None)
class MlaTwoLatents(TwoLinears):
    """Palu without positions: the projections of keys and of values are factorised apart."""

    rotary = 0

    def __init__(self) -> None:
        super().__init__()
        self.down, self.v_down = nn.Linear(C, L, bias=False), nn.Linear(C, L, bias=False)

    def reference(self, x: Tensor) -> Tensor:
        key, value = self.expand(self.down(x))[0], self.expand(self.v_down(x))[1]
        return self.o(merge_heads(attend(self.query(x), key, value, hidden(x.shape[1]))))

    def forward(self, x: Tensor) -> Tensor:
        key = self.k_up(self.down(x)).unflatten(-1, (H, N)).transpose(1, 2)
        value = self.v_up(self.v_down(x)).unflatten(-1, (H, E)).transpose(1, 2)
        return self.attention(self.query(x), key, value)


@latent(None, "value only", "keys are rotated, values have a latent of their own", expanded=None)
class MlaTwoLatentsRotated(MlaTwoLatents):
    """Palu with positions: keys are rotated after their expansion."""

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return rope(super().query(x))

    def reference(self, x: Tensor) -> Tensor:
        key, value = rope(self.expand(self.down(x))[0]), self.expand(self.v_down(x))[1]
        return self.o(merge_heads(attend(self.query(x), key, value, hidden(x.shape[1]))))

    def forward(self, x: Tensor) -> Tensor:
        key = rope(self.k_up(self.down(x)).unflatten(-1, (H, N)).transpose(1, 2))
        value = self.v_up(self.v_down(x)).unflatten(-1, (H, E)).transpose(1, 2)
        return self.attention(self.query(x), key, value)


@latent(None, "value only", "keys are projected from the activations", expanded=None)
class MlaValuesOnly(TwoLinears):
    """Only values come from a latent."""

    rotary = 0

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(C, H * N, bias=False)

    def reference(self, x: Tensor) -> Tensor:
        key = torch.stack([x @ weight.T for weight in self.k.weight.chunk(H)], 1)
        value = self.expand(self.norm(self.down(x)))[1]
        return self.o(merge_heads(attend(self.query(x), key, value, hidden(x.shape[1]))))

    def forward(self, x: Tensor) -> Tensor:
        key = self.k(x).unflatten(-1, (H, N)).transpose(1, 2)
        value = self.v_up(self.norm(self.down(x))).unflatten(-1, (H, E)).transpose(1, 2)
        return self.attention(self.query(x), key, value)


@latent(None, "key only", "values are projected from the activations", expanded=None)
class MlaKeysOnly(TwoLinears):
    """Only keys come from a latent, beside a rotary part."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(C, H * E, bias=False)

    def reference(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        value = torch.stack([x @ weight.T for weight in self.v.weight.chunk(H)], 1)
        key = beside(self.expand(latent)[0], rotary)
        return self.o(merge_heads(attend(self.query(x), key, value, hidden(x.shape[1]))))

    def forward(self, x: Tensor) -> Tensor:
        latent, rotary = self.latent(x)
        key = beside(self.k_up(latent).unflatten(-1, (H, N)).transpose(1, 2), rotary)
        return self.attention(self.query(x), key, self.v(x).unflatten(-1, (H, E)).transpose(1, 2))


@latent(None, "none", "the latent is as wide as keys and values together", width=BOTH)
class MlaFullRank(Layer):
    """What lies between down and up is not narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Linear(C, BOTH + R, bias=False), nn.RMSNorm(BOTH)
        self.up = nn.Linear(BOTH, BOTH, bias=False)

    def latent(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        latent, rotary = self.down(x).split([BOTH, R], -1)
        return self.norm(latent), rope(rotary, start)

    def forward(self, x: Tensor) -> Tensor:
        return joined(self, self.query(x), *self.latent(x))


@latent(None, "none", "the activations themselves are narrower than keys and values together, and no latent", width=C)
class MlaPlainAttention(Layer):
    """Plain attention: keys and values are projected from the activations, which are narrower than both."""

    rotary = 0

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(C, BOTH, bias=False)

    def reference(self, x: Tensor) -> Tensor:
        key, value = self.expand(x)
        return self.o(merge_heads(attend(self.query(x), key, value, hidden(x.shape[1]))))

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.up(x).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        return self.attention(self.query(x), key, value)
