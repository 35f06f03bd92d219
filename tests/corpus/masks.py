"""Masks: how they are made, and how they reach the scores."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import MORE, Inputs, Rand, program
from .inputs import SCALE, S, cross_padding, past, same, same_padding, same_past
from .references import attend, attend_padded

more = functools.partial(program, MORE, sites=1)
causal = functools.partial(attend, causal=True)


def scores_of(query_BHSD: Tensor, key_BHTD: Tensor) -> Tensor:
    """[B, H, S, T], scaled."""
    return query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE


# ---------------------------------------------------------------- causal masks made inside


@more(same, reference=causal)
def causal_tril_of_ones(query_BHSD, key_BHTD, value_BHTE):
    """masked_fill with the negation of a triangle of ones that is made inside."""
    keep_ST = torch.tril(torch.ones(query_BHSD.size(2), key_BHTD.size(2), dtype=torch.bool))
    return scores_of(query_BHSD, key_BHTD).masked_fill(~keep_ST, -1e9).softmax(-1) @ value_BHTE


@more(same, reference=causal)
def causal_triu_of_infinity(query_BHSD, key_BHTD, value_BHTE):
    """A square of -inf, of which triu keeps what is above the diagonal, is added."""
    size = query_BHSD.shape[-2]
    mask_ST = torch.triu(torch.full((size, size), float("-inf")), diagonal=1)
    return F.softmax(scores_of(query_BHSD, key_BHTD) + mask_ST, dim=-1) @ value_BHTE


@more(same, reference=causal)
def causal_positions(query_BHSD, key_BHTD, value_BHTE):
    """Two aranges are compared; torch.where chooses."""
    row_S1 = torch.arange(query_BHSD.shape[-2])[:, None]
    column_1T = torch.arange(key_BHTD.shape[-2])[None, :]
    scores = scores_of(query_BHSD, key_BHTD)
    return torch.where(column_1T <= row_S1, scores, torch.finfo(scores.dtype).min).softmax(-1) @ value_BHTE


@more(same, reference=causal)
def causal_in_place(query_BHSD, key_BHTD, value_BHTE):
    """The scores are scaled, shifted and filled in place."""
    scores = query_BHSD @ key_BHTD.transpose(-2, -1)
    scores *= SCALE
    future_ST = torch.ones_like(scores[0, 0], dtype=torch.bool).triu_(1)
    scores.masked_fill_(future_ST[None, None], -torch.inf)
    return scores.softmax(-1) @ value_BHTE


def with_buffer(rand: Rand) -> Inputs:
    return *same(rand), torch.tril(torch.ones(2 * S, 2 * S)).view(1, 1, 2 * S, 2 * S)


@more(with_buffer, reference=lambda query, key, value, _: causal(query, key, value))
def causal_buffer_nanogpt(query_BHSD, key_BHTD, value_BHTE, ones_11LL):
    """nanoGPT: a slice of a buffer of floats is compared with zero."""
    size = query_BHSD.size(2)
    scores = scores_of(query_BHSD, key_BHTD).masked_fill(ones_11LL[:, :, :size, :size] == 0, float("-inf"))
    return F.softmax(scores, dim=-1) @ value_BHTE


@more(with_buffer, reference=lambda query, key, value, _: causal(query, key, value))
def causal_multiplied_gpt1(query_BHSD, key_BHTD, value_BHTE, ones_11LL):
    """GPT: scores times the mask, minus 10000 times its complement."""
    scores = scores_of(query_BHSD, key_BHTD)
    keep_11ST = ones_11LL[:, :, : scores.size(-2), : scores.size(-1)]
    return (scores * keep_11ST - 1e4 * (1 - keep_11ST)).softmax(-1) @ value_BHTE


@more(same_past, reference=attend)
def log_of_mask(query_BHSD, key_BHTD, value_BHTE, past_ST):
    """The logarithm of zeros and ones is added."""
    return (scores_of(query_BHSD, key_BHTD) + past_ST.float().log()).softmax(-1) @ value_BHTE


@more(same_past, reference=attend)
def mask_on_exponentials(query_BHSD, key_BHTD, value_BHTE, past_ST):
    """Zeros and ones multiply the exponentials, before their sum."""
    scores = scores_of(query_BHSD, key_BHTD)
    exponentials = torch.exp(scores - scores.max(dim=-1, keepdim=True)[0]) * past_ST.to(scores.dtype)
    return exponentials / exponentials.sum(dim=-1, keepdim=True) @ value_BHTE


@more(same_past, reference=attend)
def mask_assigned(query_BHSD, key_BHTD, value_BHTE, past_ST):
    """Boolean indices are assigned."""
    scores = scores_of(query_BHSD, key_BHTD)
    scores[:, :, ~past_ST] = float("-inf")
    return scores.softmax(-1) @ value_BHTE


@more(same_past, reference=attend)
def mask_clamped_opt(query_BHSD, key_BHTD, value_BHTE, past_ST):
    """OPT: the lowest float is added, and a maximum with it guards against overflow."""
    lowest = torch.tensor(torch.finfo(torch.float32).min)
    scores = scores_of(query_BHSD, key_BHTD) + torch.where(past_ST, 0.0, lowest)
    return F.softmax(torch.max(scores, lowest), dim=-1) @ value_BHTE


@more(same_past, reference=attend)
def mask_twice(query_BHSD, key_BHTD, value_BHTE, past_ST):
    """The weights are filled with zeros where the scores were filled already."""
    future_ST = past_ST.logical_not()
    weights = scores_of(query_BHSD, key_BHTD).masked_fill(future_ST, float("-inf")).softmax(-1)
    return weights.masked_fill(future_ST, 0.0) @ value_BHTE


# ---------------------------------------------------------------- padding


@more(cross_padding, reference=attend_padded)
def padding_bert(query_BHSD, key_BHTD, value_BHTE, valid_BT):
    """BERT: one minus the mask, times -10000, is added."""
    extended_B11T = (1.0 - valid_BT[:, None, None, :].to(query_BHSD.dtype)) * -10000.0
    return (scores_of(query_BHSD, key_BHTD) + extended_B11T).softmax(-1) @ value_BHTE


@more(cross_padding, reference=attend_padded)
def padding_filled(query_BHSD, key_BHTD, value_BHTE, valid_BT):
    """DistilBERT: the mask is viewed, expanded to the scores, and filled with the lowest float."""
    scores = scores_of(query_BHSD, key_BHTD)
    padded = (valid_BT == 0).view(valid_BT.shape[0], 1, 1, valid_BT.shape[1]).expand_as(scores)
    return scores.masked_fill(padded, torch.finfo(scores.dtype).min).softmax(-1) @ value_BHTE


@more(
    same_padding,
    reference=lambda query, key, value, valid_BT: attend(
        query, key, value, valid_BT[:, None, None, :] & valid_BT[:, None, :, None]
    ).nan_to_num(0.0),
)
def padding_of_both_sides(query_BHSD, key_BHTD, value_BHTE, valid_BT):
    """Queries that are padding see nothing: their rows are NaN, and become zeros after the softmax."""
    keep_B1ST = valid_BT[:, None, :, None] & valid_BT[:, None, None, :]
    weights = scores_of(query_BHSD, key_BHTD).masked_fill(~keep_B1ST, float("-inf")).softmax(-1)
    return torch.nan_to_num(weights, nan=0.0) @ value_BHTE


@more(
    same_padding,
    reference=lambda query, key, value, valid_BT: attend(query, key, value, past() & valid_BT[:, None, None, :]),
)
def padding_and_causal(query_BHSD, key_BHTD, value_BHTE, valid_BT):
    """Two masks, filled one after the other with different values."""
    scores = scores_of(query_BHSD, key_BHTD)
    scores = scores.masked_fill(~past(scores.shape[-1]), float("-inf"))
    scores = scores.masked_fill(~valid_BT[:, None, None], -1e30)
    return scores.softmax(-1) @ value_BHTE


# ---------------------------------------------------------------- other shapes of masks


def window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Three keys at most, none from the future."""
    return attend(query, key, value, past().triu(-2))


@more(same, reference=window)
def sliding_window(query_BHSD, key_BHTD, value_BHTE):
    """A query reads itself and the two tokens before it."""
    position = torch.arange(query_BHSD.shape[-2])
    distance_ST = position[:, None] - position[None, :]
    keep_ST = (distance_ST >= 0) & (distance_ST < 3)
    return scores_of(query_BHSD, key_BHTD).masked_fill(~keep_ST, -torch.inf).softmax(-1) @ value_BHTE


@more(same, reference=window)
def sliding_window_mistral(query_BHSD, key_BHTD, value_BHTE):
    """Mistral's first release: tril, then triu, of ones, then the logarithm."""
    ones_ST = torch.full((S, S), fill_value=1.0)
    mask_ST = torch.log(torch.triu(torch.tril(ones_ST, diagonal=0), diagonal=-2))
    return F.softmax(scores_of(query_BHSD, key_BHTD) + mask_ST[None, None], dim=-1) @ value_BHTE


PREFIX = 4


@more(
    same,
    reference=lambda query, key, value: attend(query, key, value, past() | (torch.arange(S) < PREFIX)),
)
def prefix_lm(query_BHSD, key_BHTD, value_BHTE):
    """The first four tokens read each other, the others are causal."""
    position = torch.arange(query_BHSD.shape[-2])
    keep_ST = (position[None, :] <= position[:, None]) | (position[None, :] < PREFIX)
    return torch.where(keep_ST, scores_of(query_BHSD, key_BHTD), -torch.inf).softmax(-1) @ value_BHTE


def packed(rand: Rand) -> Inputs:
    segment_BS = torch.tensor([[0] * 4 + [1] * 6, [0] * 3 + [1] * 5 + [2] * 2])
    return *same(rand), segment_BS


@more(
    packed,
    reference=lambda query, key, value, segment_BS: attend(
        query, key, value, past() & (segment_BS[:, None, :, None] == segment_BS[:, None, None, :])
    ),
)
def packed_segments(query_BHSD, key_BHTD, value_BHTE, segment_BS):
    """Packed sequences: block-diagonal and causal."""
    keep_BST = segment_BS.unsqueeze(2).eq(segment_BS.unsqueeze(1)).tril()
    return scores_of(query_BHSD, key_BHTD).masked_fill(~keep_BST.unsqueeze(1), -1e4).softmax(-1) @ value_BHTE
