"""Bytes are those of tensors, also of the caches that others have made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pikv
from pikv.evaluation.contestants import Composed, Contestant, Full, Press, Quantized

MODEL = Path(__file__).parents[2] / "downstream_tasks" / "models" / "tiny_moe"
TOKENS, BATCH = 300, 2
FULL_BYTES = BATCH * TOKENS * 4 * 2 * 2 * 32 * 4  # layers, KV heads, keys and values, head_dim, float32


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@torch.no_grad()
def held(model, contestant: Contestant) -> int:
    ids = torch.randint(4, 100, (BATCH, TOKENS))
    with contestant.in_place(model) as kept:
        return kept.held(kept.read(model, ids, chunk=100)).total


def test_of_everything(model):
    """Keys and values of all tokens, in the model's dtype."""
    assert held(model, Full()) == FULL_BYTES


def test_a_second_pass_comes_before_the_cut(model):
    """KVzip keeps to its budget, and its caches go on: what it was shown again is not in them."""
    parts = {"name": "kvzip", "recent": 8}
    kvzip = Composed(
        name="kvzip", runtime={"token_selector": parts, "budget_tokens": 96, "page_size": 16, "tail_tokens": 16}
    )
    with kvzip.in_place(model) as kept, torch.no_grad():
        cache = kept.read(model, torch.randint(4, 100, (BATCH, TOKENS)), chunk=100)
    assert cache.get_seq_length() == TOKENS
    assert int(cache.pikv.retrieve(0).mask.sum(-1).max()) == 96


@pytest.mark.peers
@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_of_codes(model, backend):
    """Four bits and their scales, and 128 tokens or fewer that are not rounded yet."""
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend], reason=f"{backend} is not installed")
    nbytes = held(model, Quantized(bits=4, backend=backend))
    assert FULL_BYTES / 8 < nbytes < FULL_BYTES * (128 / TOKENS + 0.3)


@pytest.mark.peers
def test_of_a_press(model):
    """A press that frees memory holds what it says that it keeps; one that masks holds everything."""
    pytest.importorskip("kvpress", reason="kvpress is not installed")
    assert held(model, Press(press="KnormPress", ratio=0.5)) == FULL_BYTES / 2
    with pytest.raises(pikv.ConfigError, match="KnormPress"):
        held(model, Press(press="NoPress", ratio=0.5))
