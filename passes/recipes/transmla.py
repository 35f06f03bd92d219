"""Grouped-query attention as multi-head latent attention (TransMLA).

The keys of all G groups are one vector k [G·d] for every head, of which head h reads the columns of its group g. Let
[T, P] be orthogonal: T has the d_r columns that are turned, P those that are not.

    q_h·k_g = (T_gᵀ q_h)·(Tᵀ k) + q_h·(P_g Pᵀ k)

Rotation (exact): T and P mix the groups' components of one frequency by principal components; as all of them turn by
the same angle, turning commutes with it. Folding takes `freq_fold` neighbouring frequencies as one, and only the first
components of each go on being turned, by one of its frequencies: this is what loses. What is not turned is put into one
latent with the values: [Pᵀ k / ρ ; v] by its principal components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...rewriter.convert.attention import ConvertedAttention
from ...rewriter.convert.calibrate import Calibration
from ...rewriter.convert.layers import Affine, AttentionLayer, ConversionRefused, Decoder, Rotary
from ...rewriter.convert.rank import even_ranks
from ...rewriter.convert.recipe import Needs, recipe
from .joint_latent import basis, factors, keys_of, stacked
from .mla import pair_columns, put_mla, required_rotary, shared_query

__all__ = ["Split", "TransMLA", "put_split", "rotation"]


@recipe
@dataclass(frozen=True)
class TransMLA:
    """Make grouped-query attention multi-head latent attention: a latent, and one short key with positions.

    `rope_dim` columns of the shared key are turned; without it, as many as the model turns in one head. `freq_fold`
    neighbouring frequencies are taken as one; "auto" takes what predicts the calibration text best. `rank` is that of
    the latent; without it latent and shared key fit into `share` of the bytes that keys and values take.
    """

    rope_dim: int | None = None
    freq_fold: int | Literal["auto"] = "auto"
    rank: int | None = None
    share: float = 0.5
    balance: bool = True

    name: ClassVar[str] = "transmla"
    needs: ClassVar[Needs] = "text"
    exact: ClassVar[str] = "at full rank, when rope_dim is what the model turns in all groups together"

    def convert(self, attentions: Sequence[ConvertedAttention], decoder: Decoder, calibration: Calibration) -> None:
        """Put an MLAMemory and wider queries into every attention. Raises ConversionRefused."""
        folds, ranks = self._folds(decoder), self._ranks(decoder)
        moments = calibration.second_moments({layer.path: stacked(layer) for layer in decoder.layers}, self.name)

        def change(changed: Sequence[ConvertedAttention], fold: int) -> None:
            for attention, layer, rank in zip(changed, decoder.layers, ranks, strict=True):
                moment = moments[layer.path]
                split = rotation(layer, moment, self._width(layer), fold)
                put_split(attention, layer, moment, split, rank, self.balance, self.name)

        losses: dict[int, float] = {}
        for fold in folds if len(folds) > 1 else ():
            tried = [ConvertedAttention.of(layer) for layer in decoder.layers]
            change(tried, fold)
            modules = {layer.path: attention for layer, attention in zip(decoder.layers, tried, strict=True)}
            losses[fold] = calibration.loss(modules, self.name, f"freq_fold {fold}")
            if losses[fold] > min(losses.values()):
                break
        change(attentions, min(losses, key=losses.__getitem__, default=folds[0]))

    def _width(self, layer: AttentionLayer) -> int:
        rotary = required_rotary(layer, self.name)
        return rotary.width if self.rope_dim is None else self.rope_dim

    def _folds(self, decoder: Decoder) -> list[int]:
        """Those that hold for every layer, the smallest first."""
        most = min(required_rotary(layer, self.name).width // 2 for layer in decoder.layers)
        asked = [2**n for n in range(most.bit_length())] if self.freq_fold == "auto" else [self.freq_fold]
        misfits = {
            fold: [(layer, why) for layer in decoder.layers if (why := misfit(layer, self._width(layer), fold))]
            for fold in asked
        }
        if all(misfits.values()):
            layer, why = misfits[asked[-1]][0]
            raise ConversionRefused(layer.path, why)
        return [fold for fold in asked if not misfits[fold]]

    def _ranks(self, decoder: Decoder) -> list[int]:
        widths = [self._width(layer) for layer in decoder.layers]
        ranks = even_ranks(decoder, self.share, sum(widths)) if self.rank is None else [self.rank] * len(widths)
        most = [layer.cached - width for layer, width in zip(decoder.layers, widths, strict=True)]
        return [min(rank, full) for rank, full in zip(ranks, most, strict=True)]


# ** which components are turned **


@dataclass(frozen=True)
class Split:
    """An orthogonal basis of the keys of all groups: `turned` [G·d, d_r], and `plain`, the rest of it.

    Pair i of the turned ones takes angle `frequencies[i]` of the model's.
    """

    turned: Tensor
    plain: Tensor
    frequencies: tuple[int, ...]


def misfit(layer: AttentionLayer, width: int, fold: int) -> str | None:
    """Why so many columns cannot be turned with so many frequencies as one, or None."""
    rotary = required_rotary(layer, TransMLA.name)
    if fold < 1 or rotary.width // 2 % fold:
        return f"freq_fold {fold} does not divide its {rotary.width // 2} frequencies"
    if not 0 < width <= layer.groups * rotary.width:
        return f"rope_dim {width} is not from 1 to the {layer.groups * rotary.width} columns that it turns"
    kept, rest = divmod(width * fold, rotary.width)
    if rest or (fold % kept and kept % fold):
        return (
            f"rope_dim {width} with freq_fold {fold} turns {width * fold / rotary.width:g} components of each fold; "
            f"that has to be a divisor or a multiple of {fold}"
        )
    return None


def rotation(layer: AttentionLayer, moment: Tensor, width: int, fold: int) -> Split:
    """Principal components of each frequency (of `fold` neighbours) over the groups; the first ones are turned."""
    rotary = required_rotary(layer, TransMLA.name)
    groups, keys = layer.groups, keys_of(layer)
    folds, kept = rotary.width // 2 // fold, width * fold // rotary.width
    columns = torch.arange(keys, device=moment.device).view(groups, layer.key_width)
    parts = [columns[:, c].view(groups, folds, fold).transpose(0, 1).flatten(1) for c in pair_columns(rotary)]
    pooled = sum(moment[part[:, :, None], part[:, None, :]] for part in parts)  # one real mix for both of a pair
    vectors = torch.linalg.eigh(pooled)[1].flip(-1)  # [folds, members, components]

    pairs = torch.zeros(keys, 2, *vectors.shape[::2], dtype=moment.dtype, device=moment.device)
    for of_pair, part in enumerate(parts):
        for n in range(folds):
            pairs[part[n], of_pair, n] = vectors[n]
    turned, dropped = pairs[..., :kept].flatten(2), pairs[..., kept:].flatten(1)
    turned = turned if rotary.form == "half" else turned.transpose(1, 2)
    passed = torch.ones(layer.key_width, dtype=torch.bool, device=moment.device)
    passed[rotary.first : rotary.first + rotary.width] = False
    never = torch.eye(keys, dtype=moment.dtype, device=moment.device)[:, columns[:, passed].flatten()]
    step = max(1, fold // kept)
    frequencies = tuple(n * fold + j * step % fold for n in range(folds) for j in range(kept))
    return Split(turned.flatten(1), torch.cat((dropped, never), 1), frequencies)


# ** weights **


def put_split(
    attention: ConvertedAttention,
    layer: AttentionLayer,
    moment: Tensor,
    split: Split,
    rank: int,
    balance: bool,
    recipe: str,
) -> None:
    """Put in what turns `split.turned` of the keys and has the rest in a latent of `rank` numbers with the values."""
    rotary = required_rotary(layer, recipe)
    groups, keys, plain = layer.groups, len(split.plain), split.plain.shape[1]
    values = torch.eye(len(moment) - keys, dtype=moment.dtype, device=moment.device)
    into = torch.block_diag(split.plain, values)  # [k ; v] -> [Pᵀ k ; v]
    vectors, _, rho = basis(into.t() @ moment @ into, plain, balance)
    down, up = factors(vectors[:, :rank], plain, rho)
    turned_bias = plain_bias = None
    if layer.key.bias is not None:
        bias = layer.key.bias.flatten().to(moment)
        turned_bias = split.turned.t() @ bias
        plain_bias = (split.plain @ (split.plain.t() @ bias)).view(groups, -1)
    put_mla(
        attention,
        plain_query=layer.query,
        turned_query=shared_query(layer, split.turned.view(groups, layer.key_width, -1)),
        down=down @ into.t() @ stacked(layer).to(moment),
        turned_key=Affine(split.turned.t() @ layer.key.flat.to(moment), turned_bias),
        up_key=Affine((split.plain @ up[:plain]).view(groups, layer.key_width, -1), plain_bias),
        up_value=Affine(up[plain:].view(groups, layer.value_width, -1), layer.value.bias),
        rotary=Rotary(rotary.form, split.turned.shape[1], 0, rotary.given, split.frequencies),
        recipe=recipe,
    )
