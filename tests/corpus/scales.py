"""Scales, temperatures, normalised queries and keys, gates."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from .base import MORE, Inputs, Rand, program
from .inputs import SCALE, B, D, E, H, S, T, cross, cross_bias, past, same
from .references import attend

more = functools.partial(program, MORE, sites=1)


@more(cross, reference=attend)
def scale_on_both(query_BHSD, key_BHTD, value_BHTE):
    """The square root of the scale on query and key each."""
    return ((query_BHSD * D**-0.25) @ (key_BHTD * D**-0.25).transpose(-2, -1)).softmax(-1) @ value_BHTE


@more(cross, reference=attend)
def scale_on_both_openai(query_BHSD, key_BHTD, value_BHTE):
    """Whisper's first release: the same by nested square roots, on the transposed key."""
    scale = 1 / math.sqrt(math.sqrt(D))
    scores = (query_BHSD * scale) @ (key_BHTD.permute(0, 1, 3, 2) * scale)
    return F.softmax(scores, dim=-1).to(query_BHSD.dtype) @ value_BHTE


@more(cross, reference=attend)
def scale_from_size(query_BHSD, key_BHTD, value_BHTE):
    """The scale is computed from the size of the key, which may be symbolic."""
    return (query_BHSD / math.sqrt(key_BHTD.size(-1)) @ key_BHTD.transpose(-2, -1)).softmax(-1) @ value_BHTE


@more(cross, reference=attend)
def scale_tensor(query_BHSD, key_BHTD, value_BHTE):
    """The divisor is the square root of a 0-d tensor."""
    scores = query_BHSD @ key_BHTD.transpose(-2, -1) / torch.sqrt(torch.tensor(D, dtype=torch.float32))
    return scores.softmax(-1) @ value_BHTE


def with_temperature(rand: Rand) -> Inputs:
    return *cross(rand), rand(()).abs() + 0.5


@more(
    with_temperature,
    reference=lambda query, key, value, temperature: attend(query, key, value, scale=1 / temperature),
)
def scale_learned(query_BHSD, key_BHTD, value_BHTE, temperature):
    """A learned 0-d temperature divides the scores."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) / temperature).softmax(-1) @ value_BHTE


def with_head_temperature(rand: Rand) -> Inputs:
    return *cross(rand), rand(H, 1, 1).abs() + 0.5


@more(with_head_temperature, reference=lambda query, key, value, scale_H11: attend(query, key, value, scale=scale_H11))
def scale_for_each_head(query_BHSD, key_BHTD, value_BHTE, scale_H11):
    """One learned scale for each head."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * scale_H11).softmax(-1) @ value_BHTE


@more(cross_bias, reference=lambda query, key, value, bias: attend(query, key, value, bias * SCALE))
def scale_after_bias(query_BHSD, key_BHTD, value_BHTE, bias_1HST):
    """The scale multiplies the bias as well."""
    return ((query_BHSD @ key_BHTD.transpose(-2, -1) + bias_1HST) * SCALE).softmax(-1) @ value_BHTE


@more(cross, reference=functools.partial(attend, scale=SCALE / 3))
def scale_by_layer(query_BHSD, key_BHTD, value_BHTE):
    """GPT-2: divided by sqrt(D), then by the number of the layer."""
    scores = query_BHSD @ key_BHTD.transpose(-1, -2) / (value_BHTE.new_tensor(D) ** 0.5)
    return (scores / float(2 + 1)).softmax(-1) @ value_BHTE


@more(cross, reference=attend)
def scale_by_layer_undone(query_BHSD, key_BHTD, value_BHTE):
    """Megatron: baddbmm divides by the layer number as well, the softmax multiplies it back."""
    query_NSD, key_NTD = query_BHSD.flatten(0, 1), key_BHTD.flatten(0, 1)
    empty = torch.empty(B * H, S, T)
    scores_NST = torch.baddbmm(empty, query_NSD, key_NTD.mT, beta=0.0, alpha=SCALE / 3)
    return F.softmax(scores_NST.view(B, H, S, T).float() * 3, dim=-1) @ value_BHTE


@more(cross, reference=lambda query, key, value: attend(query, key, value, scale=8 / D))
def scale_mup(query_BHSD, key_BHTD, value_BHTE):
    """Scaled by 8 / D, with numerator and denominator apart."""
    return (8 * torch.matmul(query_BHSD, key_BHTD.mT) / D).softmax(-1) @ value_BHTE


def logarithmic(rand: Rand) -> Inputs:
    return *cross(rand), torch.arange(1, S + 1).log2()


@more(logarithmic, reference=lambda query, key, value, log_S: attend(query, key, value, scale=SCALE * log_S[:, None]))
def scale_for_each_query(query_BHSD, key_BHTD, value_BHTE, log_S):
    """Qwen: the scale of a query grows with the logarithm of its position."""
    query_BHSD = query_BHSD * log_S[None, None, :, None]
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1) @ value_BHTE


# ---------------------------------------------------------------- normalised queries and keys


def rms(x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@more(cross, reference=lambda query, key, value: attend(rms(query), rms(key), value))
def norm_rms(query_BHSD, key_BHTD, value_BHTE):
    """Gemma 3, Qwen 3: query and key are divided by their root mean square."""
    query_BHSD, key_BHTD = (F.rms_norm(x, (D,), eps=1e-6) for x in (query_BHSD, key_BHTD))
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1) @ value_BHTE


def with_norm_weights(rand: Rand) -> Inputs:
    return *cross(rand), rand(D), rand(D)


@more(with_norm_weights)
def norm_layer(query_BHSD, key_BHTD, value_BHTE, weight_D, bias_D):
    """ViT-22B: layer norm with weights on query and key."""
    query_BHSD = F.layer_norm(query_BHSD, (D,), weight_D, bias_D)
    key_BHTD = F.layer_norm(key_BHTD, (D,), weight_D, bias_D)
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE)


@more(with_head_temperature)
def norm_cosine(query_BHSD, key_BHTD, value_BHTE, logit_scale_H11):
    """Swin v2: cosine similarity times a clamped learned scale for each head."""
    scores = F.normalize(query_BHSD, dim=-1) @ F.normalize(key_BHTD, dim=-1).transpose(-2, -1)
    scale_H11 = torch.clamp(logit_scale_H11, max=math.log(1.0 / 0.01)).exp()
    return (scores * scale_H11).softmax(-1) @ value_BHTE


def shared_query_key(rand: Rand) -> Inputs:
    return rand(B, H, S, D), rand(B, H, S, E)


@more(shared_query_key, reference=lambda shared, value: attend(shared, F.normalize(shared, dim=-1), value, past()))
def norm_shared_query_key(shared_BHSD, value_BHTE):
    """Reformer: the key is the normalised query."""
    key_BHTD = shared_BHSD / shared_BHSD.norm(dim=-1, keepdim=True)
    scores = torch.einsum("bhie,bhje->bhij", shared_BHSD, key_BHTD) * SCALE
    return torch.einsum("bhij,bhje->bhie", scores.masked_fill(~past(), -1e9).softmax(dim=-1), value_BHTE)


# ---------------------------------------------------------------- gates


def with_gate(rand: Rand) -> Inputs:
    return *cross(rand), rand(1, H, 1, 1)


@more(with_gate, reference=lambda query, key, value, gate: attend(query, key, value) * gate)
def gate_on_weights(query_BHSD, key_BHTD, value_BHTE, gate_1H11):
    """One number for each head multiplies the weights."""
    weights = (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1)
    return (weights * gate_1H11) @ value_BHTE


@more(same)
def gate_on_output(query_BHSD, key_BHTD, value_BHTE):
    """Qwen3-Next: a sigmoid of the query gates the output."""
    weights = (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1)
    return (weights @ value_BHTE) * torch.sigmoid(query_BHSD)


@more(with_gate, reference=lambda query, key, value, gate: attend(query, key, value) * gate.tanh())
def gate_on_values(query_BHSD, key_BHTD, value_BHTE, gate_1H11):
    """The gate multiplies the values before they are weighed."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-1) @ (value_BHTE * gate_1H11.tanh())
