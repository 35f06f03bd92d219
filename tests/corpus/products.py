"""The two contractions of attention, written in other ways."""

from __future__ import annotations

import functools

import einops
import torch
import torch.nn.functional as F

from .base import MORE, Inputs, Rand, program
from .inputs import (
    SCALE,
    B,
    D,
    E,
    G,
    H,
    K,
    S,
    T,
    cross,
    flat,
    folded,
    grouped,
    grouped_tokens_first,
    same,
    single,
    square,
    tokens_first,
)
from .references import attend, attend_tokens_first, merge_heads

more = functools.partial(program, MORE, sites=1)


@more(tokens_first, reference=attend_tokens_first)
def einsum_tokens_first(query_BSHD, key_BTHD, value_BTHE):
    """einsum from and to [B, S, H, D]: no transpose anywhere."""
    scores_BHST = torch.einsum("bqhd,bkhd->bhqk", query_BSHD, key_BTHD) * SCALE
    return torch.einsum("bhqk,bkhd->bqhd", scores_BHST.softmax(-1), value_BTHE)


@more(tokens_first, reference=attend_tokens_first)
def einsum_heads_last(query_BSHD, key_BTHD, value_BTHE):
    """The scores are [B, S, T, H], so the softmax runs over axis 2."""
    scores_BSTH = torch.einsum("bqhd,bkhd->bqkh", query_BSHD, key_BTHD) * SCALE
    return torch.einsum("bqkh,bkhd->bqhd", scores_BSTH.softmax(2), value_BTHE)


@more(tokens_first, reference=attend_tokens_first)
def einsum_keys_first(query_BSHD, key_BTHD, value_BTHE):
    """The key is the first operand and its axis comes first in the scores; the softmax runs over axis 1."""
    scores_BTSH = torch.einsum("bkhd,bqhd->bkqh", key_BTHD, query_BSHD * SCALE)
    return torch.einsum("bkhd,bkqh->bqhd", value_BTHE, scores_BTSH.softmax(dim=1))


@more(cross, reference=attend)
def einsum_ellipsis(query_BHSD, key_BHTD, value_BHTE):
    """einsum with an ellipsis and upper-case letters."""
    weights = torch.einsum("...QD,...KD->...QK", query_BHSD, key_BHTD).mul(SCALE).softmax(-1)
    return torch.einsum("...QK,...KE->...QE", weights, value_BHTE)


@more(grouped_tokens_first, reference=attend_tokens_first)
def einsum_grouped(query_BSHD, key_BTKD, value_BTKE):
    """Grouped queries as one more letter; no key is repeated."""
    query_BSKGD = query_BSHD.unflatten(2, (K, G))
    scores_BKGST = torch.einsum("bikgd,bjkd->bkgij", query_BSKGD, key_BTKD) * SCALE
    return torch.einsum("bkgij,bjke->bikge", scores_BKGST.softmax(-1), value_BTKE).flatten(2, 3)


@more(grouped, reference=attend)
def einsum_grouped_heads_first(query_BHSD, key_BKTD, value_BKTE):
    """The same with heads first, spelt with spaces as x-transformers does."""
    query_BKGSD = einops.rearrange(query_BHSD, "b (g h) n d -> b g h n d", g=K)
    sim = torch.einsum("b g h i d, b g j d -> b g h i j", query_BKGSD, key_BKTD) * SCALE
    out = torch.einsum("b g h i j, b g j d -> b g h i d", sim.softmax(dim=-1), value_BKTE)
    return einops.rearrange(out, "b g h n d -> b (g h) n d")


@more(square, reference=attend_tokens_first)
def einsum_square(query_BSHD, key_BTHD, value_BTHE):
    """einsum from [B, S, H, D] with every axis of one size: the letters alone tell which is which."""
    weights_BHST = torch.einsum("bqhd,bkhd->bhqk", query_BSHD, key_BTHD).div(query_BSHD.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights_BHST, value_BTHE)


@more(flat, reference=attend)
def einsum_implicit(query_SD, key_TD, value_TE):
    """The output letters are left to einsum, which sorts them: the scores are [T, S]."""
    scores_TS = torch.einsum("qd,kd", query_SD, key_TD) * SCALE
    return torch.einsum("kq,ke->qe", scores_TS.softmax(0), value_TE)


def with_output_weight(rand: Rand) -> Inputs:
    return *cross(rand), rand(H, E, 20)


@more(
    with_output_weight,
    reference=lambda query, key, value, weight: merge_heads(attend(query, key, value)) @ weight.flatten(0, 1),
)
def einsum_with_output_projection(query_BHSD, key_BHTD, value_BHTE, weight_HEC):
    """Mesh TensorFlow: the value product and the output projection are one einsum."""
    weights = (torch.einsum("bhqd,bhkd->bhqk", query_BHSD, key_BHTD) * SCALE).softmax(-1)
    return torch.einsum("bhqk,bhke,hec->bqc", weights, value_BHTE, weight_HEC)


@more(cross, reference=attend)
def einops_einsum(query_BHSD, key_BHTD, value_BHTE):
    """einops.einsum with words for axes."""
    scores = einops.einsum(query_BHSD, key_BHTD, "b head query d, b head key d -> b head query key")
    weights = (scores * SCALE).softmax(-1)
    return einops.einsum(weights, value_BHTE, "b head query key, b head key e -> b head query e")


@more(cross, reference=lambda query, key, value: merge_heads(attend(query, key, value)))
def einops_rearrange(query_BHSD, key_BHTD, value_BHTE):
    """The key is transposed and the heads are merged by einops."""
    scores = query_BHSD @ einops.rearrange(key_BHTD, "b h t d -> b h d t") * SCALE
    return einops.rearrange(scores.softmax(-1) @ value_BHTE, "b h s e -> b s (h e)")


@more(folded, reference=attend)
def scaled_query_bmm(query_NSD, key_NTD, value_NTE):
    """Methods only: the scaled query, bmm, softmax, bmm."""
    return (query_NSD * SCALE).bmm(key_NTD.permute(0, 2, 1)).softmax(dim=2).bmm(value_NTE)


@more(cross, reference=attend)
def multiply_and_sum(query_BHSD, key_BHTD, value_BHTE):
    """Both contractions as a broadcast product and a sum."""
    scores_BHST = (query_BHSD.unsqueeze(-2) * key_BHTD.unsqueeze(-3)).sum(-1) * SCALE
    return (scores_BHST.softmax(-1).unsqueeze(-1) * value_BHTE.unsqueeze(-3)).sum(-2)


@more(single, reference=attend)
def multiply_and_sum_single(query_BSD, key_BTD, value_BTE):
    """The same without heads, the new axes written with None, the last sum keyed by name."""
    scores_BST = torch.sum(query_BSD[:, :, None, :] * key_BTD[:, None, :, :], dim=-1) * SCALE
    return torch.sum(torch.softmax(scores_BST, dim=-1)[..., None] * value_BTE[:, None], dim=2)


@more(cross, reference=attend)
def scores_transposed_twice(query_BHSD, key_BHTD, value_BHTE):
    """The product is key times query, the softmax runs over axis -2, the weights are transposed at the end."""
    scores_BHTS = key_BHTD @ query_BHSD.transpose(-2, -1) * SCALE
    return scores_BHTS.softmax(-2).transpose(-2, -1) @ value_BHTE


@more(square, reference=lambda query, key, value: attend(key, query, value))
def roles_exchanged(query_BHSD, key_BHTD, value_BHTE):
    """The scores are transposed between product and softmax: what is called key asks, what is called query answers."""
    scores_BHST = query_BHSD @ key_BHTD.transpose(-2, -1) * query_BHSD.shape[-1] ** -0.5
    return scores_BHST.transpose(-2, -1).softmax(-1) @ value_BHTE


@more(cross, reference=lambda query, key, value: attend(query, key, value).mT)
def output_transposed(query_BHSD, key_BHTD, value_BHTE):
    """The values stand on the left of the transposed weights; the output is [B, H, E, S]."""
    weights_BHST = (query_BHSD @ key_BHTD.mT * SCALE).softmax(-1)
    return value_BHTE.mT @ weights_BHST.mT


@more(square, reference=lambda query, key, value: attend(query, key, value).mT)
def output_transposed_square(query_BHSD, key_BHTD, value_BHTE):
    """The same with every axis of one size and the softmax over axis -2 of transposed scores."""
    weights_BHTS = (key_BHTD @ query_BHSD.mT / query_BHSD.shape[-1] ** 0.5).softmax(-2)
    return value_BHTE.mT @ weights_BHTS


@more(flat, reference=attend)
def linear_as_product(query_SD, key_TD, value_TE):
    """F.linear contracts with the key, and with the transposed value, as if they were weights."""
    weights_ST = F.softmax(F.linear(query_SD * SCALE, key_TD), -1)
    return F.linear(weights_ST, value_TE.t())


@more(flat, reference=attend)
def inner_and_mm(query_SD, key_TD, value_TE):
    """torch.inner for the scores, torch.mm for the values."""
    return torch.mm(torch.softmax(torch.inner(query_SD, key_TD) * SCALE, 1), value_TE)


@more(flat, reference=attend)
def tensordot(query_SD, key_TD, value_TE):
    """tensordot names the contracted axes."""
    weights_ST = (torch.tensordot(query_SD, key_TD, dims=([1], [1])) * SCALE).softmax(-1)
    return torch.tensordot(weights_ST, value_TE, dims=1)


@more(same, reference=lambda query, key, value: attend(query, key, value, scale=SCALE) + query)
def baddbmm_residual(query_BHSD, key_BHTD, value_BHTE):
    """baddbmm adds the residual to the value product."""
    query_NSD, key_NTD, value_NTE = (x.flatten(0, 1) for x in (query_BHSD, key_BHTD, value_BHTE))
    weights_NST = torch.bmm(query_NSD, key_NTD.transpose(1, 2)).mul_(SCALE).softmax(-1)
    return torch.baddbmm(query_NSD, weights_NST, value_NTE).view(B, H, S, D)


@more(cross, reference=attend)
def value_product_over_slices(query_BHSD, key_BHTD, value_BHTE):
    """The value product is a sum of two products over halves of the keys."""
    weights = (query_BHSD @ key_BHTD.swapaxes(-1, -2) * SCALE).softmax(-1)
    half = T // 2
    return weights[..., :half] @ value_BHTE[..., :half, :] + weights[..., half:] @ value_BHTE[..., half:, :]


@more(cross, reference=attend)
def product_over_slices_of_width(query_BHSD, key_BHTD, value_BHTE):
    """The score product is a sum of two products over halves of the width."""
    (q1, q2), (k1, k2) = query_BHSD.chunk(2, -1), key_BHTD.chunk(2, -1)
    scores_BHST = torch.matmul(q1, k1.transpose(-1, -2)) + torch.matmul(q2, k2.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores_BHST * SCALE, -1), value_BHTE)
