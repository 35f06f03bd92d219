"""Puts this folder on the path, so that tests can write `from corpus import ALL`; models that several tests share."""

import sys
from pathlib import Path

import pytest
import torch

TESTS = str(Path(__file__).parent)

if TESTS not in sys.path:
    sys.path.insert(0, TESTS)


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=48, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(made)
    return made
