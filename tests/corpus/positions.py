"""Positions: rotated queries and keys, and biases computed inside."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import MORE, Inputs, Rand, program
from .inputs import SCALE, B, D, H, S, past, same
from .references import attend

more = functools.partial(program, MORE, sites=1)


def scores_of(query_BHSD: Tensor, key_BHTD: Tensor) -> Tensor:
    """[B, H, S, T], scaled."""
    return query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE


def angles(width: int) -> Tensor:
    """[S, width / 2]."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.arange(S)[:, None] * frequencies


def rotate_pairs(even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of a rotation, for pairs given as two tensors."""
    cos, sin = angles(2 * even.shape[-1]).cos(), angles(2 * even.shape[-1]).sin()
    return even * cos - odd * sin, even * sin + odd * cos


def rope_halves(x: Tensor) -> Tensor:
    """Pairs are [i, i + width / 2]; what the programs are compared with."""
    return torch.cat(rotate_pairs(*x.chunk(2, -1)), -1)


def rope_neighbours(x: Tensor) -> Tensor:
    """Pairs are [2i, 2i + 1]."""
    return torch.stack(rotate_pairs(x[..., ::2], x[..., 1::2]), -1).flatten(-2)


def with_cos_sin(rand: Rand) -> Inputs:
    doubled = torch.cat([angles(D)] * 2, -1)[None]
    return *same(rand), doubled.cos(), doubled.sin()


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


@more(
    with_cos_sin,
    reference=lambda query, key, value, *_: attend(rope_halves(query), rope_halves(key), value, causal=True),
)
def rope_rotate_half(query_BHSD, key_BHTD, value_BHTE, cos_1SD, sin_1SD):
    """Llama of Hugging Face: halves are exchanged and negated."""
    cos, sin = cos_1SD.unsqueeze(1), sin_1SD.unsqueeze(1)
    query_BHSD = (query_BHSD * cos) + (rotate_half(query_BHSD) * sin)
    key_BHTD = (key_BHTD * cos) + (rotate_half(key_BHTD) * sin)
    scores = scores_of(query_BHSD, key_BHTD) + torch.full((S, S), torch.finfo(torch.float32).min).triu(1)
    return scores.softmax(-1) @ value_BHTE


@more(same, reference=lambda query, key, value: attend(rope_neighbours(query), rope_neighbours(key), value))
def rope_interleaved(query_BHSD, key_BHTD, value_BHTE):
    """GPT-J: neighbours are rotated, with strided slices and stack; the angles are computed inside."""
    sinusoid = torch.einsum("i,j->ij", torch.arange(S).float(), 10000.0 ** (-torch.arange(0, D, 2) / D))
    sin, cos = (x.repeat_interleave(2, -1) for x in (sinusoid.sin(), sinusoid.cos()))

    def rotate(x: Tensor) -> Tensor:
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin

    return scores_of(rotate(query_BHSD), rotate(key_BHTD)).softmax(-1) @ value_BHTE


def with_complex(rand: Rand) -> Inputs:
    return *same(rand), torch.polar(torch.ones(S, D // 2), angles(D))


@more(with_complex, reference=lambda query, key, value, _: attend(rope_neighbours(query), rope_neighbours(key), value))
def rope_complex(query_BHSD, key_BHTD, value_BHTE, turns_SR):
    """Llama of Meta: neighbours are one complex number."""

    def rotate(x: Tensor) -> Tensor:
        x_complex = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(x_complex * turns_SR).flatten(3).type_as(x)

    return F.softmax(scores_of(rotate(query_BHSD), rotate(key_BHTD)).float(), dim=-1) @ value_BHTE


def rope_partial_reference(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
    query, key = (torch.cat([rope_halves(x[..., : D // 2]), x[..., D // 2 :]], -1) for x in (query, key))
    return attend(query, key, value)


@more(same, reference=rope_partial_reference)
def rope_partial(query_BHSD, key_BHTD, value_BHTE):
    """GPT-NeoX: half of the width is rotated, the rest is concatenated unchanged."""
    doubled = torch.cat([angles(D // 2)] * 2, -1)
    cos, sin = doubled.cos(), doubled.sin()
    rotated = []
    for x in (query_BHSD, key_BHTD):
        turning, still = x[..., : D // 2], x[..., D // 2 :]
        rotated.append(torch.cat((turning * cos + rotate_half(turning) * sin, still), dim=-1))
    return scores_of(*rotated).softmax(-1) @ value_BHTE


# ---------------------------------------------------------------- biases


def distances() -> Tensor:
    """[S, S]: position of the key minus position of the query."""
    return torch.arange(S)[None, :] - torch.arange(S)[:, None]


def alibi(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    slopes_H11 = torch.tensor([2.0 ** (-8 * (h + 1) / H) for h in range(H)]).view(H, 1, 1)
    return attend(query, key, value, torch.where(past(), slopes_H11 * distances(), -torch.inf))


@more(same, reference=alibi)
def alibi_inside(query_BHSD, key_BHTD, value_BHTE):
    """ALiBi from slopes and positions, computed inside, causal."""
    slopes_H = torch.pow(2.0, -torch.arange(1, H + 1) * 8.0 / H)
    position = torch.arange(query_BHSD.shape[2])
    bias_HST = slopes_H.view(-1, 1, 1) * (position[None, :] - position[:, None])[None]
    future_ST = position[None, :] > position[:, None]
    scores = (scores_of(query_BHSD, key_BHTD) + bias_HST[None]).masked_fill(future_ST, torch.finfo(torch.float32).min)
    return scores.softmax(dim=-1) @ value_BHTE


@more(same, reference=alibi)
def alibi_bloom(query_BHSD, key_BHTD, value_BHTE):
    """BLOOM: ALiBi of the key alone is the input of baddbmm, which scales the product."""
    slopes_H = torch.pow(2.0, -torch.arange(1, H + 1) * 8.0 / H)
    bias_BH1T = (slopes_H[:, None, None] * torch.arange(S)[None, None]).expand(B, H, 1, S)
    query_NSD, key_NDT = query_BHSD.reshape(B * H, S, D), key_BHTD.permute(0, 1, 3, 2).reshape(B * H, D, S)
    scores = bias_BH1T.reshape(B * H, 1, S).baddbmm(query_NSD, key_NDT, beta=1.0, alpha=SCALE).view(B, H, S, S)
    weights = F.softmax(scores.masked_fill(~past(), torch.finfo(scores.dtype).min), dim=-1, dtype=torch.float32)
    return torch.bmm(weights.view(B * H, S, S), value_BHTE.reshape(B * H, S, D)).view(B, H, S, D)


def with_buckets(rand: Rand) -> Inputs:
    return *same(rand), rand(32, H)


def t5_buckets(distance: Tensor, buckets: int = 32, far: int = 128) -> Tensor:
    """T5: the number of a distance; near ones are exact, far ones share a bucket."""
    half = buckets // 2
    side = (distance > 0).to(torch.long) * half
    distance = torch.abs(distance)
    exact = half // 2
    logarithm = torch.log(distance.float() / exact) / math.log(far / exact) * (half - exact)
    large = torch.min(exact + logarithm.to(torch.long), torch.full_like(distance, half - 1))
    return side + torch.where(distance < exact, distance, large)


@more(
    with_buckets,
    reference=lambda query, key, value, table: attend(
        query, key, value, table[t5_buckets(distances())].permute(2, 0, 1), scale=1.0
    ),
)
def relative_buckets_t5(query_BHSD, key_BHTD, value_BHTE, table_bucket_H):
    """T5: no scale, and a learned bias for each head and bucket of distances, added in place."""
    context, memory = torch.arange(query_BHSD.shape[2])[:, None], torch.arange(key_BHTD.shape[2])[None, :]
    bias_1HST = F.embedding(t5_buckets(memory - context), table_bucket_H).permute([2, 0, 1]).unsqueeze(0)
    scores = torch.matmul(query_BHSD, key_BHTD.transpose(3, 2))
    scores += bias_1HST
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), value_BHTE)


def with_relative_keys(rand: Rand) -> Inputs:
    return *same(rand), rand(2 * S - 1, D)


def relative_keys_reference(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    bias = (query.unsqueeze(-2) * table[distances() + S - 1]).sum(-1) * SCALE
    return attend(query, key, value, bias)


@more(with_relative_keys, reference=relative_keys_reference)
def relative_keys_shaw(query_BHSD, key_BHTD, value_BHTE, table_LD):
    """BERT with relative keys: the query meets a learned vector of the distance, before the scale."""
    distance_ST = torch.arange(S).view(1, -1) - torch.arange(S).view(-1, 1)
    position_STD = table_LD[distance_ST + S - 1]
    scores = torch.matmul(query_BHSD, key_BHTD.transpose(-1, -2))
    scores = scores + torch.einsum("bhld,lrd->bhlr", query_BHSD, position_STD)
    return (scores / math.sqrt(D)).softmax(-1) @ value_BHTE


@more(with_relative_keys, reference=relative_keys_reference)
def relative_keys_shifted(query_BHSD, key_BHTD, value_BHTE, table_LD):
    """Transformer-XL: query times all distances, then pad, view and slice shift row by row."""
    content = torch.einsum("bhsd,bhtd->bhst", query_BHSD, key_BHTD)
    all_BHSL = torch.einsum("bhsd,ld->bhsl", query_BHSD, table_LD)
    shifted = F.pad(all_BHSL, (1, 0)).view(B, H, 2 * S, S)[:, :, 1:].reshape(B, H, S, 2 * S - 1)[..., :S]
    return ((content + shifted) * SCALE).softmax(-1) @ value_BHTE


def with_rows_columns(rand: Rand) -> Inputs:
    return *same(rand), rand(2, 2, D), rand(5, 5, D)


def decomposed_reference(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    row, column = torch.arange(S) // 5, torch.arange(S) % 5
    table = rows[row[:, None], row[None]] + columns[column[:, None], column[None]]
    return attend(query, key, value, (query.unsqueeze(-2) * table).sum(-1))


@more(with_rows_columns, reference=decomposed_reference)
def relative_image_sam(query_BHSD, key_BHTD, value_BHTE, rows_XXD, columns_YYD):
    """SAM: the bias of a 2 by 5 image is a sum over rows and columns; the scores are viewed to add it."""
    query_NXYD = query_BHSD.reshape(B * H, 2, 5, D)
    scores_NST = (query_BHSD * SCALE).reshape(B * H, S, D) @ key_BHTD.reshape(B * H, S, D).transpose(-2, -1)
    by_row = torch.einsum("bhwc,hkc->bhwk", query_NXYD, rows_XXD)[..., :, None]
    by_column = torch.einsum("bhwc,wkc->bhwk", query_NXYD, columns_YYD)[..., None, :]
    scores_NST = (scores_NST.view(B * H, 2, 5, 2, 5) + by_row + by_column).view(B * H, S, S)
    return (scores_NST.softmax(-1) @ value_BHTE.flatten(0, 1)).view(B, H, S, D)


@more(with_relative_keys)
def disentangled_deberta(query_BHSD, key_BHTD, value_BHTE, table_LD):
    """DeBERTa: content to content, content to position and position to content, the last two gathered."""
    scale = 1 / math.sqrt(3 * D)
    index_ST = (torch.arange(S)[:, None] - torch.arange(S)[None, :] + S - 1).expand(B, H, S, S)
    scores = torch.matmul(query_BHSD, key_BHTD.transpose(-1, -2) * scale)
    to_position = torch.gather(query_BHSD @ table_LD.t() * scale, -1, index_ST)
    from_position = torch.gather(key_BHTD @ table_LD.t() * scale, -1, index_ST).transpose(-1, -2)
    return (scores + to_position + from_position).softmax(-1) @ value_BHTE
