"""Not attention, because the weights are something else: no softmax of a product of queries and keys.

As far as shapes go, every axis has one size, so that a rewrite to attention runs and is wrong.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import MORE_LOOK_ALIKES, Inputs, Rand, program
from .inputs import SIDE, past, square, square_single

look_alike = functools.partial(program, MORE_LOOK_ALIKES, sites=0)


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    """[B, H, S, T], scaled."""
    return query @ key.transpose(-2, -1) * SIDE**-0.5


# ---------------------------------------------------------------- scores of queries and keys, other weights


@look_alike(square)
def softmax_twice(query_BHSD, key_BHTD, value_BHTE):
    """A softmax of a softmax."""
    return scores_of(query_BHSD, key_BHTD).softmax(-1).softmax(-1) @ value_BHTE


@look_alike(square)
def sigmoid_weights(query_BHSD, key_BHTD, value_BHTE):
    """Sigmoid attention: every weight alone."""
    return torch.sigmoid(scores_of(query_BHSD, key_BHTD)) @ value_BHTE


@look_alike(square)
def relu_weights(query_BHSD, key_BHTD, value_BHTE):
    """ReLU of the scores, divided by the number of keys."""
    return F.relu(scores_of(query_BHSD, key_BHTD)) / key_BHTD.shape[-2] @ value_BHTE


@look_alike(square)
def squared_scores(query_BHSD, key_BHTD, value_BHTE):
    """Squares instead of exponentials, normalised over the keys."""
    squares = scores_of(query_BHSD, key_BHTD).square()
    return squares / squares.sum(-1, keepdim=True) @ value_BHTE


@look_alike(square)
def squared_weights(query_BHSD, key_BHTD, value_BHTE):
    """The weights are squared, and not normalised again."""
    return scores_of(query_BHSD, key_BHTD).softmax(-1).square() @ value_BHTE


@look_alike(square)
def log_weights(query_BHSD, key_BHTD, value_BHTE):
    """A log-softmax whose exponential is missing."""
    return F.log_softmax(scores_of(query_BHSD, key_BHTD), dim=-1) @ value_BHTE


@look_alike(square)
def clamped_weights(query_BHSD, key_BHTD, value_BHTE):
    """No weight is smaller than a hundredth, so rows do not sum to one."""
    return scores_of(query_BHSD, key_BHTD).softmax(-1).clamp(min=0.01) @ value_BHTE


@look_alike(square)
def thresholded_weights(query_BHSD, key_BHTD, value_BHTE):
    """Small weights become zero, and the others are not normalised again."""
    weights = scores_of(query_BHSD, key_BHTD).softmax(-1)
    return torch.where(weights > 0.1, weights, 0.0) @ value_BHTE


@look_alike(square)
def hard_weights(query_BHSD, key_BHTD, value_BHTE):
    """The best key alone: one-hot of the argmax."""
    best = scores_of(query_BHSD, key_BHTD).argmax(-1)
    return F.one_hot(best, SIDE).to(value_BHTE.dtype) @ value_BHTE


@look_alike(square)
def mask_only_after_softmax(query_BHSD, key_BHTD, value_BHTE):
    """The future takes part in the sum and is removed after it, so rows do not sum to one."""
    return scores_of(query_BHSD, key_BHTD).softmax(-1).masked_fill(~past(SIDE), 0.0) @ value_BHTE


@look_alike(square)
def mask_only_in_numerator(query_BHSD, key_BHTD, value_BHTE):
    """By hand, the exponentials are masked, their sum is not."""
    exponentials = scores_of(query_BHSD, key_BHTD).exp()
    return (exponentials * past(SIDE)) / exponentials.sum(-1, keepdim=True) @ value_BHTE


@look_alike(square)
def sum_of_other_scores(query_BHSD, key_BHTD, value_BHTE):
    """The denominator belongs to scores without the scale."""
    exponentials = scores_of(query_BHSD, key_BHTD).exp()
    return exponentials / (query_BHSD @ key_BHTD.mT).exp().sum(-1, keepdim=True) @ value_BHTE


@look_alike(square)
def cumulative_sum(query_BHSD, key_BHTD, value_BHTE):
    """The denominator of a key is the sum over the keys up to it."""
    exponentials = scores_of(query_BHSD, key_BHTD).exp()
    return exponentials / exponentials.cumsum(-1) @ value_BHTE


@look_alike(square)
def sinkhorn(query_BHSD, key_BHTD, value_BHTE):
    """Rows and columns are normalised in turn, columns last."""
    log_weights = scores_of(query_BHSD, key_BHTD)
    for _ in range(2):
        log_weights = log_weights - log_weights.logsumexp(-1, keepdim=True)
        log_weights = log_weights - log_weights.logsumexp(-2, keepdim=True)
    return log_weights.exp() @ value_BHTE


@look_alike(lambda rand: (*square(rand), rand(SIDE, SIDE, SIDE, SIDE)))
def gated_scores(query_BHSD, key_BHTD, value_BHTE, gate_BHST):
    """A gate of query and key multiplies the scores: a temperature for every pair."""
    return (scores_of(query_BHSD, key_BHTD) * torch.sigmoid(gate_BHST)).softmax(-1) @ value_BHTE


@look_alike(square)
def retention(query_BHSD, key_BHTD, value_BHTE):
    """Decay instead of a softmax."""
    distance = torch.arange(SIDE)[:, None] - torch.arange(SIDE)[None, :]
    return (scores_of(query_BHSD, key_BHTD) * (0.9**distance).tril()) @ value_BHTE


@look_alike(square_single)
def contrastive(image_BSD, text_BTD, _unused_BTE):
    """CLIP: similarities of two sides, a softmax each way, and no values."""
    scores_BST = F.normalize(image_BSD, dim=-1) @ F.normalize(text_BTD, dim=-1).transpose(1, 2) * 10.0
    return scores_BST.softmax(-1), scores_BST.softmax(-2)


# ---------------------------------------------------------------- weights without a product


@look_alike(square)
def manhattan_distance(query_BHSD, key_BHTD, value_BHTE):
    """A softmax of negative absolute differences: queries and keys meet, but are not multiplied."""
    scores = -(query_BHSD.unsqueeze(-2) - key_BHTD.unsqueeze(-3)).abs().sum(-1) * SIDE**-0.5
    return scores.softmax(-1) @ value_BHTE


@look_alike(square)
def linear_attention_softmax(query_BHSD, key_BHTD, value_BHTE):
    """Efficient attention: a softmax of queries over their width, one of keys over the tokens."""
    context_BHDE = key_BHTD.softmax(-2).transpose(-2, -1) @ value_BHTE
    return query_BHSD.softmax(-1) @ context_BHDE


@look_alike(square)
def linear_attention_softmax_left(query_BHSD, key_BHTD, value_BHTE):
    """The same multiplied from the left: queries times keys, both normalised before, then the values."""
    return (query_BHSD.softmax(-1) @ key_BHTD.softmax(-2).transpose(-2, -1)) @ value_BHTE


@look_alike(square)
def linear_attention_elu(query_BHSD, key_BHTD, value_BHTE):
    """Positive features instead of exponentials, normalised over the keys."""
    query, key = F.elu(query_BHSD) + 1, F.elu(key_BHTD) + 1
    total = query @ key.sum(-2, keepdim=True).transpose(-2, -1)
    return (query @ (key.transpose(-2, -1) @ value_BHTE)) / total


@look_alike(square_single)
def attention_free(query_BTC, key_BTC, value_BTC):
    """Attention-free transformer: keys are their own scores, channel by channel; the query is a gate."""
    weights_BTC = key_BTC.softmax(dim=1)
    return torch.sigmoid(query_BTC) * (weights_BTC * value_BTC).sum(1, keepdim=True)


@look_alike(square_single)
def positions_alone(score_BST, _unused_BTD, value_BTE):
    """Synthesizer: a softmax of scores that are given, times the values."""
    return torch.bmm(score_BST.softmax(-1), value_BTE)


@look_alike(square_single)
def pooled_by_largest_feature(x_BTC, _unused_BTC, value_BTE):
    """Pooling: the score of a token is its largest feature."""
    return (x_BTC.amax(-1).softmax(-1).unsqueeze(1) @ value_BTE).squeeze(1)


@look_alike(square_single)
def lightweight_convolution(x_BTC, kernel_HW_source, _unused):
    """A kernel that a softmax normalised slides over the tokens."""
    kernel_C1W = kernel_HW_source[0, :, None, :3].softmax(-1)
    return F.conv1d(x_BTC.transpose(1, 2), kernel_C1W, padding=1, groups=SIDE).transpose(1, 2)


@look_alike(square)
def soft_argmax(heatmap_BKXY, _unused, _unused_too):
    """Key points: a spatial softmax of a heat map, and the expected coordinates."""
    weights = heatmap_BKXY.flatten(2).softmax(-1).view_as(heatmap_BKXY)
    line = torch.linspace(-1, 1, SIDE)
    return torch.stack([(weights.sum(-2) * line).sum(-1), (weights.sum(-1) * line).sum(-1)], -1)


# ---------------------------------------------------------------- gates and routers


def routed(rand: Rand) -> Inputs:
    """x_NC, router_CK and experts_KCF."""
    return rand(SIDE, SIDE), rand(SIDE, SIDE), rand(SIDE, SIDE, SIDE)


@look_alike(routed)
def router_topk_after_softmax(x_NC, router_CK, experts_KCF):
    """Mixtral: a softmax over experts, the best two, normalised again, a weighted sum of their outputs."""
    gates_NK, chosen_NK = (x_NC @ router_CK).softmax(-1).topk(2, dim=-1)
    gates_NK = gates_NK / gates_NK.sum(-1, keepdim=True)
    outputs_NKF = torch.einsum("nc,nkcf->nkf", x_NC, experts_KCF[chosen_NK])
    return (outputs_NKF * gates_NK.unsqueeze(-1)).sum(1)


@look_alike(routed)
def router_topk_before_softmax(x_NC, router_CK, experts_KCF):
    """GPT-OSS: the best two experts first, the softmax over those, combined by a batched product."""
    best_NK, chosen_NK = torch.topk(x_NC @ router_CK, 2, dim=-1)
    outputs_NKF = torch.einsum("nc,nkcf->nkf", x_NC, experts_KCF[chosen_NK])
    return torch.bmm(best_NK.softmax(-1).unsqueeze(1), outputs_NKF).squeeze(1)


@look_alike(routed)
def router_scattered(x_NC, router_CK, experts_KCF):
    """The gates of the best two are scattered into zeros, and all experts run."""
    gates, chosen = (x_NC @ router_CK).softmax(-1).topk(2, dim=-1)
    gates_NK = torch.zeros_like(x_NC @ router_CK).scatter(-1, chosen, gates)
    return torch.einsum("nk,nkf->nf", gates_NK, torch.einsum("nc,kcf->nkf", x_NC, experts_KCF))


@look_alike(square_single)
def gumbel_gate(logits_BSC, noise_BSC, x_BSC):
    """A Gumbel softmax over channels with given noise, times the activations."""
    gumbel = -torch.log(-torch.log(torch.sigmoid(noise_BSC)))
    return ((logits_BSC + gumbel) / 0.5).softmax(-1) * x_BSC


@look_alike(square_single)
def squeeze_and_excite(x_BSC, weight_BCC, _unused):
    """A softmax over channels of a projected mean scales the channels of all tokens."""
    gate_B1C = (x_BSC.mean(1, keepdim=True) @ weight_BCC).softmax(-1)
    return x_BSC * gate_B1C


@look_alike(square_single)
def classifier(x_BSC, weight_BCC, embedding_BCC):
    """Classes from a softmax; the best one is looked up in a table."""
    probabilities = (x_BSC @ weight_BCC).softmax(-1)
    return probabilities, F.embedding(probabilities.argmax(-1), embedding_BCC[0])
