"""Latents of keys and values: native, in every form, and what only looks like one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from latent.rewriter.origins.low_rank import LowRank, MLAForm, low_rank
from origin_tools import attend, sites, text
from torch import Tensor, nn

pytest.importorskip("transformers")

from corpus import ALL
from corpus.latent_attention import EXPECTED
from latent.rewriter.origins.pieces import origins
from latent.rewriter.sites import AttentionSite
from origin_models import corpus_sites, sites_of


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def texts(site: AttentionSite) -> tuple[str, str, str]:
    found = origins(site)
    return text(found.query), text(found.key), text(found.value)


LATENT = "rms(18) width(0:18 of 26) linear(32>26)"


@pytest.mark.parametrize(("name", "form"), [("deepseek_v2", "complex"), ("deepseek_v3", "interleaved")])
@pytest.mark.parametrize(
    ("cache", "decode", "dynamic", "attention", "stored"),
    [
        ("none", False, None, "eager", ""),
        ("dynamic", True, True, "sdpa", "cache(concatenated 2) "),
        ("static", True, None, "eager", "cache(static 2) "),
    ],
)
def test_latent_models(
    name: str, form: str, cache: str, decode: bool, dynamic: bool | None, attention: str, stored: str
) -> None:
    for site in sites_of(name, attention, cache, decode, dynamic):
        query, key, value = texts(site)
        assert query == f"rope({form} 8 at 14) narrow(26>88) rms(26) linear(32>26)"
        assert key == (
            f"width[width(0:14 of each 24) narrow(18>96) {stored}{LATENT} | "
            f"repeat(4) {stored}rope({form} 8) width(18:26 of 26) linear(32>26)]"
        )
        assert value == f"width(14:24 of each 24) narrow(18>96) {stored}{LATENT}"
        found = low_rank(site)
        assert found is not None and found.linear
        assert found.form is (MLAForm.CACHED_LATENT if stored else MLAForm.EXPANDED)
        assert (found.width, found.expanded, len(found.others)) == (18, 96, 1)
        assert found.key.node is found.value.node  # type: ignore[union-attr]
        assert (found.cache is not None) is bool(stored)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3", "gpt_neox"])
def test_other_models_have_no_latent(name: str) -> None:
    assert all(low_rank(site) is None for site in sites_of(name))


CORPUS_FORMS = {
    "latent_absorbed": MLAForm.ABSORBED,
    "latent_absorbed_heads_first": MLAForm.ABSORBED,
    "latent_absorbed_concatenated": MLAForm.ABSORBED,
    "latent_absorbed_call": MLAForm.ABSORBED,
    "latent_expanded": MLAForm.EXPANDED,
    "latent_expanded_into_slices": MLAForm.EXPANDED,
    "latent_without_rotary": MLAForm.EXPANDED,
}


@pytest.mark.parametrize("name", CORPUS_FORMS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_latents_of_the_corpus(name: str, dynamic: bool) -> None:
    if dynamic and not ALL[name].dynamic_ok:
        pytest.skip(ALL[name].reason)
    (site,) = corpus_sites(name, dynamic)
    found = low_rank(site)
    assert found is not None and found.form is CORPUS_FORMS[name] and found.linear
    latent = found.latent.meta["val"]
    assert latent.shape[-1] == (12 if not dynamic else latent.shape[-1])


UNSEEN = {
    "mla_padded": "a sum of padded tensors is no join",
    "mla_grouped_latents": "latents with an axis of heads",
    "mla_padded_values": "zeros beside values",
    "mla_adapter": "a sum of two products",
    "mla_head_modules": "a stack of products",
}
"""Latents that are not found, knowingly."""

NOT_BY_LINEARITY = {
    "mla_cache_expanded": "the latents of earlier tokens are gone",
}
"""Keys and values are linear in the latent, and yet not both can stay there."""


def expectations() -> list[Any]:
    """One layer in four, unless slow tests are asked for."""
    return [pytest.param(name, id=name, marks=[pytest.mark.slow] if n % 4 else []) for n, name in enumerate(EXPECTED)]


@pytest.mark.parametrize("name", expectations())
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static", "dynamic"])
def test_layers_of_the_corpus(name: str, dynamic: bool) -> None:
    expected = EXPECTED[name]
    for site in corpus_sites(name, dynamic):
        found = low_rank(site)
        if name in UNSEEN or expected.form is None:
            assert found is None
            continue
        assert found is not None and found.form.value == expected.form
        assert (found.width, found.expanded) == (expected.width, expected.expanded)
        assert found.linear is (expected.side == "both" or name in NOT_BY_LINEARITY or expected.form == "absorbed")


class Latent(nn.Module):
    """Keys and values from a latent, which is made and kept in the way that is asked for."""

    def __init__(self, way: str, narrow: int = 12) -> None:
        super().__init__()
        self.way = way
        self.down, self.query = nn.Linear(32, narrow, bias=False), nn.Linear(32, 32)
        self.key, self.value = nn.Linear(narrow, 32, bias=False), nn.Linear(narrow, 32, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)

    def forward(self, x: Tensor, past: Tensor, past_keys: Tensor, past_values: Tensor) -> Tensor:
        latent = self.down(x)
        if self.way == "cached latent":
            latent = torch.cat([past, latent], 1)
        key, value = self.heads(self.key(latent)), self.heads(self.value(latent))
        if self.way == "cached expanded":
            key, value = torch.cat([past_keys, key], 2), torch.cat([past_values, value], 2)
        if self.way == "normed keys":
            key = F.rms_norm(key, (8,))
        if self.way == "other latent":
            value = self.heads(self.value(self.down(x.exp())))
        return attend(self.heads(self.query(x)), key, value)

    def inputs(self) -> tuple[Tensor, ...]:
        return torch.randn(2, 6, 32), torch.randn(2, 5, 12), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)


def latent_of(way: str, **options: Any) -> LowRank | None:
    module = Latent(way, **options)
    (site,) = sites(module, *module.inputs())
    return low_rank(site)


@pytest.mark.parametrize("form", [form for form in MLAForm if form is not MLAForm.ABSORBED], ids=lambda f: f.value)
def test_forms_of_a_latent(form: MLAForm) -> None:
    found = latent_of(form.value)
    assert found is not None and found.form is form and found.linear
    assert (found.width, found.expanded) == (12, 64)
    assert (found.cache is None) is (form is MLAForm.EXPANDED)


def test_a_latent_that_keys_are_not_linear_in() -> None:
    found = latent_of("normed keys")
    assert found is not None and not found.linear


def test_a_latent_wider_than_keys_but_narrower_than_keys_and_values() -> None:
    module = Latent("expanded", 48)
    module.down, module.query = nn.Linear(80, 48, bias=False), nn.Linear(80, 32)
    (site,) = sites(module, torch.randn(2, 6, 80), *module.inputs()[1:])
    found = low_rank(site)
    assert found is not None and (found.width, found.expanded) == (48, 64)


def test_dropout_on_keys_in_training_is_not_linear() -> None:
    module = Latent("expanded")

    def function(x: Tensor) -> Tensor:
        latent = module.down(x)
        key = F.dropout(module.heads(module.key(latent)), 0.1, training=True)
        return attend(module.heads(module.query(x)), key, module.heads(module.value(latent)))

    (site,) = sites(function, torch.randn(2, 6, 32))
    found = low_rank(site)
    assert found is None or not found.linear


def test_no_latent_in_common() -> None:
    assert latent_of("other latent") is None


def test_a_latent_as_wide_as_what_it_is_made_of_is_none() -> None:
    assert latent_of("expanded", narrow=32) is None


def test_one_key_head_that_is_also_the_value_is_no_absorbed_latent() -> None:
    def function(q: Tensor, x: Tensor) -> Tensor:
        return (q @ x.mT).softmax(-1) @ x

    (site,) = sites(function, torch.randn(2, 4, 6, 8), torch.randn(2, 1, 6, 8))
    assert low_rank(site) is None
