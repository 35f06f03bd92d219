"""The softmax, written in other ways."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import MORE, program
from .inputs import SCALE, T, cross, same
from .references import attend

more = functools.partial(program, MORE, sites=1)


def scores_of(query_BHSD: Tensor, key_BHTD: Tensor) -> Tensor:
    """[B, H, S, T], scaled."""
    return query_BHSD @ key_BHTD.transpose(-2, -1) * SCALE


def attend_off_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One more key that is zero, whose value is zero."""
    return attend(query, F.pad(key, (0, 0, 1, 0)), F.pad(value, (0, 0, 1, 0)))


@more(cross, reference=attend)
def exp_of_log_softmax(query_BHSD, key_BHTD, value_BHTE):
    """The exponential of a log-softmax."""
    return scores_of(query_BHSD, key_BHTD).log_softmax(-1).exp() @ value_BHTE


@more(cross, reference=attend)
def exp_minus_logsumexp(query_BHSD, key_BHTD, value_BHTE):
    """The exponential of the scores minus their logsumexp."""
    scores = scores_of(query_BHSD, key_BHTD)
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ value_BHTE


@more(cross, reference=attend)
def exp_over_sum(query_BHSD, key_BHTD, value_BHTE):
    """No maximum is subtracted."""
    exponentials = scores_of(query_BHSD, key_BHTD).exp()
    return exponentials / exponentials.sum(-1, keepdim=True) @ value_BHTE


@more(cross, reference=attend)
def exp_times_reciprocal(query_BHSD, key_BHTD, value_BHTE):
    """The sum loses its axis, gets it back, and its reciprocal multiplies the values' product."""
    exponentials = torch.exp(scores_of(query_BHSD, key_BHTD))
    return torch.matmul(exponentials, value_BHTE) * torch.reciprocal(exponentials.sum(dim=-1)).unsqueeze(-1)


@more(cross, reference=attend)
def exp2(query_BHSD, key_BHTD, value_BHTE):
    """Flash kernels: powers of two, log2(e) is part of the scale."""
    scores = query_BHSD @ key_BHTD.mT * (SCALE * math.log2(math.e))
    exponentials = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True) @ value_BHTE


@more(cross, reference=attend)
def global_maximum(query_BHSD, key_BHTD, value_BHTE):
    """One maximum of all scores is subtracted before the softmax."""
    scores = scores_of(query_BHSD, key_BHTD)
    return F.softmax(scores - scores.max(), dim=-1) @ value_BHTE


@more(cross, reference=attend)
def detached_maximum(query_BHSD, key_BHTD, value_BHTE):
    """x-transformers: the softmax is made stable by hand with a maximum that is detached."""
    scores = scores_of(query_BHSD, key_BHTD)
    return (scores - scores.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1) @ value_BHTE


@more(cross, reference=attend)
def relaxed_precision(query_BHSD, key_BHTD, value_BHTE):
    """CogView: the scores are divided by 32, shifted by their maximum, and multiplied by 32."""
    scores = query_BHSD / (32.0 / SCALE) @ key_BHTD.transpose(-1, -2)
    scores = (scores - scores.max(dim=-1, keepdim=True)[0]) * 32.0
    return nn.Softmax(dim=-1)(scores) @ value_BHTE


@more(cross, reference=attend)
def normalise_l1(query_BHSD, key_BHTD, value_BHTE):
    """F.normalize with p=1 divides the exponentials by their sum."""
    return F.normalize(scores_of(query_BHSD, key_BHTD).exp(), p=1.0, dim=-1) @ value_BHTE


@more(cross, reference=attend)
def epsilon_in_denominator(query_BHSD, key_BHTD, value_BHTE):
    """A tiny number keeps the denominator away from zero."""
    scores = scores_of(query_BHSD, key_BHTD)
    exponentials = (scores - scores.amax(-1, True)).exp()
    return exponentials / (exponentials.sum(-1, True) + 1e-9) @ value_BHTE


@more(cross, reference=attend)
def ones_beside_values(query_BHSD, key_BHTD, value_BHTE):
    """A column of ones beside the values makes the value product compute the row sum too."""
    extended = torch.cat([value_BHTE, torch.ones_like(value_BHTE[..., :1])], -1)
    output = scores_of(query_BHSD, key_BHTD).exp() @ extended
    return output[..., :-1] / output[..., -1:]


@more(cross, reference=attend)
def sum_by_einsum(query_BHSD, key_BHTD, value_BHTE):
    """Numerator and denominator are both einsum."""
    exponentials = torch.exp(torch.einsum("bhqd,bhkd->bhqk", query_BHSD * SCALE, key_BHTD))
    numerator = torch.einsum("bhqk,bhke->bhqe", exponentials, value_BHTE)
    return numerator / torch.einsum("bhqk->bhq", exponentials)[..., None]


@more(cross, reference=attend)
def online_softmax(query_BHSD, key_BHTD, value_BHTE):
    """Flash attention by hand: two blocks of keys, running maximum and sum; one attention."""
    maximum = torch.full_like(query_BHSD[..., :1], -torch.inf)
    total, output = torch.zeros_like(maximum), 0.0
    for key, value in zip(key_BHTD.split(T // 2, 2), value_BHTE.split(T // 2, 2), strict=True):
        scores = scores_of(query_BHSD, key)
        raised = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        exponentials, correction = torch.exp(scores - raised), torch.exp(maximum - raised)
        total = total * correction + exponentials.sum(-1, keepdim=True)
        output, maximum = output * correction + exponentials @ value, raised
    return output / total


@more(cross, reference=attend_off_by_one)
def off_by_one(query_BHSD, key_BHTD, value_BHTE):
    """The denominator has one more, as if a zero key with a zero value stood in front."""
    scores = scores_of(query_BHSD, key_BHTD)
    maximum = scores.amax(-1, keepdim=True).clamp(min=0)
    exponentials = (scores - maximum).exp()
    return exponentials / (torch.exp(-maximum) + exponentials.sum(-1, keepdim=True)) @ value_BHTE


@more(cross, reference=attend_off_by_one)
def off_by_one_padded(query_BHSD, key_BHTD, value_BHTE):
    """The same by a zero score that is padded in front and dropped behind the softmax."""
    return F.pad(scores_of(query_BHSD, key_BHTD), (1, 0), value=0.0).softmax(-1)[..., 1:] @ value_BHTE


@more(cross, reference=attend)
def softmin_of_negative(query_BHSD, key_BHTD, value_BHTE):
    """softmin of negated scores."""
    return F.softmin(-scores_of(query_BHSD, key_BHTD), dim=-1) @ value_BHTE


@more(cross, reference=functools.partial(attend, scale=-1.0))
def distance_softmax(query_BHSD, key_BHTD, value_BHTE):
    """DANet: the row maximum minus the scores, which are not scaled; the scale is -1."""
    energy = query_BHSD @ key_BHTD.transpose(-2, -1)
    energy = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
    return F.softmax(energy, dim=-1) @ value_BHTE


@more(cross, reference=attend)
def softmax_in_float64(query_BHSD, key_BHTD, value_BHTE):
    """Widened to float64 for the softmax only."""
    return torch.softmax(scores_of(query_BHSD, key_BHTD), -1, dtype=torch.float64).to(value_BHTE.dtype) @ value_BHTE


@more(functools.partial(same, dtype=torch.float16), reference=attend)
def half_precision(query_BHSD, key_BHTD, value_BHTE):
    """float16 throughout, the cast around the softmax by .float() and .type_as()."""
    scores = torch.matmul(query_BHSD * SCALE, key_BHTD.transpose(-1, -2))
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), value_BHTE)


def attend_bfloat16(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value).bfloat16()


@more(cross, reference=attend_bfloat16)
def autocast(query_BHSD, key_BHTD, value_BHTE):
    """An autocast region makes the products bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.matmul(torch.matmul(query_BHSD, key_BHTD.mT).mul(SCALE).softmax(-1), value_BHTE)


@more(functools.partial(same, dtype=torch.bfloat16), reference=attend)
def autocast_off(query_BHSD, key_BHTD, value_BHTE):
    """GPT-2 upcast: an autocast-free island computes scores and softmax in float32."""
    with torch.autocast("cpu", enabled=False):
        scores = torch.matmul(query_BHSD.float(), key_BHTD.float().transpose(-1, -2)) * SCALE
        weights = nn.functional.softmax(scores, dim=-1)
    return torch.matmul(weights.type(value_BHTE.dtype), value_BHTE)


@more(cross, reference=attend)
def softmax_axis_computed(query_BHSD, key_BHTD, value_BHTE):
    """The axis of the softmax is positional, not negative and computed; the function is torch.special's."""
    scores = scores_of(query_BHSD, key_BHTD)
    return torch.special.softmax(scores, scores.dim() - 1) @ value_BHTE


@more(cross, reference=attend)
def softmax_on_last_of_moved_axes(query_BHSD, key_BHTD, value_BHTE):
    """The keys are moved to the front for the softmax and back for the values."""
    weights = scores_of(query_BHSD, key_BHTD).movedim(-1, 0).softmax(0).movedim(0, -1)
    return weights @ value_BHTE


@more(cross, reference=attend)
def softmax_of_folded_scores(query_BHSD, key_BHTD, value_BHTE):
    """The scores are a matrix [B*H*S, T] while they are normalised."""
    scores = scores_of(query_BHSD, key_BHTD)
    return scores.reshape(-1, scores.shape[-1]).softmax(1).view_as(scores).matmul(value_BHTE)
