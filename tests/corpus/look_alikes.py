"""5 programs with the operators of attention and no site; a rewrite of any of them changes the answer."""

from __future__ import annotations

import functools
import math

from .base import NOT_ATTENTION, SCALE, D, program, qkv, qkv_finite_bias

look_alike = functools.partial(program, NOT_ATTENTION, sites=0)


@look_alike(qkv)
def softmax_over_queries_division(query_BHSD, key_BHTD, value_BHTE):
    """The softmax runs over S, the value product contracts T."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) / math.sqrt(D)).softmax(-2) @ value_BHTE


@look_alike(qkv)
def softmax_over_queries_multiplication(query_BHSD, key_BHTD, value_BHTE):
    """The same with a multiplied scale."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(-2) @ value_BHTE


@look_alike(qkv)
def softmax_over_heads(query_BHSD, key_BHTD, value_BHTE):
    """The softmax runs over H."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE).softmax(1) @ value_BHTE


@look_alike(qkv_finite_bias)
def softmax_over_heads_biased(query_BHSD, key_BHTD, value_BHTE, bias_B1ST):
    """The softmax runs over H, after a division and an additive bias."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) / math.sqrt(D) + bias_B1ST).softmax(1) @ value_BHTE


@look_alike(qkv)
def weights_transposed(query_BHSD, key_BHTD, value_BHTE):
    """The softmax runs over T, but the value product contracts S (legal because S = T)."""
    return (query_BHSD @ key_BHTD.transpose(-2, -1) / math.sqrt(D)).softmax(-1).transpose(-2, -1) @ value_BHTE
