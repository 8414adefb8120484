"""Small random models in Mixtral's format."""

from __future__ import annotations

import string

import pytest
import torch

SIZES = {
    "vocab_size": 112,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "initializer_range": 0.3,  # large enough for attention and gate to matter
    "eos_token_id": None,
}


@pytest.fixture(scope="session")
def save_mixtral():
    """Call it with a folder, a dtype and settings: it saves a model in several shards, and returns it in float32."""
    transformers = pytest.importorskip("transformers", reason="no transformers: pip install pikv[transformers]")

    def save(folder, *, dtype=torch.float32, **settings):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES | settings))
        model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
        return transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return save


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, save_mixtral):
    """A folder with a model and a tokenizer, one token a character."""
    tokenizers = pytest.importorskip("tokenizers", reason="no tokenizers: pip install pikv[mpi]")
    folder = tmp_path_factory.mktemp("model")
    save_mixtral(folder)
    words = {character: index for index, character in enumerate(["<unk>", *string.printable])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
