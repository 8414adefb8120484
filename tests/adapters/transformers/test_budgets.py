"""With a budget the model says what it would say if it could not see the evicted tokens, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
import transformers

from pikv.adapters.transformers import attach
from pikv.testing.transformers.models import cache_argument

BUDGETS = {
    "importance": {"token_selector": {"name": "importance", "recent": 8}},
    "importance, pyramid": {"token_selector": {"name": "importance", "recent": 8}, "allocator": "pyramid"},
    "recent": {"token_selector": {"name": "recent", "sinks": 4, "recent": 8}},
}


class Masked:
    """Attention over all tokens with those masked that a PiKV cache did not hold at that moment.

    held: for each forward call and layer, the positions that were stored before it, [batch, kv_heads, tokens].
    """

    def __init__(self, layers):
        self.layers, self.held, self.call = layers, [], 0

    def note(self, cache):
        """Before a forward call."""
        layers = range(len(self.layers) if cache.sequences else 0)
        self.held.append([cache.retrieve(layer_id).positions for layer_id in layers])

    def attend(self, module, query, key, value, attention_mask, *, scaling, **_):
        """As transformers' attention functions do; the keys are a DynamicCache's."""
        layer, new, total = self.layers[module.layer_idx], query.shape[2], key.shape[2]
        visible = torch.zeros(*key.shape[:3], dtype=torch.bool)
        if self.held[self.call]:
            positions = self.held[self.call][module.layer_idx]
            visible |= (positions[..., None] == torch.arange(total)).any(2)
        visible[:, :, total - new :] = True
        visible &= attention_mask[:, 0, :, :total]  # a prepared mask comes as it is: [batch, 1, 1, tokens]
        places = torch.arange(total)
        asked = places[total - new :, None]
        seen = places <= asked
        if layer.window is not None:
            seen &= places > asked - layer.window
        mask = visible[:, :, None, None, :] & seen
        grouped = query.unflatten(1, (layer.kv_heads, -1))
        scores = (grouped @ key[:, :, None].mT * scaling).masked_fill(~mask, -torch.inf)
        output = scores.softmax(-1).nan_to_num() @ value[:, :, None]
        self.call += module.layer_idx == len(self.layers) - 1
        return output.flatten(1, 2).transpose(1, 2), None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe", "gemma3, mixed"])
@pytest.mark.parametrize("names", BUDGETS.values(), ids=BUDGETS)
def test_a_budget_is_a_mask(family, names, models, pad):
    """Prompt in chunks, decoding, and a second turn; the tokens that are held come from the cache itself."""
    model = models(family)
    ids, mask = pad(150, [0, 40])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    chunks = torch.arange(150).split([48, 48, 1, 1, 1, 1, 1, 1, 48])
    settings = {"page_size": 16, "tail_tokens": 16, "budget_tokens": 48, **names}
    ours, theirs = [], []
    with attach(model, settings) as host, torch.no_grad():
        reference, cache = Masked(host.model.layers), host.new_cache()
        for chunk in chunks:
            reference.note(cache.pikv)
            inputs = {"input_ids": ids[:, chunk], "position_ids": places[:, chunk]}
            seen = mask[:, : int(chunk[-1]) + 1]
            ours.append(model(**inputs, attention_mask=seen, **{cache_argument(model): cache}).logits)
        assert int(cache.pikv.retrieve(1).mask.sum(-1).max()) < 110  # something was evicted
    transformers.AttentionInterface.register("masked", reference.attend)
    before = model.config._attn_implementation
    model.set_attn_implementation("masked")
    try:
        with torch.no_grad():
            full = transformers.DynamicCache()
            for chunk in chunks:
                inputs = {"input_ids": ids[:, chunk], "position_ids": places[:, chunk]}
                padding = mask[:, None, None].bool()
                theirs.append(model(**inputs, attention_mask=padding, **{cache_argument(model): full}).logits)
    finally:
        model.set_attn_implementation(before)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(ours, 1)[real], torch.cat(theirs, 1)[real], atol=1e-4, rtol=1e-4)
