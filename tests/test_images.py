"""Keys and values as affine images of a latent, whatever steps make them: absorbed with weights read off by running."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rewrite_tools import outcome
from torch import Tensor, nn

B, T, H, D, L = 2, 96, 4, 16, 24
HALF = 12

KeyValue = tuple[Tensor, Tensor]


class Weights(nn.Module):
    """What the spellings below are made of."""

    def __init__(self) -> None:
        super().__init__()

        def drawn(*shape: int) -> Tensor:
            return nn.Parameter(torch.randn(shape, generator=generator) * shape[-1] ** -0.5)

        generator = torch.Generator().manual_seed(0)
        self.k, self.v, self.k2, self.v2 = (drawn(H * D, L) for _ in range(4))
        self.down, self.up = drawn(6, L), drawn(H * D, 6)
        self.wide, self.column, self.bias = drawn(H * D, H * D), drawn(H * D), drawn(H * D)
        self.head, self.number = drawn(H, 1, 1), nn.Parameter(torch.tensor(0.7))
        codes = torch.randint(-127, 127, (H * D, L), generator=generator, dtype=torch.int8)
        self.register_buffer("codes", codes)


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, H, D).transpose(1, 2)


def both(make: Callable[[Weights, Tensor, Tensor], Tensor]) -> Callable[[Weights, Tensor], KeyValue]:
    """The same steps for keys and for values, each with weights of its own."""
    return lambda w, c: (make(w, c, w.k), make(w, c, w.v))


lin = F.linear
IMAGES: dict[str, Callable[[Weights, Tensor], KeyValue]] = {
    "adapter behind a dropout": both(
        lambda w, c, W: heads(lin(c, W) + lin(lin(F.dropout(c, 0.1, False), w.down), w.up))
    ),
    "adapter in another dtype and back": both(
        lambda w, c, W: heads(lin(c, W) + lin(c.double(), w.k2.double()).float())
    ),
    "a bias of its own": both(lambda w, c, W: heads(c @ W.T + w.bias)),
    "scaled columns": both(lambda w, c, W: heads(lin(c, W) * w.column)),
    "scaled, biased, scaled": both(lambda w, c, W: heads((lin(c, W, w.bias) * w.column - w.bias) / 3)),
    "8-bit weights": both(lambda w, c, W: heads(lin(c, w.codes.to(c.dtype)) * w.column + lin(c, W))),
    "scaled heads": both(lambda w, c, W: heads(lin(c, W)) * w.head),
    "a learned number": both(lambda w, c, W: heads(w.number * lin(c, W))),
    "differences and shares": both(lambda w, c, W: heads(-torch.sub(lin(c, W), lin(c, w.k2), alpha=0.5))),
    "composed": both(lambda w, c, W: heads(lin(lin(c, W), w.wide))),
    "slices of the weight joined": both(lambda w, c, W: heads(torch.cat([lin(c, part) for part in W.chunk(2)], -1))),
    "heads joined": both(lambda w, c, W: torch.cat([lin(c, part).unsqueeze(1) for part in W.chunk(H)], 1)),
    "heads stacked, with biases": both(
        lambda w, c, W: torch.stack([lin(c, *p) for p in zip(W.chunk(H), w.bias.chunk(H), strict=True)], 1)
    ),
    "an axis of one in an einsum": both(lambda w, c, W: torch.einsum("bxsr,hdr->bhsd", c[:, None], W.view(H, D, L))),
    "products and sums": both(lambda w, c, W: heads((c[:, :, None] * W).sum(-1))),
    "columns permuted": both(lambda w, c, W: heads(torch.cat(lin(c, W).split(HALF, -1)[::-1], -1) * w.column)),
}


class Attention(nn.Module):
    def __init__(self, make: Callable[[Weights, Tensor], KeyValue]) -> None:
        super().__init__()
        self.weights, self.make = Weights(), make

    def forward(self, query: Tensor, latent: Tensor) -> Tensor:
        key, value = self.make(self.weights, latent)
        return (query @ key.mT * D**-0.5).softmax(-1) @ value


def given(batch: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, H, 1, D, generator=generator), torch.randn(batch, T, L, generator=generator)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", IMAGES)
def test_whatever_is_linear_is_absorbed(name: str, dynamic: bool) -> None:
    found = outcome("absorb_up_projection", Attention(IMAGES[name]), *given(), dynamic=dynamic)
    assert found.verdict.outcome == "applied", found.verdict
    assert found.verdict.error is not None and found.verdict.error < 1e-12
    assert found.error < 2e-6


def test_codes_are_no_latent() -> None:
    """A cache of 8-bit latents: what is attended to are the numbers that they stand for."""
    attention = Attention(IMAGES["scaled columns"])

    def attend(query: Tensor, codes: Tensor) -> Tensor:
        out: Tensor = attention(query, codes.to(query.dtype) * 0.1)
        return out

    query, latent = given()
    found = outcome("absorb_up_projection", attend, query, (10 * latent).to(torch.int8))
    assert found.verdict.outcome == "applied" and found.error < 2e-6


def along_tokens(w: Weights, c: Tensor, W: Tensor) -> Tensor:
    return heads(lin(c, W) + torch.arange(T, dtype=c.dtype)[:, None] * w.column)


NOT_LINEAR = {
    "a function of the products": both(lambda w, c, W: heads(lin(c, W).relu())),
    "what is added has positions": both(along_tokens),
    "products of two": both(lambda w, c, W: heads(lin(c, W) * lin(c, w.k2))),
    "the latents of other tokens too": both(lambda w, c, W: heads(lin(c, W) + lin(c.flip(1), w.k2))),
    "a scale of each sequence": both(lambda w, c, W: heads(lin(c, W) * c[:, :1, :1].exp())),
    "an active dropout": both(lambda w, c, W: heads(lin(c, W) + lin(F.dropout(c, 0.5, True), w.k2) * 0.0)),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_the_same_linear_map_for_every_token_stays(name: str) -> None:
    found = outcome("absorb_up_projection", Attention(NOT_LINEAR[name]), *given())
    assert found.verdict.outcome == "refused" and found.error < 2e-6


def test_scales_that_come_with_the_input_are_no_weights_of_heads() -> None:
    """For one sequence they are the same for all tokens; for several they are not the same for all sequences."""
    w = Weights()

    def attend(query: Tensor, latent: Tensor, scale: Tensor) -> Tensor:
        key, value = (heads(lin(latent, W) * scale) for W in (w.k, w.v))
        return (query @ key.mT).softmax(-1) @ value

    for batch, wanted in ((1, "applied"), (2, "refused")):
        scale = torch.randn(batch, 1, H * D, generator=torch.Generator().manual_seed(2))
        found = outcome("absorb_up_projection", attend, *given(batch), scale)
        assert found.verdict.outcome == wanted and found.error < 2e-6


def test_gradients_go_through_all_weights() -> None:
    w = Weights()
    weights = (w.k, w.v, w.down, w.up, w.column)

    def attend(query: Tensor, latent: Tensor, k: Tensor, v: Tensor, down: Tensor, up: Tensor, g: Tensor) -> Tensor:
        key, value = (heads((lin(latent, W) + lin(lin(latent, down), up)) * g) for W in (k, v))
        return (query @ key.mT).softmax(-1) @ value

    gradients = []
    for function in (attend, torch.compile(attend, backend="latent", options={"inner": "eager", "strict": True})):
        leaves = [x.clone().requires_grad_() for x in (*given(), *weights)]
        function(*leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def written_to_keys(w: Weights, c: Tensor) -> KeyValue:
    key, value = heads(lin(c, w.k)), heads(lin(c, w.v))
    key[..., :HALF] = key[..., :HALF] * 2
    return key, value


def written_to_a_step(w: Weights, c: Tensor) -> KeyValue:
    key = lin(c, w.k) * w.column
    key[..., :HALF] *= 2
    return heads(key + w.bias), heads(lin(c, w.v) * w.column)


def written_to_values(w: Weights, c: Tensor) -> KeyValue:
    key, value = heads(lin(c, w.k)), heads(lin(c, w.v))
    value[:, 1] += 1
    return key, value


def written_to_the_latent(w: Weights, c: Tensor) -> KeyValue:
    c = c * 1
    made = heads(lin(c, w.k) * w.column), heads(lin(c, w.v))
    c.zero_()
    return made


@pytest.mark.parametrize("make", [written_to_keys, written_to_a_step, written_to_values, written_to_the_latent])
def test_what_a_write_changed_is_not_read_around(make: Callable[[Weights, Tensor], KeyValue]) -> None:
    found = outcome("absorb_up_projection", Attention(make), *given())
    assert found.verdict.reason == "a tensor it reads is written in between" and found.error < 2e-6


def test_a_query_that_is_written_to_before_it_is_read_is_as_any_other() -> None:
    attention = Attention(IMAGES["scaled columns"])

    def attend(query: Tensor, latent: Tensor) -> Tensor:
        query = query.transpose(1, 2).reshape(B, 1, -1) * 1
        query[..., :HALF] = query[..., :HALF].sin()
        out: Tensor = attention(query.view(B, 1, H, D).transpose(1, 2), latent)
        return out

    found = outcome("absorb_up_projection", attend, *given())
    assert found.verdict.outcome == "applied" and found.error < 2e-6
