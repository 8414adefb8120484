"""The shipped model recalls what is hidden in its context, asked through generate, with parts composed by name."""

from __future__ import annotations

from pathlib import Path

import generate_data
import numpy as np
import pytest
import torch
import transformers

SHIPPED = Path(__file__).parents[3] / "downstream_tasks" / "models" / "tiny_moe"
CUT = {"page_size": 16, "tail_tokens": 32, "budget_tokens": 384}
# The least that it recalls of 16 values hidden in 768 characters, and the most bytes, as a share of the exact cache's.
COMPOSITIONS = {
    "exact": ({}, 16, 1.01),
    "int8": ({"compressor": "int8", "page_size": 32, "tail_tokens": 32}, 16, 0.4),
    "int4": ({"compressor": "int4", "page_size": 32, "tail_tokens": 32}, 16, 0.3),
    "int2": ({"compressor": "int2", "page_size": 32, "tail_tokens": 32}, 14, 0.25),
    "quest": ({"page_selector": {"name": "quest", "pages": 24, "dense_layers": 1}, "page_size": 16}, 14, 1.2),
    "recent": ({**CUT, "token_selector": {"name": "recent", "recent": 32}}, 4, 0.75),
    "importance": ({**CUT, "token_selector": {"name": "importance", "recent": 32}}, 1, 0.75),
    "importance, pyramid, int4": (
        {**CUT, "token_selector": {"name": "importance", "recent": 32}, "allocator": "pyramid", "compressor": "int4"},
        1,
        0.4,
    ),
}


@pytest.fixture(scope="module")
def shipped():
    """The model in float32, as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples():
    """Two contexts of 768 characters, with eight questions each."""
    text, rng = generate_data.standard_library(held_out=True), np.random.default_rng(11)
    return [generate_data.recall_sample(text, rng, length=768, pairs=8) for _ in range(2)]


def recalled(talk, samples):
    """How many values it names, asked one after another in one conversation; and the bytes held before that."""
    lines = [sample.text[sample.question_start :].splitlines() for sample in samples]
    ids = tokens([sample.text[: sample.question_start] for sample in samples])
    for chunk in ids.split(
        256, dim=1
    ):  # by hand: generate(prefill_chunk_size=) of transformers 5.2 miscounts positions
        talk.logits(input_ids=chunk)
    talk.cache.pikv.finish_prefill()
    right, held = 0, talk.cache.pikv.stored_bytes().total
    for asked in zip(*lines, strict=True):
        ids = torch.cat([ids, tokens([line[:2] for line in asked])], dim=1)
        ids = talk.says(ids, torch.ones_like(ids), max_new_tokens=2).sequences
        right += int((ids[:, -2:] == tokens([line[2:] for line in asked])).all(-1).sum())
        ids = torch.cat([ids[:, :-2], tokens([line[2:] + "\n" for line in asked])], dim=1)  # go on from the truth
        talk.cache.crop(ids.shape[1] - 3)
    return right, held


def tokens(texts):
    """Ids [batch, characters] of texts of one length."""
    return torch.from_numpy(np.stack([generate_data.token_ids(text) for text in texts])).long()


@pytest.mark.parametrize(("names", "at_least", "at_most"), COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_recall(names, at_least, at_most, shipped, samples, pikv_talk):
    """Exact parts, 8 and 4 bits lose nothing; whatever is stored in less takes less."""
    _, exact = recalled(pikv_talk(shipped, page_size=16, tail_tokens=32), samples)
    right, held = recalled(pikv_talk(shipped, **names), samples)
    assert right >= at_least
    assert held <= at_most * exact
