"""`latent eval`: texts, perplexity with and without a cache, KL, recall, cache bytes, and errors in words."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from latent.rewriter.evaluate.forward import Scoring, layers_and_head
from latent.rewriter.evaluate.memory import cache_bytes, decoding
from latent.rewriter.evaluate.quality import Perplexity, compare, interval, perplexity, remember
from latent.rewriter.evaluate.recall import STRING, needed, recall, repeated
from latent.rewriter.evaluate.texts import (
    DEFAULT_TEXTS,
    Text,
    TextError,
    calibration_tokens,
    read_text,
    scored_tokens,
)

transformers = pytest.importorskip("transformers")

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}


def llama(seed: int = 0, **changes):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes)).eval().double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0)  # predictions that depend on what is read
    return model


def dynamic(model):
    return transformers.DynamicCache(config=model.config)


def tokens(windows: int, length: int) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (windows, length), generator=torch.Generator().manual_seed(1))


class Characters:
    """A tokenizer."""

    def __init__(self, start: int | None = None) -> None:
        self.bos_token_id = start

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [*start, *map(ord, text)]}


def numbered(documents: int, paragraphs: int = 3) -> Text:
    """Every paragraph says where it is from."""
    return Text(
        "numbered",
        tuple(
            "\n\n".join(f"Document {d:03} and its paragraph {p:03}." for p in range(paragraphs))
            for d in range(documents)
        ),
    )


# ** texts **


@pytest.mark.parametrize("name", DEFAULT_TEXTS)
def test_no_paragraph_of_a_default_text_is_both_calibrated_on_and_scored(name):
    text = read_text(name)
    halves = [
        {p.strip() for p in half.split("\n\n") if len(p.strip()) >= 80} for half in (text.calibration, text.scored)
    ]
    assert min(map(len, halves)) > 300 and not halves[0] & halves[1]
    assert read_text(name) == text and len(text.digest) == 8


def test_windows_come_from_their_half_do_not_overlap_and_follow_the_seed():
    text = numbered(40)
    ids = calibration_tokens(Characters(), [text], 12, 50, seed=3)
    assert ids.shape == (12, 50) and ids.dtype == torch.long
    assert torch.equal(ids, calibration_tokens(Characters(), [text], 12, 50, seed=3))
    assert not torch.equal(ids, calibration_tokens(Characters(), [text], 12, 50, seed=4))
    rows = ["".join(map(chr, row)) for row in ids.tolist()]
    places = sorted(text.calibration.index(row) for row in rows)
    assert all(b - a >= 50 for a, b in pairwise(places))
    scored = ["".join(map(chr, row)) for row in scored_tokens(Characters(), text, 12, 50).tolist()]
    assert all(row in text.scored and row not in text.calibration for row in scored)


def test_mixed_text_is_shared_out_evenly_and_windows_begin_as_the_tokenizer_does():
    other = Text("capitals", tuple(t.upper() for t in numbered(40).documents))
    ids = calibration_tokens(Characters(start=7), [numbered(40), other], 7, 40, seed=0)
    assert ids.shape == (7, 40) and (ids[:, 0] == 7).all() and (ids[:, 1:] != 7).all()
    upper = ["".join(map(chr, row)).isupper() for row in ids[:, 1:].tolist()]
    assert sum(upper) == 3


def test_a_file_is_split_into_sections_and_a_package_into_modules(tmp_path):
    file = tmp_path / "essay.txt"
    file.write_text("\n\n".join(f"Paragraph {n:04} " + "word " * 40 for n in range(100)))
    text = read_text(str(file))
    assert len(text.documents) > 3 and "\n\n".join(text.documents) == file.read_text()
    assert len(read_text("pkg:json").documents) >= 4
    assert "def dedent" in "".join(read_text("pkg:textwrap").documents)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pkg:nowhere_to_be_found", r"pkg:nowhere_to_be_found: no such package(.|\n)*pkg:pydoc"),
        ("/no/such/file.txt", r"file.txt: there is no such file(.|\n)*pkg:PACKAGE"),
        ("pkg:this", r"pkg:this: the text has 1 document(.|\n)*longer"),
    ],
)
def test_texts_that_are_not_there_are_refused(name, reason):
    with pytest.raises(TextError, match=reason):
        read_text(name)


def test_a_text_that_is_too_short_says_how_much_there_is():
    text = numbered(8)
    with pytest.raises(TextError, match=rf"{len(text.scored)} tokens, which are 4 windows of 100; 9 are"):
        scored_tokens(Characters(), text, 9, 100)
    with pytest.raises(TextError, match="no text to calibrate on"):
        calibration_tokens(Characters(), [], 1, 8, 0)


# ** quality **


@pytest.mark.parametrize(("prefix", "call"), [(1, 128), (10, 7), (39, 1), (20, 1)])
def test_perplexity_is_the_same_with_a_cache_and_without(prefix, call):
    model, ids = llama(), tokens(5, 40)
    with torch.no_grad():
        logits = model(ids).logits[:, prefix - 1 : -1]
    expected = F.cross_entropy(logits.transpose(1, 2), ids[:, prefix:], reduction="none").mean(1)
    plain = perplexity(model, ids, scoring=Scoring(prefix, call))
    cached = perplexity(model, ids, dynamic, Scoring(prefix, call))
    assert plain.tokens == cached.tokens == 5 * (40 - prefix)
    torch.testing.assert_close(torch.tensor(plain.nlls), expected.float())
    torch.testing.assert_close(torch.tensor(cached.nlls), expected.float())
    assert plain.mean == pytest.approx(math.exp(expected.mean()))


def test_a_cache_that_forgets_changes_the_perplexity():
    def forgetful(model):
        cache = dynamic(model)
        inner = cache.layers[0].update

        def update(keys, values, *args, **kwargs):
            keys, values = inner(keys, values, *args, **kwargs)
            return torch.zeros_like(keys), torch.zeros_like(values)

        cache.layers[0].update = update
        return cache

    model, ids = llama(), tokens(3, 40)
    assert perplexity(model, ids, forgetful).mean != pytest.approx(perplexity(model, ids).mean, rel=1e-3)


def test_a_model_is_at_no_distance_from_itself():
    model, ids = llama(), tokens(4, 40)
    same = compare(model, model, ids)
    assert same.kls == (0.0,) * 4 and same.agreement == 1.0 and same.increase == 0.0
    cached = compare(model, model, ids, dynamic)
    assert abs(cached.kl) < 1e-12 and cached.agreement == 1.0


def test_kl_and_agreement_are_what_whole_logits_give():
    original, changed, ids = llama(0), llama(1), tokens(4, 40)
    found = compare(original, changed, ids, dynamic, Scoring(prefix=12, call=9))
    with torch.no_grad():
        p, q = (m(ids).logits[:, 11:-1].log_softmax(-1) for m in (original, changed))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean(1)
    torch.testing.assert_close(torch.tensor(found.kls), kl.float())
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.reference.mean == pytest.approx(perplexity(original, ids, scoring=Scoring(12)).mean)
    assert found.increase == pytest.approx(found.model.mean / found.reference.mean - 1)


def test_a_reference_outlives_its_model_and_fits_its_own_tokens_only():
    original, changed, ids = llama(0), llama(1), tokens(4, 40)
    live, known = compare(original, changed, ids), remember(original, ids)
    for weight in original.model.layers.parameters():
        weight.data.zero_()
    assert compare(known, changed, ids) == live
    assert known.perplexity() == live.reference
    with pytest.raises(ValueError, match="other tokens"):
        compare(known, changed, ids.flip(0))


def test_logits_that_are_capped_after_the_head_are_scored_as_the_model_makes_them():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=2.0)
    model = transformers.Gemma2ForCausalLM(config).eval().double()
    model.model.embed_tokens.weight.data.mul_(20)
    ids = tokens(3, 24)
    assert layers_and_head(model) is None and layers_and_head(llama()) is not None
    with torch.no_grad():
        expected = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:])
    assert perplexity(model, ids).mean == pytest.approx(math.exp(expected))
    known = remember(model, ids)
    assert known.perplexity() == compare(known, model, ids).model


def test_windows_that_do_not_fit_the_prefix_are_refused():
    with pytest.raises(ValueError, match="40 tokens cannot be scored after a prefix of 40"):
        perplexity(llama(), tokens(1, 40), scoring=Scoring(prefix=40))


def test_the_interval_contains_the_mean_and_narrows():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).add(3).tolist()
    few, many = (Perplexity(tuple(values[:n]), n) for n in (20, 400))
    widths = []
    for found in (few, many):
        low, high = found.interval()
        assert low < found.mean < high
        widths.append(math.log(high / low))
    assert widths[1] == pytest.approx(2 * 1.96 / 20, rel=0.15)  # the normal approximation at n = 400
    assert widths[0] > 2.5 * widths[1]
    assert interval([1.5]) == (1.5, 1.5)


def test_pairs_of_windows_tell_more_than_both_alone():
    model, ids = llama(), tokens(12, 40)
    close = llama()
    close.model.layers[1].mlp.down_proj.weight.data.mul_(1.02)
    found = compare(model, close, ids)
    low, high = found.increase_interval()
    alone = found.model.interval()
    assert low <= found.increase <= high
    assert high - low < 0.5 * (alone[1] - alone[0]) / found.reference.mean


# ** recall **


class Copier(torch.nn.Module):
    """Predicts what followed the last earlier occurrence of a token among the `reach` tokens that it sees."""

    def __init__(self, vocabulary: int, reach: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(1, vocabulary)
        self.reach, self.device = reach, torch.device("cpu")

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False, past_key_values=None, logits_to_keep=0):
        seen = past_key_values if past_key_values is not None else []
        new = input_ids[0].tolist()
        seen += new
        logits = torch.zeros(1, len(new), self.head.out_features)
        for row in range(len(new)):
            last = len(seen) - len(new) + row
            for place in range(last - 1, max(-1, last - self.reach - 1), -1):
                if seen[place] == seen[last]:
                    logits[0, row, seen[place + 1]] = 20.0
                    break
        return SimpleNamespace(logits=logits[:, logits_to_keep])


@pytest.mark.parametrize("cache_of", [None, lambda model: []])
def test_a_model_that_copies_recalls_as_far_as_it_reaches(cache_of):
    vocabulary, gaps = 50_000, (64, 160, 400)
    filler = torch.arange(2 * needed(gaps)).view(2, -1)
    found = recall(Copier(vocabulary, reach=200), filler, gaps, cache_of, seed=1)
    chance = math.log(vocabulary)
    assert [r.gap for r in found] == list(gaps)
    for r in found:
        assert all(nll == pytest.approx(chance, abs=0.1) for nll in r.first) and len(r.first) == 2
    assert [r.gain for r in found] == [pytest.approx(g, abs=0.1) for g in (chance, chance, 0)]


def test_strings_lie_where_their_gaps_say():
    gaps = (128, 512, 2048)
    found = repeated(torch.zeros(5000, dtype=torch.long), gaps, 1000, seed=0)
    assert len(found.ids) == needed(gaps) and found.second[-1] + STRING == len(found.ids)
    for gap, a, b in zip(gaps, found.first, found.second, strict=True):
        assert b - a == gap and torch.equal(found.ids[a : a + STRING], found.ids[b : b + STRING])
    strings = [found.ids[a : a + STRING] for a in found.first]
    assert not torch.equal(strings[0], strings[1])
    with pytest.raises(ValueError, match=r"\[64, 96\]: the least is 32, and the others are at least 64 apart"):
        repeated(torch.zeros(500, dtype=torch.long), (64, 96), 1000, seed=0)


# ** caches **


def test_the_bytes_of_a_dynamic_cache_are_layers_times_keys_and_values():
    model = llama().float()
    found = decoding(model, tokens(1, 128)[0], (32, 128), dynamic, steps=2)
    for d, length in zip(found, (32, 128), strict=True):
        assert d.tokens == length
        assert d.bytes == 2 * 2 * SIZES["num_key_value_heads"] * SIZES["head_dim"] * length * 4
        assert d.bytes_per_token == 2 * 2 * 2 * 8 * 4 and d.tokens_per_second > 0
    assert decoding(model, tokens(1, 128)[0], (32,), None, steps=1)[0].bytes == found[0].bytes
    with pytest.raises(ValueError, match="with 500 tokens"):
        decoding(model, tokens(1, 128)[0], (500,), dynamic)


def test_every_storage_counts_once_and_whole_wherever_it_is_held():
    class Slotted:
        __slots__ = ("state",)

    storage = torch.zeros(100)
    slotted = Slotted()
    slotted.state = torch.zeros(7, dtype=torch.int8)
    cache = SimpleNamespace(
        views=[storage[:3], storage[50:]], table={"factors": (torch.zeros(5, dtype=torch.float64), "name")}, own=slotted
    )
    cache.itself = cache
    assert cache_bytes(cache) == 100 * 4 + 5 * 8 + 7
    cache.weights, cache.module = torch.nn.Parameter(torch.zeros(9)), torch.nn.Linear(2, 2)
    assert cache_bytes(cache) == 100 * 4 + 5 * 8 + 7


def test_a_cache_that_was_cropped_keeps_its_storage():
    model, ids = llama(), tokens(1, 64)
    cache = dynamic(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    before = cache_bytes(cache)
    cache.crop(-32)
    assert cache.get_seq_length() == 32 and cache_bytes(cache) == before


# ** the command **


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with a tokenizer of bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = []
    for seed, name in enumerate(("original", "changed")):
        folder = tmp_path_factory.mktemp("models") / name
        llama(seed, vocab_size=256).float().save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        made.append(folder)
    return made


SMALL = ("--tokens", 200, "--length", 64, "--prefix", 16, "--call", 20, "--gap", 64, "--gap", 4096, "--filled", 96)


def run(*arguments):
    from latent.rewriter.command.cli import app
    from typer.testing import CliRunner

    return CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)


def test_eval_compares_models_side_by_side(folders, tmp_path):
    original, changed = folders
    picture = tmp_path / "plot.png"
    told = run(changed, "--against", original, "--text", "pkg:json", "--plot", picture, *SMALL)
    assert told.exit_code == 0 and picture.stat().st_size > 5000
    assert "pkg:json" in told.stdout and "same token" in told.stdout and "64 apart" in told.stdout
    lines = [line.split() for line in told.stdout.splitlines()]
    assert sum(line[:1] == ["original"] for line in lines) == sum(line[:1] == ["changed"] for line in lines) == 3

    data = json.loads(run(changed, "--against", original, "--text", "pkg:json", "--json", *SMALL).stdout)
    assert data["base"] == "original" and [m["name"] for m in data["models"]] == ["original", "changed"]
    base, other = data["models"]
    assert base["scores"][0]["against"] is None and base["scores"][0]["perplexity"]["tokens"] == 5 * 48
    found = other["scores"][0]["against"]
    assert found["kl"] > 0 and found["agreement"] < 1
    assert found["increase"] == pytest.approx(
        other["scores"][0]["perplexity"]["mean"] / base["scores"][0]["perplexity"]["mean"] - 1
    )
    assert [r["gap"] for r in other["recalls"]] == [64]  # the model has 256 positions
    assert other["decodings"][0]["bytes_per_token"] == 2 * 2 * 2 * 8 * 4


def test_eval_says_what_is_wrong(folders, tmp_path):
    empty = tmp_path / "empty"
    transformers.LlamaConfig(**SIZES).save_pretrained(empty)
    for arguments, reason in (
        ((folders[0], "--text", "pkg:nowhere"), "pkg:nowhere: no such package"),
        ((folders[0], "--text", "pkg:json", "--tokens", 10**7), "Ask for fewer tokens"),
        ((folders[0], "--prefix", 600), "512 tokens cannot be scored after a prefix of 600"),
        ((folders[0], "--plot", tmp_path / "no" / "a.png"), "there is no folder"),
        ((tmp_path / "nothing",), "there is no"),
        ((empty, "--tokenizer", folders[0]), "empty: the folder holds no weights"),
        ((tmp_path / "a.py:make",), "No target is a folder, so there is no tokenizer"),
    ):
        told = run(*arguments)
        assert told.exit_code == 1 and reason in told.stderr
