"""`LatentCache`: whatever is done to it, the next logits are those of the texts that it stands for; and its size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import latent
from convert_tools import VOCABULARY, converted, decode, decoder_of, forward, step, tiny, tokens
from latent.passes.recipes.cross_layer_svd import CrossLayerSVD, cached_numbers
from latent.passes.recipes.joint_latent import JointLatent
from latent.rewriter.convert.attention import ConvertedAttention
from latent.rewriter.convert.groups.grouping import even_groups
from latent.rewriter.convert.rank import angles
from zoo.build import build

WIDTH = 16
PROMPT, LENGTH = 12, 17
TEXT = tokens(8, 32, seed=5)

EXACT: dict[str, Any] = {
    "joint": JointLatent(rank=2 * WIDTH),
    "prompt": CrossLayerSVD(group=2, rank_key=WIDTH, rank_value=WIDTH, least=0),
    "calibrated": CrossLayerSVD(group=2, rank_key=WIDTH, rank_value=WIDTH, bases="calibrated"),
}
every_recipe = pytest.mark.parametrize("recipe", EXACT)
both_kinds = pytest.mark.parametrize("max_length", [None, 40])


class Texts:
    """A cache, and the texts that it stands for."""

    def __init__(self, recipe: str, max_length: int | None) -> None:
        self.original = tiny()
        self.model = converted(self.original, EXACT[recipe], TEXT)
        self.cache = latent.LatentCache(self.model, max_length)
        self.begin(3, seed=1)

    def begin(self, rows: int, seed: int) -> None:
        self.ids, self.mask = tokens(rows, PROMPT, seed), torch.ones(rows, PROMPT, dtype=torch.long)
        self.mask[0, :4] = 0
        self.check(PROMPT)
        for count in (1, 2, 1, 1):
            self.more(count)

    def more(self, count: int) -> None:
        rows = len(self.ids)
        self.ids = torch.cat((self.ids, tokens(rows, count, seed=self.ids.shape[1])), 1)
        self.mask = torch.cat((self.mask, torch.ones(rows, count, dtype=torch.long)), 1)
        self.check(count)

    def check(self, count: int) -> None:
        found = step(self.model, self.cache, self.ids, count, self.mask)
        wanted = forward(self.original, self.ids, self.mask)[:, -count:]
        seen = self.mask[:, -count:].bool()
        torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-10, atol=1e-10)
        assert int(self.cache.get_seq_length()) == self.ids.shape[1]

    def take(self, rows: Tensor) -> None:
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def forget(self, count: int) -> None:
        self.ids, self.mask = self.ids[:, :-count], self.mask[:, :-count]


def reset(texts: Texts) -> None:
    texts.cache.reset()
    texts.begin(3, seed=7)


def reorder(texts: Texts) -> None:
    rows = torch.tensor([2, 0, 0])
    texts.cache.reorder_cache(rows)
    texts.take(rows)


def repeat(texts: Texts) -> None:
    texts.cache.batch_repeat_interleave(2)
    texts.take(torch.tensor([0, 0, 1, 1, 2, 2]))


def select(texts: Texts) -> None:
    rows = torch.tensor([0, 2])
    texts.cache.batch_select_indices(rows)
    texts.take(rows)


def crop(texts: Texts) -> None:
    texts.cache.crop(-3)
    texts.forget(3)


def crop_into_the_prompt(texts: Texts) -> None:
    texts.cache.crop(-8)
    texts.forget(8)


def crop_nothing(texts: Texts) -> None:
    texts.cache.crop(0)


def fork(texts: Texts) -> None:
    """What becomes of a copy is nothing to the cache."""
    other = copy.deepcopy(texts.cache)
    step(texts.model, other, torch.cat((texts.ids, tokens(3, 2, seed=99)), 1), 2)
    other.reorder_cache(torch.tensor([2, 1, 0]))


OPERATIONS = (reset, reorder, repeat, select, crop, crop_into_the_prompt, crop_nothing, fork)


@every_recipe
@both_kinds
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_the_next_logits_are_those_of_the_texts(
    recipe: str, max_length: int | None, operation: Callable[[Texts], None]
) -> None:
    texts = Texts(recipe, max_length)
    operation(texts)
    for count in (1, 2, 1):
        texts.more(count)
    reorder_all = torch.arange(len(texts.ids)).flip(0)  # and another after it
    texts.cache.reorder_cache(reorder_all)
    texts.take(reorder_all)
    texts.more(1)


@every_recipe
@both_kinds
def test_beams_are_those_of_the_original(recipe: str, max_length: int | None) -> None:
    made = converted(tiny(), EXACT[recipe], TEXT)
    settings: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    settings |= {"attention_mask": torch.ones(2, PROMPT, dtype=torch.long), "pad_token_id": 0}
    with torch.no_grad():
        wanted = tiny().generate(tokens(2, PROMPT), **settings)
        found = made.generate(tokens(2, PROMPT), past_key_values=latent.LatentCache(made, max_length), **settings)
    assert torch.equal(found, wanted)


# ** what is refused **


@every_recipe
def test_a_full_cache_says_so(recipe: str) -> None:
    made = converted(tiny(), EXACT[recipe], TEXT)
    cache = latent.LatentCache(made, PROMPT + 1)
    with pytest.raises(
        ValueError, match="holds 0 tokens and this call has 14, which is more than its max_length of 13"
    ):
        step(made, cache, tokens(2, PROMPT + 2), PROMPT + 2)
    step(made, cache, tokens(2, PROMPT), PROMPT)
    step(made, cache, tokens(2, PROMPT + 1), 1)
    with pytest.raises(ValueError, match="holds 13 tokens and this call has 1, which is more than its max_length"):
        step(made, cache, tokens(2, PROMPT + 2), 1)


@every_recipe
@both_kinds
def test_another_batch_says_so(recipe: str, max_length: int | None) -> None:
    made = converted(tiny(), EXACT[recipe], TEXT)
    cache = latent.LatentCache(made, max_length)
    step(made, cache, tokens(2, PROMPT), PROMPT)
    with pytest.raises(ValueError, match="holds 2 rows of a batch, and this call has 3"):
        step(made, cache, tokens(3, PROMPT + 1), 1)


def test_a_cache_of_another_model_says_so() -> None:
    made, other = (converted(tiny(), JointLatent(rank=rank), TEXT) for rank in (6, 7))
    cache = latent.LatentCache(made)
    step(made, cache, tokens(2, PROMPT), PROMPT)
    with pytest.raises(ValueError, match="holds 1 heads of width 6 for a token, and this call gives 1 of width 7"):
        step(other, cache, tokens(2, PROMPT + 1), 1)
    with pytest.raises(ValueError, match="layer 0 gave it keys and values, so it is not converted"):
        step(tiny(), latent.LatentCache(made), tokens(2, PROMPT), PROMPT)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "minicpm3"])
def test_models_that_are_not_converted_are_refused(name: str) -> None:
    """Also those that make keys and values of a latent by themselves."""
    with pytest.raises(ValueError, match=r"no converted attention, .* Convert it first: model = latent.convert"):
        latent.LatentCache(build(name).model)


def test_models_that_are_converted_in_part_are_refused() -> None:
    made = converted(tiny(), JointLatent(rank=6), TEXT)
    made.model.layers[3].self_attn = tiny().model.layers[3].self_attn
    with pytest.raises(ValueError, match="of 4 layers of StableLmForCausalLM, 3 are not converted"):
        latent.LatentCache(made)
    with pytest.raises(ValueError, match="max_length is 0"):
        latent.LatentCache(converted(tiny(), JointLatent(rank=6), TEXT), 0)


# ** bytes **


def planned(recipe: Any, length: int) -> int:
    """Numbers for a prompt of so many tokens, by hand."""
    if isinstance(recipe, JointLatent):
        return length * (2 * recipe.rank + 4)  # type: ignore[operator]
    groups, prompt = even_groups(2, 2), recipe.bases == "prompt"
    if prompt and length < recipe.least:
        return length * (2 * 2 * WIDTH + 4)
    by_hand = 2 * (5 + 7) * (length + prompt * 2 * WIDTH) + 4 * length
    assert by_hand == cached_numbers(decoder_of(small()), groups, (5, 7), length, prompt)
    return by_hand


def small() -> Any:
    return tiny(torch.float32, layers=2, positions=8192)


@pytest.mark.parametrize("length", [512, 2048, 8192])
@pytest.mark.parametrize(
    "recipe",
    [
        JointLatent(rank=12),
        CrossLayerSVD(group=2, rank_key=5, rank_value=7, least=1024),
        CrossLayerSVD(group=2, rank_key=5, rank_value=7, bases="calibrated"),
    ],
    ids=["joint", "prompt", "calibrated"],
)
def test_live_bytes_are_those_of_the_plan(recipe: Any, length: int) -> None:
    made = converted(small(), recipe, TEXT)
    assert angles(decoder_of(small())) == 4
    cache = latent.LatentCache(made)
    step(made, cache, tokens(1, length), length)
    assert cache.nbytes == 4 * planned(recipe, length)


@every_recipe
def test_a_fixed_cache_has_its_size_from_the_first_new_token(recipe: str) -> None:
    made = converted(tiny(), EXACT[recipe], TEXT)
    cache = latent.LatentCache(made, 100)
    sizes = []
    for end in range(PROMPT, LENGTH):
        step(made, cache, tokens(2, end), PROMPT if end == PROMPT else 1)
        sizes.append(cache.nbytes)
    rows = 4 * 2 * WIDTH  # of a token, over all layers
    if recipe == "prompt":  # A of rank 12 and B for two groups, keys and values; then room for more tokens
        numbers = 2 * 2 * 12 * (PROMPT + 2 * WIDTH) + (100 - PROMPT) * rows + 100 * 4
    else:
        numbers = 100 * (rows + 4)
    counters = {"joint": 4, "prompt": 4, "calibrated": 2}[recipe] + 1
    assert set(sizes[1:]) == {2 * 8 * numbers + 8 * counters}


# ** compiled **


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


LOSSY: dict[str, Any] = {
    "joint": JointLatent(rank=12),
    "prompt": CrossLayerSVD(group=2, rank_key=5, rank_value=7, least=0),
    "calibrated": CrossLayerSVD(group=2, rank_key=5, rank_value=7, bases="calibrated"),
}


def generate(model: Any, max_length: int | None, new: int) -> Tensor:
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        found: Tensor = model.generate(
            tokens(2, PROMPT),
            attention_mask=mask,
            past_key_values=latent.LatentCache(model, max_length),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return found


def check_compiled(recipe: str, max_length: int | None, most: int, **how: Any) -> None:
    model = converted(tiny(torch.float32, layers=2), LOSSY[recipe], TEXT)
    wanted = generate(model, max_length, 24)
    model.compile(**how)
    assert torch.equal(generate(model, max_length, 6), wanted[:, : PROMPT + 6])
    few = compilations()
    assert 0 < few <= most
    assert torch.equal(generate(model, max_length, 24), wanted)
    assert compilations() == few
    assert not torch._dynamo.utils.counters["graph_break"]


CASES = [("joint", None, 3), ("joint", 40, 2), ("prompt", None, 4), ("prompt", 40, 3)]
CASES += [("calibrated", None, 3), ("calibrated", 40, 2)]
QUICK = {("joint", None), ("prompt", 40)}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("recipe", "max_length", "most"),
    [pytest.param(*case, marks=() if case[:2] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_compiled_decoding_gives_the_same_tokens_in_few_compilations(
    recipe: str, max_length: int | None, most: int
) -> None:
    """Of the prompt, of the first token after it, and of all others."""
    check_compiled(recipe, max_length, most, backend="latent", options={"inner": "eager", "strict": True})


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["latent", "inductor"])
@pytest.mark.parametrize(("recipe", "max_length", "most"), CASES)
def test_compiled_decoding_through_inductor(recipe: str, max_length: int | None, most: int, backend: str) -> None:
    check_compiled(recipe, max_length, most, backend=backend)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["latent", "inductor"])
def test_a_full_cache_stops_compiled_code_too(backend: str) -> None:
    model = converted(tiny(torch.float32, layers=2), LOSSY["joint"], TEXT)
    model.compile(backend=backend)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        generate(model, PROMPT + 3, 8)


def test_every_attention_is_converted() -> None:
    model: nn.Module = converted(tiny(), EXACT["prompt"])
    assert sum(isinstance(module, ConvertedAttention) for module in model.modules()) == 4
    assert decode(model, latent.LatentCache(model), tokens(1, LENGTH), PROMPT).shape == (1, LENGTH, VOCABULARY)
