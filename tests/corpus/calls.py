"""The library call in every form, and around it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from .base import MORE, Inputs, Rand, program
from .inputs import (
    HEADS,
    C,
    D,
    E,
    S,
    T,
    cross,
    cross_bias,
    cross_padding,
    flat,
    folded,
    grouped,
    same,
    tokens,
    tokens_first,
    valid_keys,
)
from .references import attend, attend_channels, attend_padded, attend_tokens_first

more = functools.partial(program, MORE, sites=1)


@more(cross, reference=attend)
def call_keywords(query_BHSD, key_BHTD, value_BHTE):
    """Every argument by keyword, the defaults spelt out."""
    return F.scaled_dot_product_attention(
        query=query_BHSD, key=key_BHTD, value=value_BHTE, attn_mask=None, dropout_p=0.0, is_causal=False
    )


@more(same, reference=functools.partial(attend, causal=True))
def call_all_positional(query_BHSD, key_BHTD, value_BHTE):
    """Mask, dropout and causality by position."""
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE, None, 0.0, True)


@more(same, reference=functools.partial(attend, causal=True))
def call_causal(query_BHSD, key_BHTD, value_BHTE):
    """is_causal by keyword."""
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE, is_causal=True)


@more(cross_bias, reference=attend)
def call_float_mask(query_BHSD, key_BHTD, value_BHTE, bias_1HST):
    """A mask of floats, by position: it is added."""
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE, bias_1HST)


@more(cross_padding, reference=attend_padded)
def call_bool_mask(query_BHSD, key_BHTD, value_BHTE, valid_BT):
    """A mask of booleans, True where the key may be read."""
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE, attn_mask=valid_BT[:, None, None, :])


@more(grouped, reference=attend)
def call_grouped(query_BHSD, key_BKTD, value_BKTE):
    """Grouped queries by the flag of the call."""
    return F.scaled_dot_product_attention(query_BHSD, key_BKTD, value_BKTE, enable_gqa=True)


@more(folded, reference=attend)
def call_three_dims(query_NSD, key_NTD, value_NTE):
    """Three axes: batch and heads are folded."""
    return F.scaled_dot_product_attention(query_NSD, key_NTD, value_NTE)


@more(flat, reference=attend)
def call_two_dims(query_SD, key_TD, value_TE):
    """Two axes: neither batch nor heads."""
    return F.scaled_dot_product_attention(query_SD, key_TD, value_TE)


def windows(rand: Rand) -> Inputs:
    """query_BWHSD, key_BWHTD, value_BWHTE, where W is an axis of windows."""
    return rand(2, 5, 3, S, D), rand(2, 5, 3, T, D), rand(2, 5, 3, T, E)


@more(windows, reference=attend)
def call_five_dims(query_BWHSD, key_BWHTD, value_BWHTE):
    """Five axes: windows between batch and heads."""
    return F.scaled_dot_product_attention(query_BWHSD, key_BWHTD, value_BWHTE)


@more(cross, reference=functools.partial(attend, scale=0.3))
def call_scale(query_BHSD, key_BHTD, value_BHTE):
    """A scale that is not D**-0.5."""
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE, scale=0.3)


@more(cross, reference=functools.partial(attend, scale=0.3))
def call_query_scaled(query_BHSD, key_BHTD, value_BHTE):
    """Whisper: the query is scaled before, and the scale of the call is 1."""
    return F.scaled_dot_product_attention(query_BHSD * 0.3, key_BHTD, value_BHTE, scale=1.0)


@more(cross, reference=functools.partial(attend, scale=0.3 * D**-0.5))
def call_scaled_twice(query_BHSD, key_BHTD, value_BHTE):
    """The key is scaled before, and the call scales by its default too."""
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD * 0.3, value_BHTE)


@more(tokens_first, reference=attend_tokens_first)
def call_tokens_first(query_BSHD, key_BTHD, value_BTHE):
    """diffusers: the call sits between transposes from and to [B, S, H, D]."""
    query_BHSD, key_BHTD, value_BHTE = (x.transpose(1, 2) for x in (query_BSHD, key_BTHD, value_BTHE))
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE).transpose(1, 2).contiguous()


@more(tokens, reference=lambda x_BSC: attend_channels(x_BSC, x_BSC, x_BSC, HEADS, causal=True))
def call_on_activations(x_BSC):
    """One tensor is query, key and value."""
    x_BHSD = x_BSC.view(*x_BSC.shape[:2], HEADS, C // HEADS).transpose(1, 2)
    return F.scaled_dot_product_attention(x_BHSD, x_BHSD, x_BHSD, is_causal=True).transpose(1, 2).reshape(x_BSC.shape)


def wide_values(rand: Rand) -> Inputs:
    """Keys narrower than values."""
    return cross(rand, width_v=3 * D)


@more(wide_values, reference=attend)
def call_wide_values(query_BHSD, key_BHTD, value_BHTE):
    """Values are three times as wide as keys."""
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE)


@more(cross, reference=attend)
def call_padded_values(query_BHSD, key_BHTD, value_BHTE):
    """DeepSeek with flash attention: values are padded to the width of keys, the output is cut."""
    padded_BHTD = F.pad(value_BHTE, [0, D - E])
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, padded_BHTD)[..., :E]


@more(cross, reference=attend)
def call_aten(query_BHSD, key_BHTD, value_BHTE):
    """The operator behind the function."""
    return torch.ops.aten.scaled_dot_product_attention.default(query_BHSD, key_BHTD, value_BHTE)


@more(cross, reference=attend)
def call_with_backend(query_BHSD, key_BHTD, value_BHTE):
    """A context manager chooses the kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE)


@more(cross, reference=attend)
def call_flex(query_BHSD, key_BHTD, value_BHTE):
    """The other library call, without a score function."""
    return flex_attention(query_BHSD, key_BHTD, value_BHTE, scale=D**-0.5)


def causal_and_padded(rand: Rand) -> Inputs:
    return *same(rand), valid_keys(S)


@more(
    causal_and_padded,
    reference=lambda query, key, value, valid_BT: attend(
        query, key, value, torch.ones(S, S, dtype=torch.bool).tril() & valid_BT[:, None, None, :]
    ),
)
def call_mask_from_comparisons(query_BHSD, key_BHTD, value_BHTE, valid_BT):
    """Hugging Face: the boolean mask comes from position comparisons and a gather of the padding."""
    position_S = torch.arange(query_BHSD.shape[2])
    batch_B = torch.arange(query_BHSD.shape[0])
    past_ST = position_S[None, None, :, None] >= position_S[None, None, None, :]
    mask_B1ST = past_ST & valid_BT[batch_B[:, None, None, None], position_S[None, None, None, :]]
    return F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTE, attn_mask=mask_B1ST)
