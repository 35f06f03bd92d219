"""Latent attention with a cache: of the latent, joined or apart, and of what was expanded from it."""

from __future__ import annotations

import torch
from torch import Tensor

from .latent_attention import (
    OLD,
    SCALE,
    E,
    H,
    L,
    Layer,
    N,
    R,
    TwoLinears,
    cached,
    hidden,
    joined,
    latent,
    rope,
    step,
    step_expanded,
    step_joint,
    step_position,
    step_raw,
)
from .references import attend, merge_heads


@cached("a cache of latents, expanded in every step", maker=step)
class MlaCacheConcatenated(Layer):
    """Latent and rotary key are concatenated with what two caches hold."""

    def forward(self, x: Tensor, latent_BTL: Tensor, key_BTR: Tensor) -> Tensor:
        latent, rotary = self.latent(x, OLD)
        latent, rotary = torch.cat([latent_BTL, latent], dim=1), torch.cat([key_BTR, rotary], dim=1)
        return joined(self, self.query(x, OLD), latent, rotary)


@cached("a cache of latents, expanded in every step", maker=step)
class MlaCacheFourAxes(TwoLinears):
    """The cache has an axis of one head, as the classes of transformers ask for; tokens are the last but one."""

    def forward(self, x: Tensor, latent_BTL: Tensor, key_BTR: Tensor) -> Tensor:
        latent, rotary = self.latent(x, OLD)
        latent_B1TL = torch.cat([latent_BTL.unsqueeze(1), latent.unsqueeze(1)], dim=-2)
        key_B1TR = torch.cat([key_BTR.unsqueeze(1), rotary.unsqueeze(1)], dim=-2)
        b, _, t, _ = latent_B1TL.shape
        key = self.k_up(latent_B1TL).view(b, t, H, N).transpose(1, 2)
        value = self.v_up(latent_B1TL).view(b, t, H, E).transpose(1, 2)
        return self.attention(self.query(x, OLD), torch.cat([key, key_B1TR.expand(-1, H, -1, -1)], -1), value)


def written(layer: Layer, x: Tensor, latent: Tensor, rotary: Tensor, position: Tensor) -> Tensor:
    """All of a buffer is read, the mask hides what is empty."""
    mask = torch.where(torch.arange(latent.shape[1]) <= position[:, None], 0.0, float("-inf"))
    return joined(layer, layer.query(x, OLD), latent, rotary, mask)


class CacheWithRoom(Layer):
    """What a buffer with room holds after the new tokens is hidden."""

    def reference(self, x: Tensor, latent_BTL: Tensor, key_BTR: Tensor, _: Tensor) -> Tensor:
        return super().reference(x, latent_BTL, key_BTR)


@cached("a cache of latents, written in place", maker=step_position)
class MlaCacheIndexCopy(CacheWithRoom):
    """Static caches written by index_copy_."""

    def forward(self, x: Tensor, latent_BTL: Tensor, key_BTR: Tensor, position: Tensor) -> Tensor:
        latent, rotary = self.latent(x, OLD)
        latent_BTL.index_copy_(1, position, latent)
        key_BTR.index_copy_(1, position, rotary)
        return written(self, x, latent_BTL, key_BTR, position)


@cached("a cache of latents, written in place", maker=step_position)
class MlaCacheIndexPut(CacheWithRoom):
    """Static caches written by an assignment at positions."""

    def forward(self, x: Tensor, latent_BTL: Tensor, key_BTR: Tensor, position: Tensor) -> Tensor:
        latent, rotary = self.latent(x, OLD)
        latent_BTL[:, position], key_BTR[:, position] = latent, rotary
        return written(self, x, latent_BTL, key_BTR, position)


@cached("a cache of latents, written in place and cut", maker=step_position)
class MlaCacheSliceAssigned(CacheWithRoom):
    """DeepSeek inference: a slice of the buffer is assigned, the filled part is read."""

    def forward(self, x: Tensor, latent_BTL: Tensor, key_BTR: Tensor, position: Tensor) -> Tensor:
        b, end = x.shape[0], OLD + x.shape[1]
        latent, rotary = self.latent(x, OLD)
        latent_BTL[:b, OLD:end] = latent
        key_BTR[:b, OLD:end] = rotary
        return joined(self, self.query(x, OLD), latent_BTL[:b, :end], key_BTR[:b, :end])


@cached("a cache of latents, written in place and cut", maker=step_position)
class MlaCacheIndexCopyCut(CacheWithRoom):
    """index_copy_ into a buffer with room, of which the filled part is read."""

    def forward(self, x: Tensor, latent_BTL: Tensor, key_BTR: Tensor, position: Tensor) -> Tensor:
        end = OLD + x.shape[1]
        latent, rotary = self.latent(x, OLD)
        latent_BTL.index_copy_(1, position, latent)
        key_BTR.index_copy_(1, position, rotary)
        return joined(self, self.query(x, OLD), latent_BTL[:, :end], key_BTR[:, :end])


@cached("a cache of latents beside rotary keys in one tensor", maker=step_joint)
class MlaCacheJoint(Layer):
    """vLLM's layout: [latent | rotary key] is cached as one tensor and cut after the join."""

    def reference(self, x: Tensor, cache_BTD: Tensor) -> Tensor:
        return super().reference(x, *cache_BTD.split([L, R], -1))

    def forward(self, x: Tensor, cache_BTD: Tensor) -> Tensor:
        cache_BTD = torch.cat([cache_BTD, torch.cat(self.latent(x, OLD), -1)], 1)
        latent, rotary = cache_BTD.split([L, R], dim=-1)
        return joined(self, self.query(x, OLD), latent, rotary)


@cached("a cache of what the latent is made of", maker=step_raw)
class MlaCacheBeforeNorm(Layer):
    """What the down projection gives is cached; norm and rotation are computed for all tokens in every step."""

    def reference(self, x: Tensor, cache_BTD: Tensor) -> Tensor:
        latent, rotary = torch.cat([cache_BTD, self.down(x)], 1).split([L, R], -1)
        key, value = self.key_value(self.norm(latent), rope(rotary))
        return self.o(merge_heads(attend(self.query(x, OLD), key, value)))

    def forward(self, x: Tensor, cache_BTD: Tensor) -> Tensor:
        cache_BTD = torch.cat([cache_BTD, self.down(x)], 1)
        latent, rotary = self.norm(cache_BTD[..., :L]), rope(cache_BTD[..., L:])
        return joined(self, self.query(x, OLD), latent, rotary)


@cached("one linear layer for every token of the cache, in two scores", maker=step)
class MlaCacheTwoProducts(TwoLinears):
    """Decoding with two products of scores over cached latents."""

    def forward(self, x: Tensor, latent_BTL: Tensor, key_BTR: Tensor) -> Tensor:
        latent, rotary = self.latent(x, OLD)
        latent, rotary = torch.cat([latent_BTL, latent], 1), torch.cat([key_BTR, rotary], 1)
        content, position = self.query(x, OLD).split([N, R], -1)
        key = self.k_up(latent).unflatten(-1, (H, N)).transpose(1, 2)
        scores = (content @ key.mT + position @ rotary[:, None].mT) * SCALE
        scores = scores + hidden(x.shape[1], latent.shape[1])
        value = self.v_up(latent).unflatten(-1, (H, E)).transpose(1, 2)
        return self.o((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


@latent("cached expanded", "none", "the latent of earlier tokens is not kept", maker=step_expanded)
class MlaCacheExpanded(Layer):
    """The first DeepSeek code: keys and values of every head are cached."""

    def reference(self, x: Tensor, key_BHTD: Tensor, value_BHTE: Tensor) -> Tensor:
        key, value = self.key_value(*self.latent(x, OLD))
        key, value = torch.cat([key_BHTD, key], 2), torch.cat([value_BHTE, value], 2)
        return self.o(merge_heads(attend(self.query(x, OLD), key, value)))

    def forward(self, x: Tensor, key_BHTD: Tensor, value_BHTE: Tensor) -> Tensor:
        latent, rotary = self.latent(x, OLD)
        key, value = self.up(latent).unflatten(-1, (H, -1)).transpose(1, 2).split([N, E], -1)
        key = torch.cat([key, rotary[:, None].expand(-1, H, -1, -1)], -1)
        key, value = torch.cat([key_BHTD, key], 2), torch.cat([value_BHTE, value], 2)
        return self.attention(self.query(x, OLD), key, value)
