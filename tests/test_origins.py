"""Where the tensors of real models come from, in prefill and decode, whatever cache, spelling and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from latent.rewriter.mutations import mutations
from latent.rewriter.origins.pieces import CacheRead, Narrow, Opaque, Origin, Projection, Rope, origins
from latent.rewriter.origins.text import describe_origins
from latent.rewriter.recognise import recognise
from latent.rewriter.sites import AttentionSite
from origin_tools import attend, sites, text
from torch import Tensor

pytest.importorskip("transformers")

from corpus import ALL
from origin_models import corpus_sites, model_of, sites_of
from zoo.named import named


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def texts(site: AttentionSite) -> tuple[str, str, str]:
    found = origins(site)
    return text(found.query), text(found.key), text(found.value)


LLAMA = ("rope(half 16) linear(32>64)", "rope(half 16) linear(32>64)", "linear(32>64)")
MODELS: dict[str, tuple[str, str, str]] = {
    "llama": LLAMA,
    "qwen3": ("rope(half 16) rms(16) linear(32>64)", "rope(half 16) rms(16) linear(32>64)", "linear(32>64)"),
    "gemma3": (
        "rope(half 16) rms(16) linear(32>64)",
        "repeat(2) rope(half 16) rms(16) linear(32>32)",
        "repeat(2) linear(32>32)",
    ),
    "gpt2": tuple(f"width({i}:{i + 32} of 96) linear(32>96 T bias)" for i in (0, 32, 64)),  # type: ignore[dict-item]
    "gpt_neox": (
        "rope(half 2 at 0) width(0:8 of each 24) linear(32>96 bias)",
        "rope(half 2 at 0) width(8:16 of each 24) linear(32>96 bias)",
        "width(16:24 of each 24) linear(32>96 bias)",
    ),
    "phi3": (
        "rope(half 8) width(0:32 of 96) linear(32>96)",
        "rope(half 8) width(32:64 of 96) linear(32>96)",
        "width(64:96 of 96) linear(32>96)",
    ),
    "cohere2": ("rope(interleaved 16) linear(32>64)", "rope(interleaved 16) linear(32>64)", "linear(32>64)"),
    "opt": ("scale(0.353553) linear(32>32 bias)", "linear(32>32 bias)", "linear(32>32 bias)"),
    "falcon": (
        "rope(half 8) width(0:32 of 48) linear(32>48)",
        "rope(half 8) other(4:5 of 6) linear(32>48)",
        "other(5:6 of 6) linear(32>48)",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    first = sites_of(name)[0]  # layers of other kinds follow
    assert texts(first) == MODELS[name]


@pytest.mark.parametrize(
    ("cache", "decode", "dynamic", "attention", "expected"),
    [
        ("dynamic", False, None, "sdpa", "cache(concatenated 2 fresh)"),
        ("dynamic", True, True, "sdpa", "cache(concatenated 2)"),
        ("dynamic", True, None, "eager", "cache(concatenated 2)"),
        ("static", False, None, "sdpa", "tokens(0:12 of 32) cache(static 2 fresh)"),
        ("static", True, None, "eager", "cache(static 2)"),
        ("static", True, True, "sdpa", "cache(static 2)"),
    ],
)
def test_caches_of_llama(cache: str, decode: bool, dynamic: bool | None, attention: str, expected: str) -> None:
    for site in sites_of("llama", attention, cache, decode, dynamic):
        query, key, value = texts(site)
        assert (query, key, value) == (LLAMA[0], f"{expected} {LLAMA[1]}", f"{expected} {LLAMA[2]}")


@pytest.mark.parametrize(
    ("cache", "kinds"), [("dynamic", ["sliding", "concatenated"]), ("static", ["sliding", "static"])]
)
def test_sliding_layers_beside_full_ones(cache: str, kinds: list[str]) -> None:
    found = [origins(site) for site in sites_of("gemma3", cache=cache, decode=True)]
    caches = [next(p for p in o.key if isinstance(p, CacheRead)) for o in found]
    assert [piece.kind for piece in caches] == kinds
    for number, piece in enumerate(caches):
        assert f"layers[{number}].keys" in piece.source and piece.dim == 2


def test_phi3_decodes_from_both_caches() -> None:
    for cache, kind in (("dynamic", "concatenated"), ("static", "static")):
        query, key, value = MODELS["phi3"]
        for site in sites_of("phi3", cache=cache, decode=True, dynamic=True):
            assert texts(site) == (query, f"cache({kind} 2) {key}", f"cache({kind} 2) {value}")


# ** models without rotation or cache **


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_encoders_and_decoders(name: str) -> None:
    (entry,) = named([name])
    built = entry.build()
    scale = "scale(0.353553) " if name == "whisper" else ""
    for site in sites(built.model, **built.inputs):
        found = origins(site)
        assert text(found.query).startswith(f"{scale}linear(32>") and text(found.key).startswith("linear(32>")
        pieces = [p for o in (found.query, found.key, found.value) for p in o.everywhere()]
        assert not any(isinstance(piece, Rope | CacheRead | Narrow) for piece in pieces)


# ** all of the corpus **

QUICK = [name for number, name in enumerate(ALL) if number % 6 == 0]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in ALL])
def test_the_corpus_is_walked_without_a_failure(name: str) -> None:
    for site in corpus_sites(name):
        found = origins(site)
        for origin in (*found.queries, *found.keys, found.value):
            assert not any(isinstance(p, Opaque) and p.reason == "cannot be read" for p in origin.everywhere())
        assert set(describe_origins(site)) >= {"q", "k", "v"}


# ** in words **


def test_lines() -> None:
    lines = [describe_origins(site) for site in sites_of("gemma3", cache="static", decode=True)]
    assert lines[1] == {
        "q": "q ← rope(half, 16) ← rms_norm ← linear q_proj 32→64 (4 heads × 16)",
        "k": "k ← repeated 2 times ← cache(static, dim 2) ← rope(half, 16) ← rms_norm ← "
        "linear k_proj 32→32 (2 heads × 16)",
        "v": "v ← repeated 2 times ← cache(static, dim 2) ← linear v_proj 32→32 (2 heads × 16)",
    }


def test_a_line_of_a_latent() -> None:
    line = describe_origins(sites_of("deepseek_v3")[0])["v"]
    assert line == (
        "v ← columns 14:24 of every 24 ← up-projection kv_b_proj 18→96 (4 heads × 24) ← latent 18 ← rms_norm ← "
        "columns 0:18 of 26 ← linear kv_a_proj_with_mqa 32→26"
    )


def test_names_come_from_parameters() -> None:
    site = sites_of("gpt2")[0]
    piece = next(p for p in origins(site).query if isinstance(p, Projection))
    assert "c_attn" in describe_origins(site)["q"] and piece.learned and piece.transposed


# ** bounds **


def chain(length: int) -> Callable[[Tensor, Tensor], Tensor]:
    def function(q: Tensor, x: Tensor) -> Tensor:
        key = x
        for _ in range(length):
            key = torch.cat([key[..., :4] * 2.0, key[..., 4:]], -1)
        return attend(q, key, x)

    return function


def test_the_walk_is_bounded() -> None:
    (site,) = sites(chain(40), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8))
    found = origins(site).key
    assert sum(1 for _ in found.everywhere()) < 1500
    assert nodes_in(found) <= 2 * 400 + 10


def nodes_in(origin: Origin) -> int:
    parts = [child for piece in origin.pieces for child in getattr(piece, "children", ())]
    return len(origin.path) + sum(map(nodes_in, parts))


def test_the_graph_is_left_alone() -> None:
    from origin_tools import graphs

    built = model_of("llama", "sdpa")
    inputs = {**built.inputs, "use_cache": False}
    (gm,) = graphs(built.model, **inputs)
    before = [(node.name, str(node.args)) for node in gm.graph.nodes]
    splits = []
    for site in recognise(gm.graph):
        splits.append(dict(site.space.splits))
        origins(site, mutations(gm.graph))
        assert site.space.splits == splits[-1]
    assert [(node.name, str(node.args)) for node in gm.graph.nodes] == before
