"""A proven causal mask becomes a flag; one that differs from causal in anything stays a tensor."""

from __future__ import annotations

import latent
import pytest
import torch
from rewrite_tools import outcome
from torch import Tensor

S, D = 6, 4


def qkv(keys: int = S) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, n, D, generator=generator) for n in (S, keys, keys))  # type: ignore[return-value]


def masked(query: Tensor, key: Tensor, value: Tensor, visible_ST: Tensor) -> Tensor:
    return (query @ key.mT).masked_fill(~visible_ST, float("-inf")).softmax(-1) @ value


CAUSAL = {
    "tril": lambda S, T: torch.ones(S, T, dtype=torch.bool).tril(),
    "triu": lambda S, T: ~torch.ones(S, T, dtype=torch.bool).triu(1),
    "arange": lambda S, T: torch.arange(T)[None, :] <= torch.arange(S)[:, None],
    "window as wide as the keys": lambda S, T: (
        (torch.arange(T) <= torch.arange(S)[:, None]) & (torch.arange(T) > torch.arange(S)[:, None] - T)
    ),
}
NOT_CAUSAL = {
    "one above the diagonal": lambda S, T: torch.ones(S, T, dtype=torch.bool).tril(1),
    "reversed": lambda S, T: torch.arange(T)[None, :] >= torch.arange(S)[:, None],
    "a window that looks ahead": lambda S, T: (
        (torch.arange(T) <= torch.arange(S)[:, None] + 1) & (torch.arange(T) > torch.arange(S)[:, None] - 3)
    ),
    "one entry more": lambda S, T: (
        torch.ones(S, T, dtype=torch.bool).tril() | ((torch.arange(S)[:, None] == 1) & (torch.arange(T) == 4))
    ),
}


@pytest.mark.parametrize("keys", [S, S + 3], ids=["square", "more keys"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_in_every_spelling_costs_no_tensor(name: str, keys: int) -> None:
    found = outcome("replace_proven_mask", lambda q, k, v: masked(q, k, v, CAUSAL[name](S, keys)), *qkv(keys))
    assert (found.verdict.outcome, found.mask) == ("applied", "causal")
    assert found.error < 1e-5


@pytest.mark.parametrize("keys", [S, S + 3], ids=["square", "more keys"])
def test_a_causal_window_costs_no_tensor(keys: int) -> None:
    def window(S: int, T: int) -> Tensor:
        return (torch.arange(T) <= torch.arange(S)[:, None]) & (torch.arange(T) > torch.arange(S)[:, None] - 3)

    found = outcome("replace_proven_mask", lambda q, k, v: masked(q, k, v, window(S, keys)), *qkv(keys))
    assert (found.verdict.outcome, found.mask) == ("applied", "causal, window 3")
    assert found.error < 1e-5


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_what_is_not_causal_keeps_its_mask(name: str) -> None:
    found = outcome("replace_proven_mask", lambda q, k, v: masked(q, k, v, NOT_CAUSAL[name](S, S)), *qkv())
    assert found.verdict.outcome == "refused"
    assert found.error < 1e-5


def test_a_mask_that_is_an_input_is_never_assumed() -> None:
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    found = outcome("replace_proven_mask", masked, *qkv(), causal)
    assert found.verdict.outcome == "refused" and "not proven" in found.verdict.reason


def test_a_mask_that_hides_nothing_is_dropped() -> None:
    found = outcome("replace_proven_mask", lambda q, k, v: masked(q, k, v, torch.arange(S)[None] >= 0), *qkv())
    assert found.verdict.outcome == "applied" and found.error < 1e-5


def test_symbolic_sizes_do_not_bring_the_layers_before_into_a_certificate() -> None:
    """A whole model on random numbers overflows; of the layers before only sizes are read."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        report = latent.explain(model, dynamic=True)(input_ids=torch.arange(8)[None])
    assert report.count("replace_proven_mask") == 3, report
