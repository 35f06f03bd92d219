"""Sites of tiny models and of the corpus, for the tests of origins."""

from __future__ import annotations

import functools
from typing import Any

import torch
from corpus import ALL
from latent.rewriter.sites import AttentionSite
from origin_tools import sites
from zoo.build import Built, build


@functools.cache
def model_of(name: str, attention: str) -> Built:
    return build(name, attn=attention)


def sites_of(
    name: str, attention: str = "sdpa", cache: str = "none", decode: bool = False, dynamic: bool | None = None
) -> list[AttentionSite]:
    """The sites of a tiny model in one step."""
    import transformers

    built = model_of(name, attention)
    config: Any = built.model.config
    inputs = {**built.inputs, "use_cache": cache != "none"}
    inputs.pop("attention_mask", None)
    if cache != "none":
        inputs["past_key_values"] = (
            transformers.StaticCache(config=config, max_cache_len=32)
            if cache == "static"
            else transformers.DynamicCache(config=config)
        )
    if decode:
        with torch.no_grad():
            built.model(**inputs)
        inputs["input_ids"] = inputs["input_ids"][:, :1]
    return sites(built.model, dynamic=dynamic, **inputs)


@functools.cache
def corpus_sites(name: str, dynamic: bool = False) -> tuple[AttentionSite, ...]:
    return tuple(sites(ALL[name].fn, *ALL[name].inputs(), dynamic=dynamic))
