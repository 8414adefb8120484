"""The second pass over a prompt, driven through a transformers model."""

from __future__ import annotations

import pytest
import torch

from pikv import StateError
from pikv.adapters.transformers import attach

SETTINGS = {
    "token_selector": {"name": "kvzip", "recent": 8},
    "page_size": 16,
    "tail_tokens": 16,
    "budget_tokens": 48,
}


def eager_peaks(model, ids, prompt):
    """[layers, kv_heads, prompt]: the most attention that each token of the prompt gets from any query past it."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    peaks = torch.stack([each[0, :, prompt:, :prompt].amax(1) for each in attentions])
    return peaks.unflatten(1, (2, 2)).amax(2)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_stays_is_what_a_second_pass_attends_to(family, random_model):
    """The same tokens as the peaks of the whole attention matrix say, sinks and recent ones aside; answers go on."""
    ids = torch.randint(1, 97, (1, 150), generator=torch.Generator().manual_seed(1))
    peaks = eager_peaks(random_model(family), torch.cat([ids, ids[:, :90]], dim=1), 150)
    model = random_model(family)
    with attach(model, SETTINGS) as host, torch.no_grad():
        cache = host.new_cache()
        model(ids, past_key_values=cache)
        host.rehearse(cache, ids[:, :90], chunk_tokens=40)
        assert cache.get_seq_length() == 150
        cache.pikv.finish_prefill()
        for layer_id in range(3):
            held = cache.pikv.retrieve(layer_id)
            for head in range(2):
                kept = held.positions[0, head][held.mask[0, head]]
                competing = peaks[layer_id, head, 4:142]
                expected = competing.topk(48 - 12).indices + 4
                assert sorted(kept.tolist()) == sorted([*range(4), *expected.tolist(), *range(142, 150)])
        answer = model.generate(torch.cat([ids, ids[:, :1]], dim=1), past_key_values=cache, max_new_tokens=5)
    assert answer.shape == (1, 156)


def test_a_model_without_such_a_selector_is_not_rehearsed(random_model):
    """Nothing would look at it."""
    model = random_model("llama")
    with attach(model) as host:
        cache = host.new_cache()
        with pytest.raises(StateError, match="KVzip"):
            host.rehearse(cache, torch.ones(1, 20, dtype=torch.int64))
