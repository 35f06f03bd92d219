"""Not attention, because an axis is the wrong one: what is normalised is not what is contracted with the values.

Every axis has one size, so every program runs, and a rewrite to attention runs too and is wrong.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import MORE_LOOK_ALIKES, program
from .inputs import SIDE, square, square_single

look_alike = functools.partial(program, MORE_LOOK_ALIKES, sites=0)


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    """[B, H, S, T], scaled."""
    return query @ key.transpose(-2, -1) * SIDE**-0.5


@look_alike(square)
def einsum_softmax_over_heads(query_BSHD, key_BTHD, value_BTHE):
    """The scores are [B, H, S, T], the softmax runs over axis 1."""
    weights_BHST = torch.einsum("bqhd,bkhd->bhqk", query_BSHD, key_BTHD).mul(SIDE**-0.5).softmax(1)
    return torch.einsum("bhqk,bkhd->bqhd", weights_BHST, value_BTHE)


@look_alike(square)
def einsum_softmax_over_heads_last(query_BSHD, key_BTHD, value_BTHE):
    """The scores are [B, S, T, H], so the last axis, over which the softmax runs, is that of the heads."""
    weights_BSTH = torch.einsum("bqhd,bkhd->bqkh", query_BSHD, key_BTHD).mul(SIDE**-0.5).softmax(-1)
    return torch.einsum("bqkh,bkhd->bqhd", weights_BSTH, value_BTHE)


@look_alike(square)
def einsum_softmax_over_queries(query_BSHD, key_BTHD, value_BTHE):
    """The scores are [B, H, T, S], so the last axis is that of the queries; the keys are contracted."""
    weights_BHTS = torch.einsum("bkhd,bqhd->bhkq", key_BTHD, query_BSHD).mul(SIDE**-0.5).softmax(-1)
    return torch.einsum("bhkq,bkhd->bqhd", weights_BHTS, value_BTHE)


@look_alike(square)
def einsum_contract_queries(query_BHSD, key_BHTD, value_BHSE):
    """The softmax runs over the keys, the value product contracts the queries."""
    weights_BHST = torch.einsum("bhqd,bhkd->bhqk", query_BHSD, key_BHTD).mul(SIDE**-0.5).softmax(-1)
    return torch.einsum("bhqk,bhqe->bhke", weights_BHST, value_BHSE)


@look_alike(square)
def einsum_contract_heads(query_BHSD, key_BHTD, value_BHTE):
    """The softmax runs over the keys, the value product sums over the heads and keeps the keys."""
    weights_BHST = torch.einsum("bhqd,bhkd->bhqk", query_BHSD, key_BHTD).mul(SIDE**-0.5).softmax(-1)
    return torch.einsum("bhqk,bhke->bqke", weights_BHST, value_BHTE)


@look_alike(square)
def weights_permuted_to_heads(query_BHSD, key_BHTD, value_BTHE):
    """The weights are permuted to [B, T, S, H], so that matmul contracts the heads."""
    return scores_of(query_BHSD, key_BHTD).softmax(-1).permute(0, 3, 2, 1) @ value_BTHE


@look_alike(square_single)
def values_left_of_weights(query_BSD, key_BTD, value_BES):
    """The values stand left of weights that were not transposed: the queries are contracted."""
    weights_BST = F.softmax(torch.bmm(query_BSD, key_BTD.transpose(1, 2)) * SIDE**-0.5, dim=2)
    return torch.bmm(value_BES, weights_BST)


@look_alike(square_single)
def channels_first_softmax_over_queries(query_BCS, key_BCT, value_BCT):
    """VQGAN's product with the softmax over axis 1, which is that of the queries."""
    weights_BST = torch.einsum("bci,bcj->bij", query_BCS, key_BCT).mul(SIDE**-0.5).softmax(1)
    return torch.einsum("bij,bcj->bci", weights_BST, value_BCT)


@look_alike(square_single)
def channels_on_the_wrong_side(query_BSC, key_BSC, value_BSC):
    """Channels ask channels, normalised over the last, but the value product contracts the first."""
    weights_BCC = (query_BSC.transpose(1, 2) @ key_BSC).softmax(-1)
    return value_BSC @ weights_BCC


@look_alike(square)
def softmax_over_batch(query_BHSD, key_BHTD, value_BHTE):
    """The softmax runs over axis 0."""
    return scores_of(query_BHSD, key_BHTD).softmax(0) @ value_BHTE


@look_alike(square)
def softmax_over_pairs(query_BHSD, key_BHTD, value_BHTE):
    """One softmax over all pairs of query and key."""
    scores = scores_of(query_BHSD, key_BHTD)
    return scores.flatten(-2).softmax(-1).view_as(scores) @ value_BHTE


@look_alike(square)
def softmax_over_heads_and_keys(query_BHSD, key_BHTD, value_BHTE):
    """One softmax over heads and keys together."""
    scores_BSHT = scores_of(query_BHSD, key_BHTD).transpose(1, 2)
    return scores_BSHT.flatten(2).softmax(2).view_as(scores_BSHT).transpose(1, 2) @ value_BHTE


@look_alike(square)
def softmax_in_blocks(query_BHSD, key_BHTD, value_BHTE):
    """The keys are viewed as two blocks, and each block is normalised alone."""
    scores = scores_of(query_BHSD, key_BHTD)
    blocks = scores.view(*scores.shape[:-1], 2, SIDE // 2)
    return blocks.softmax(-1).view(scores.shape) @ value_BHTE


@look_alike(square)
def softmax_across_blocks(query_BHSD, key_BHTD, value_BHTE):
    """The same view, normalised over the number of the block."""
    scores = scores_of(query_BHSD, key_BHTD)
    return scores.unflatten(-1, (2, SIDE // 2)).softmax(-2).flatten(-2) @ value_BHTE


@look_alike(square)
def row_sum_without_axis(query_BHSD, key_BHTD, value_BHTE):
    """The row sum loses its axis and broadcasts against the wrong one: a bug that runs."""
    exponentials = scores_of(query_BHSD, key_BHTD).exp()
    return exponentials / exponentials.sum(-1) @ value_BHTE


@look_alike(square)
def column_sum(query_BHSD, key_BHTD, value_BHTE):
    """By hand, the maximum over the keys and the sum over the queries."""
    scores = scores_of(query_BHSD, key_BHTD)
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-2, keepdim=True) @ value_BHTE


@look_alike(square)
def column_sum_after_values(query_BHSD, key_BHTD, value_BHTE):
    """The division comes after the value product and is by the sum over the queries."""
    exponentials = scores_of(query_BHSD, key_BHTD).exp()
    return (exponentials @ value_BHTE) / exponentials.sum(-2).unsqueeze(-1)


@look_alike(square)
def logsumexp_over_queries(query_BHSD, key_BHTD, value_BHTE):
    """The logsumexp that is subtracted runs over the queries."""
    scores = scores_of(query_BHSD, key_BHTD)
    return (scores - scores.logsumexp(-2, keepdim=True)).exp() @ value_BHTE


@look_alike(square)
def value_multiplied(query_BHSD, key_BHTD, value_BHST):
    """The weights multiply the values element by element."""
    return scores_of(query_BHSD, key_BHTD).softmax(-1) * value_BHST


@look_alike(square)
def value_multiplied_and_summed_over_queries(query_BHSD, key_BHTD, value_BHTE):
    """A broadcast product of weights and values, summed over the queries instead of the keys."""
    weights_BHST = scores_of(query_BHSD, key_BHTD).softmax(-1)
    return (weights_BHST.unsqueeze(-1) * value_BHTE.unsqueeze(-3)).sum(-3)


@look_alike(square)
def slots(slot_BHSD, key_BHTD, value_BHTE):
    """Slot attention: a softmax over the slots, which compete, then a plain mean over the inputs."""
    weights_BHST = scores_of(slot_BHSD, key_BHTD).softmax(-2) + 1e-8
    return weights_BHST / weights_BHST.sum(-1, keepdim=True) @ value_BHTE


@look_alike(square_single)
def clusters_netvlad(x_BTD, centre_BKD, _unused_BKD):
    """NetVLAD: tokens are assigned to clusters by a softmax over clusters, then summed over tokens."""
    assignment_BTK = (x_BTD @ centre_BKD.transpose(1, 2)).softmax(-1)
    residual_BKD = assignment_BTK.transpose(1, 2) @ x_BTD - assignment_BTK.sum(1).unsqueeze(-1) * centre_BKD
    return F.normalize(residual_BKD, dim=-1)


@look_alike(square_single)
def capsules(vote_BKT, vote_BTK, vote_BKD):
    """Capsule routing: the agreement is normalised over the capsules above and summed over those below."""
    votes_BTKD = vote_BTK[..., None] * vote_BKD[:, None] + vote_BKT.mT[..., None]
    agreement_BTK = torch.zeros_like(vote_BTK)
    for _ in range(2):
        coupling_BTK = agreement_BTK.softmax(-1)
        capsule_BKD = torch.einsum("btk,btkd->bkd", coupling_BTK, votes_BTKD)
        agreement_BTK = agreement_BTK + torch.einsum("btkd,bkd->btk", votes_BTKD, capsule_BKD)
    return capsule_BKD
