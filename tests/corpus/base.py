"""What a program of the corpus is, the lists it can belong to, and the inputs of the first 33 programs.

Dimensions, the suffixes of the argument names:
    B batch   H query heads   K key/value heads   G query heads for each key head   N batch times heads
    S query tokens   T key tokens   D width of a query/key head   E width of a value head   R rotary width
    C channels: of the latent, or of the activations; next to an image also X rows and Y columns   1 an axis of size one
Arguments of programs are tensors; their names say the layout, so they carry no annotations.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

B, H, S, D = 2, 8, 64, 32
SCALE = D**-0.5

Inputs = tuple[Tensor, ...]
Result = Tensor | tuple[Tensor, ...]
Rand = Callable[..., Tensor]
Maker = Callable[[Rand], Inputs]


@dataclass(frozen=True)
class Program:
    """One function or module of the corpus; `fn.__doc__` says what makes it different."""

    name: str
    fn: Callable[..., Result]
    maker: Maker
    sites: int
    """How many attentions a recogniser should report: softmax calls over keys that weigh values."""
    reference: Callable[..., Result] | None = None
    """The same function computed another way, from the same inputs."""
    dynamic_ok: bool = True
    """Whether the program traces with symbolic sizes; if not, `reason` says why."""
    reason: str = ""

    def inputs(self, seed: int = 0) -> Inputs:
        """The same tensors for the same seed, on CPU; fresh ones every time, as some programs write into them."""
        generator = torch.Generator().manual_seed(seed)
        return self.maker(functools.partial(torch.randn, generator=generator))


SPELLINGS: list[Program] = []
NOT_ATTENTION: list[Program] = []
EXTRA: list[Program] = []
MORE: list[Program] = []
MORE_LOOK_ALIKES: list[Program] = []


def program(
    corpus: list[Program],
    maker: Maker,
    *,
    sites: int,
    reference: Callable[..., Result] | None = None,
    dynamic_ok: bool = True,
    reason: str = "",
) -> Callable:
    """Register the decorated function under its own name, or one instance of the decorated module.

    A module gets the same weights every time, is in evaluation mode, and its `reference` method, if it has one,
    is the reference of the program.
    """

    def register(fn: Callable) -> Callable:
        name, run, check = fn.__name__, fn, reference
        if isinstance(fn, type):
            run = frozen(fn)
            name = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
            check = getattr(run, "reference", reference)
        corpus.append(Program(name, run, maker, sites, check, dynamic_ok, reason))
        return fn

    return register


def frozen(module: type[nn.Module]) -> nn.Module:
    """An instance with repeatable weights, for evaluation only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module().eval().requires_grad_(False)


# ---------------------------------------------------------------- input makers of the first set


def causal_mask(dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, 1, S, S]: 0 where the key is not in the future, -inf where it is."""
    return torch.full((B, 1, S, S), float("-inf"), dtype=dtype).triu(1)


def qkv(rand: Rand, *, heads_kv: int = H, queries: int = S, dtype: torch.dtype = torch.float32) -> Inputs:
    query, key, value = rand(B, H, queries, D), rand(B, heads_kv, S, D), rand(B, heads_kv, S, D)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def qkv_mask(rand: Rand, *, heads_kv: int = H, dtype: torch.dtype = torch.float32) -> Inputs:
    return *qkv(rand, heads_kv=heads_kv, dtype=dtype), causal_mask(dtype)


def qkv_future(rand: Rand) -> Inputs:
    """The mask as booleans [1, 1, S, S], True where the key is in the future."""
    return *qkv(rand), causal_mask()[:1].isinf()


def qkv_past(rand: Rand) -> Inputs:
    """The mask as booleans [1, 1, S, S], True where the key may be read."""
    return *qkv(rand), ~causal_mask()[:1].isinf()


def qkv_finite_bias(rand: Rand) -> Inputs:
    """A causal penalty of -1 instead of -inf, so that any softmax axis stays finite."""
    return *qkv(rand), causal_mask().clamp(min=-1)


def qkv_alibi(rand: Rand) -> Inputs:
    return *qkv(rand), rand(1, H, 1, S)


def qkv_mask_sink(rand: Rand) -> Inputs:
    return *qkv_mask(rand), rand(H)


def qkv_heads_folded(rand: Rand) -> Inputs:
    return tuple(tensor.reshape(B * H, S, D) for tensor in qkv(rand))


def qkv_square(rand: Rand) -> Inputs:
    """S = H = D: a wrong axis order is a legal shape."""
    return rand(B, D, D, D), rand(B, D, D, D), rand(B, D, D, D)


LATENT, ROTARY, WIDTH_V = 64, 16, 24


def latent_inputs(rand: Rand) -> Inputs:
    """Multi-head latent attention: keys and values are one matrix times a narrow latent."""
    return (
        rand(B, H, S, D),  # query_BHSD, the part without position
        rand(B, H, S, ROTARY),  # query_BHSR, the rotated part
        rand(B, S, LATENT),  # latent_BTC, what a latent cache stores
        rand(B, 1, S, ROTARY),  # key_B1TR, one rotated key for all heads
        rand(H * (D + WIDTH_V), LATENT),  # expands the latent to keys and values of every head
        causal_mask(),
    )


def projections(rand: Rand) -> Inputs:
    """Activations and the q, k, v weights, with S = H = D: a wrong axis order is a legal shape."""
    return rand(B, H, H * H), *(rand(H * H, H * H) / H for _ in range(3))


def repeat_kv(x_BKTD: Tensor, groups: int) -> Tensor:
    """[B, K, T, D] -> [B, K*groups, T, D], as the Hugging Face modelling code writes it."""
    b, k, t, d = x_BKTD.shape
    return x_BKTD[:, :, None].expand(b, k, groups, t, d).reshape(b, k * groups, t, d)
