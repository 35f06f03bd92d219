"""Layouts: where batch, heads, tokens and channels lie."""

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
    H,
    S,
    T,
    channels_first,
    cross,
    flat,
    same,
    single,
    square,
    square_single,
    tokens_first,
)
from .references import attend, attend_channels_first, attend_tokens_first, merge_heads

more = functools.partial(program, MORE, sites=1)


def keys_transposed(rand: Rand) -> Inputs:
    query_BHSD, key_BHTD, value_BHTE = cross(rand)
    return query_BHSD, key_BHTD.mT.contiguous(), value_BHTE


@more(keys_transposed, reference=lambda query, key, value: attend(query, key.mT, value))
def keys_stored_BHDT(query_BHSD, key_BHDT, value_BHTE):
    """The key is stored transposed; no transpose is left in the program."""
    return (query_BHSD @ key_BHDT * SCALE).softmax(-1) @ value_BHTE


@more(square, reference=lambda query, key, value: attend(query, key.mT, value))
def keys_stored_BHDT_square(query_BHSD, key_BHDT, value_BHTE):
    """The same with every axis of one size."""
    return (query_BHSD @ key_BHDT / key_BHDT.shape[-2] ** 0.5).softmax(-1) @ value_BHTE


@more(square, reference=lambda query, key, value: attend(query, key, value.mT))
def values_stored_BHET(query_BHSD, key_BHTD, value_BHET):
    """The value is stored transposed, with every axis of one size."""
    return (query_BHSD @ key_BHTD.mT / key_BHTD.shape[-1] ** 0.5).softmax(-1) @ value_BHET.mT


@more(
    square,
    reference=lambda query, key, value: attend(
        query.permute(2, 1, 0, 3), key.permute(1, 3, 2, 0), value.permute(3, 2, 1, 0)
    ),
)
def all_stored_differently(query_SHBD, key_DBTH, value_ETHB):
    """Three layouts for three tensors, with every axis of one size."""
    scores = query_SHBD.permute(2, 1, 0, 3) @ key_DBTH.permute(1, 3, 0, 2) * key_DBTH.shape[0] ** -0.5
    return scores.softmax(-1) @ value_ETHB.permute(3, 2, 1, 0)


@more(tokens_first, reference=lambda query, key, value: attend_tokens_first(query, key, value).flatten(2))
def tokens_first_permuted(query_BSHD, key_BTHD, value_BTHE):
    """Permuted to heads first, key and value in one step, and back; the heads are merged."""
    scores_BHST = torch.matmul(query_BSHD.permute(0, 2, 1, 3), key_BTHD.permute(0, 2, 3, 1)) * SCALE
    output_BHSE = torch.matmul(scores_BHST.softmax(-1), value_BTHE.permute(0, 2, 1, 3))
    output_BSHE = output_BHSE.permute(0, 2, 1, 3).contiguous()
    return output_BSHE.view(*output_BSHE.size()[:-2], -1)


@more(single, reference=attend)
def single_head(query_BSD, key_BTD, value_BTE):
    """One head, without an axis for it."""
    return F.softmax(torch.bmm(query_BSD, key_BTD.transpose(1, 2)) / D**0.5, dim=-1).bmm(value_BTE)


@more(square_single, reference=attend)
def single_head_square(query_BSD, key_BTD, value_BTE):
    """The same with batch, tokens and widths of one size."""
    return torch.softmax(query_BSD @ key_BTD.transpose(1, 2) * key_BTD.shape[-1] ** -0.5, dim=2) @ value_BTE


@more(flat, reference=attend)
def matrices(query_SD, key_TD, value_TE):
    """Neither batch nor heads, as in a textbook: softmax(QKᵀ/√d)V."""
    return torch.softmax(query_SD @ key_TD.T / D**0.5, dim=1) @ value_TE


def one_vector(rand: Rand) -> Inputs:
    return rand(D), rand(T, D), rand(T, E)


@more(one_vector, reference=lambda query, key, value: attend(query[None], key, value)[0])
def one_query_vector(query_D, key_TD, value_TE):
    """A vector asks: matrix times vector, softmax over axis 0, vector times matrix."""
    return (torch.mv(key_TD, query_D) * SCALE).softmax(0) @ value_TE


def decoder_state(rand: Rand) -> Inputs:
    return rand(B, D), rand(B, T, D)


@more(decoder_state, reference=lambda state, encoded: attend(state[:, None], encoded, encoded, scale=1.0)[:, 0])
def one_query_luong(state_BD, encoded_BTD):
    """Luong: the decoder state asks the encoder's outputs, which are keys and values; squeezed axes."""
    weights_BT = F.softmax(torch.bmm(encoded_BTD, state_BD.unsqueeze(2)).squeeze(2), dim=1)
    return torch.bmm(weights_BT.unsqueeze(1), encoded_BTD).squeeze(1)


@more(lambda rand: (rand(B, S, D),), reference=lambda x_BSD: attend(x_BSD, x_BSD, x_BSD, scale=1.0))
def self_similarity(x_BSD):
    """One tensor is query, key and value, and nothing is projected."""
    return (x_BSD @ x_BSD.transpose(1, 2)).softmax(-1) @ x_BSD


# ---------------------------------------------------------------- channels first


@more(channels_first, reference=attend_channels_first)
def channels_first_einsum(query_BCS, key_BCT, value_BCT):
    """Diffusion: einsum over tokens that come last."""
    weights_BST = torch.einsum("bci,bcj->bij", query_BCS, key_BCT).mul(SCALE).softmax(dim=-1)
    return torch.einsum("bij,bcj->bci", weights_BST, value_BCT)


def pixels(rand: Rand) -> Inputs:
    """query_BCXY, key_BCXY, value_BCXY."""
    return rand(B, D, 3, 4), rand(B, D, 3, 4), rand(B, D, 3, 4)


@more(pixels, reference=lambda *qkv: attend_channels_first(*(x.flatten(2) for x in qkv)).view(B, D, 3, 4))
def channels_first_vqgan(query_BCXY, key_BCXY, value_BCXY):
    """VQGAN: the query is permuted, the key is not; the value stands left of the permuted weights."""
    b, c, x, y = query_BCXY.shape
    query_BSC = query_BCXY.reshape(b, c, x * y).permute(0, 2, 1)
    weights_BST = torch.bmm(query_BSC, key_BCXY.reshape(b, c, x * y)) * (int(c) ** (-0.5))
    weights_BTS = F.softmax(weights_BST, dim=2).permute(0, 2, 1)
    return torch.bmm(value_BCXY.reshape(b, c, x * y), weights_BTS).reshape(b, c, x, y)


@more(square_single, reference=attend_channels_first)
def channels_first_square(query_BCS, key_BCT, value_BCT):
    """The same with batch, channels and tokens of one size."""
    weights_BST = F.softmax(torch.bmm(query_BCS.permute(0, 2, 1), key_BCT) * key_BCT.shape[1] ** -0.5, dim=2)
    return torch.bmm(value_BCT, weights_BST.permute(0, 2, 1))


def fused_channels(rand: Rand) -> Inputs:
    """qkv_BCS, with three times four heads of width D in the channels."""
    return (rand(B, 3 * 4 * D, S),)


def guided_reference(qkv_BCS):
    query, key, value = qkv_BCS.view(B, 4, 3, D, S).unbind(2)
    return attend_channels_first(query, key, value).reshape(B, 4 * D, S)


@more(fused_channels, reference=guided_reference)
def channels_first_guided_diffusion(qkv_BCS):
    """Guided diffusion: heads fold into the batch before the split, and both operands are scaled."""
    bs, width, length = qkv_BCS.shape
    ch = width // (3 * 4)
    query_NCS, key_NCT, value_NCT = qkv_BCS.reshape(bs * 4, ch * 3, length).split(ch, dim=1)
    scale = ch**-0.25
    weight = torch.einsum("bct,bcs->bts", query_NCS * scale, key_NCT * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, value_NCT).reshape(bs, -1, length)


def fused_pixels(rand: Rand) -> Inputs:
    return (rand(B, 3 * 4 * D, 2, 5),)


def ddpm_reference(qkv_BCXY):
    query, key, value = qkv_BCXY.view(B, 3, 4, D, 10).unbind(1)
    return attend_channels_first(query, key, value).reshape(B, 4 * D, 2, 5)


@more(fused_pixels, reference=ddpm_reference)
def channels_first_ddpm(qkv_BCXY):
    """lucidrains' diffusion: chunk, then einops with heads beside channels and pixels flattened."""
    query, key, value = (einops.rearrange(t, "b (h c) x y -> b h c (x y)", h=4) for t in qkv_BCXY.chunk(3, dim=1))
    attn = torch.einsum("b h d i, b h d j -> b h i j", query * SCALE, key).softmax(dim=-1)
    out = torch.einsum("b h i j, b h d j -> b h i d", attn, value)
    return einops.rearrange(out, "b h (x y) d -> b (h d) x y", x=qkv_BCXY.shape[2])


@more(same, reference=lambda query, key, value: attend(query.mT, key.mT, value.mT, scale=1.0).mT)
def tokens_are_channels(query_BHSC, key_BHSC, value_BHSC):
    """XCiT, Restormer: channels ask channels; keys and queries are contracted over the positions."""
    weights_BHCC = (query_BHSC.transpose(-2, -1) @ key_BHSC).softmax(dim=-1)
    return (weights_BHCC @ value_BHSC.transpose(-2, -1)).transpose(-2, -1)


# ---------------------------------------------------------------- folded and cut axes


def opt_reference(query, key, value, mask_B1ST):
    return attend(query, key, value, mask_B1ST).transpose(1, 2).reshape(B, S, H * E)


def with_float_mask(rand: Rand) -> Inputs:
    return *cross(rand), rand(B, 1, S, T)


@more(with_float_mask, reference=opt_reference)
def heads_folded_for_products(query_BHSD, key_BHTD, value_BHTE, mask_B1ST):
    """BART and OPT: folded for both products, unfolded for the mask, and folded again."""
    query_NSD, key_NTD = (query_BHSD * SCALE).reshape(B * H, S, D), key_BHTD.reshape(B * H, -1, D)
    scores_NST = torch.bmm(query_NSD, key_NTD.transpose(1, 2))
    scores_NST = (scores_NST.view(B, H, S, T) + mask_B1ST).view(B * H, S, T)
    weights_NST = F.softmax(scores_NST, dim=-1)
    output_NSE = torch.bmm(F.dropout(weights_NST, p=0.1, training=False), value_BHTE.reshape(B * H, -1, E))
    return output_NSE.view(B, H, S, E).transpose(1, 2).reshape(B, S, H * E)


@more(lambda rand: (rand(B, S, 4 * D), rand(B, T, 4 * D)))
def heads_folded_in_front(query_BSC, context_BTC):
    """Set Transformer: heads are split from the channels and concatenated to the batch, heads first."""
    query_NSD, context_NTD = (torch.cat(x.split(D, 2), 0) for x in (query_BSC, context_BTC))
    weights_NST = torch.softmax(query_NSD.bmm(context_NTD.transpose(1, 2)) / (4 * D) ** 0.5, 2)
    return torch.cat((query_NSD + weights_NST.bmm(context_NTD)).split(query_BSC.size(0), 0), 2)


@more(
    same,
    reference=lambda *qkv: attend(*(x.unflatten(2, (2, S // 2)) for x in qkv)).flatten(2, 3),
)
def blocks_of_tokens(query_BHSD, key_BHTD, value_BHTE):
    """Local attention: the tokens are cut into two blocks, each of which reads itself."""
    query, key, value = (x.reshape(B, H, 2, S // 2, D) for x in (query_BHSD, key_BHTD, value_BHTE))
    return ((query @ key.transpose(-2, -1) * SCALE).softmax(-1) @ value).reshape(B, H, S, D)


@more(lambda rand: (rand(B, 3, 5, D),), reference=lambda x_BXYC: attend(*[x_BXYC.transpose(1, 2)] * 3))
def axial_columns(x_BXYC):
    """Axial: the columns of an image fold into the batch, every pixel reads its column."""
    b, x, y, c = x_BXYC.shape
    x_NXC = x_BXYC.permute(0, 2, 1, 3).reshape(b * y, x, c)
    return (torch.baddbmm(x_NXC.new_zeros(1, 1, 1), x_NXC, x_NXC.mT, alpha=SCALE).softmax(-1) @ x_NXC).view(b, y, x, c)


def latents_and_inputs(rand: Rand) -> Inputs:
    return rand(5, D), rand(B, T, D)


@more(latents_and_inputs, reference=lambda latents, x: attend(latents.expand(B, 5, D), x, x))
def learned_queries(latents_SD, x_BTD):
    """Perceiver: learned queries are repeated over the batch."""
    query_BSD = einops.repeat(latents_SD, "n d -> b n d", b=x_BTD.shape[0])
    sim = torch.einsum("b i d, b j d -> b i j", query_BSD, x_BTD) * SCALE
    return torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), x_BTD)


@more(latents_and_inputs, reference=lambda latents, x: attend(latents.expand(B, 5, D), x, x))
def learned_queries_shared(latents_SD, x_BTD):
    """The learned queries broadcast in the product; they never get a batch."""
    return F.softmax(latents_SD @ x_BTD.transpose(1, 2) * SCALE, dim=-1) @ x_BTD


@more(cross, reference=lambda *qkv: merge_heads(attend(*qkv)))
def vmapped_heads(query_BHSD, key_BHTD, value_BHTE):
    """One head is written, and mapped over batch and heads."""

    def head(query_SD, key_TD, value_TE):
        return (query_SD @ key_TD.T * SCALE).softmax(-1) @ value_TE

    return torch.vmap(torch.vmap(head))(query_BHSD, key_BHTD, value_BHTE).transpose(1, 2).flatten(2)
