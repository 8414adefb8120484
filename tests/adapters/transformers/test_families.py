"""Every family says with a PiKV cache what it says with a DynamicCache."""

from __future__ import annotations

import pytest
import torch
import transformers

import pikv
from pikv.adapters.transformers import attach, model_config, supported_families
from pikv.testing.transformers.models import cache_argument


def test_greedy_with_left_padding(family_model, prompt, plain, pikv_talk, alike):
    """Sixty-four new tokens for prompts of three lengths: the same logits and the same tokens."""
    expected = plain(family_model).says(*prompt, max_new_tokens=64)
    alike(pikv_talk(family_model).says(*prompt, max_new_tokens=64), expected)


def test_right_padding(family_model, pad, plain, pikv_talk, alike):
    """Padding between the prompt and what follows."""
    prompt = pad(24, [0, 5, 11], left=False)
    expected = plain(family_model).says(*prompt)
    alike(pikv_talk(family_model).says(*prompt), expected)


def test_beams(family_model, pad, plain, pikv_talk):
    """Four beams end in the same sequences with the same scores."""
    prompt, beams = pad(30, [0, 6]), {"num_beams": 4, "output_scores": True}
    expected = plain(family_model).says(*prompt, **beams)
    said = pikv_talk(family_model).says(*prompt, **beams)
    assert torch.equal(said.sequences, expected.sequences)
    torch.testing.assert_close(said.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)


def test_three_turns(family_model, pad, plain, pikv_talk, alike):
    """A conversation: each turn goes on from the cache."""
    ours, theirs = pikv_talk(family_model), plain(family_model)
    ids, mask = pad(50, [0, 13, 30])
    for turn in range(3):
        expected = theirs.says(ids, mask)
        alike(ours.says(ids, mask), expected)
        more, _ = pad(11, [0, 0, 0], seed=turn)
        ids = torch.cat([expected.sequences, more], dim=1)
        mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)


def test_chunks(family_model, pad, plain, pikv_talk):
    """A prompt in chunks of any size, the last of one token."""
    ids, mask = pad(50, [0, 13, 30])
    places = (mask.cumsum(-1) - 1).clamp(min=0)

    def logits(talk):
        parts = []
        for chunk in torch.arange(50).split([16, 3, 30, 1]):
            seen = mask[:, : int(chunk[-1]) + 1]
            parts.append(talk.logits(input_ids=ids[:, chunk], attention_mask=seen, position_ids=places[:, chunk]))
        return torch.cat(parts, dim=1)[mask.bool()]

    expected = logits(plain(family_model))
    torch.testing.assert_close(logits(pikv_talk(family_model)), expected, atol=1e-4, rtol=1e-4)


def test_sliding_layers_keep_their_window(models, pad, pikv_talk):
    """What a sliding layer stores does not grow with the text; a full layer keeps all of it."""
    talk = pikv_talk(models("gemma3, mixed"))
    talk.says(*pad(200, [0]), max_new_tokens=40)
    held = [talk.cache.pikv.retrieve(layer_id).positions.shape[-1] for layer_id in range(3)]
    assert held[1] == 239
    assert max(held[0], held[2]) <= 9 + 2 * 16


def test_latents_are_stored_where_transformers_caches_them(models, pad, pikv_talk):
    """Newer versions cache DeepSeek's latents: one KV head, never expanded, and stored once, as key and as value."""
    model = models("deepseek_v3")
    layer = model_config(model).layers[0]
    if not hasattr(model.base_model.layers[0].self_attn, "expand_kv"):
        assert (layer.kv_heads, layer.key_dim, layer.value_dim) == (4, 24, 24)
        pytest.skip(f"transformers {transformers.__version__} caches DeepSeek's heads expanded; latents need 5.24")
    assert (layer.kv_heads, layer.key_dim, layer.value_dim) == (1, 32 + 8, 32)
    talk = pikv_talk(model)
    talk.says(*pad(100, [0]), max_new_tokens=1)
    pages = (100 - 16) // 16
    assert talk.cache.pikv.stored_bytes().pages == 3 * pages * 16 * 4 * (40 + 1)  # layers; float32, and a position
    context = talk.cache.pikv.retrieve(0)
    assert torch.equal(context.values, context.keys[..., :32])


def test_keys_are_unrotated(family_model):
    """In the first layer a token's key depends on the token alone, until it is rotated."""
    with attach(family_model, {"page_size": 16, "tail_tokens": 16}) as host, torch.no_grad():
        cache = host.new_cache()
        family_model(input_ids=torch.full((1, 9), 5), **{cache_argument(family_model): cache})
        context, rotary = cache.pikv.retrieve(0), host.model.layers[0].rotary
    plain = rotary.remove(context.keys, context.positions)
    assert (context.keys - context.keys[:, :, :1]).abs().max() > 0.1
    torch.testing.assert_close(plain, plain[:, :, :1].expand_as(plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rotary_that_depends_on_the_length_is_not_known(kind, random_model, prompt, plain, pikv_talk, alike):
    """The model is served; only parts that un-rotate keys are refused."""
    factors = {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "factor": 2.0}
    settings = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0, **(factors if kind == "longrope" else {})}
    model = random_model("llama", rope_parameters={**settings, "original_max_position_embeddings": 256})
    assert all(layer.rotary is None for layer in model_config(model).layers)
    alike(pikv_talk(model).says(*prompt), plain(model).says(*prompt))


def test_a_family_that_is_not_known_is_refused_by_name():
    """Before anything changes."""
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=11)
    model = transformers.GPT2LMHeadModel(config)
    before = model.config._attn_implementation
    with pytest.raises(pikv.ConfigError, match=r"'gpt2' are not supported.*mixtral"):
        attach(model)
    assert model.config._attn_implementation == before


def test_bidirectional_attention_is_refused(random_model):
    """A cache holds what came before, so attention that looks ahead cannot use one."""
    model = random_model("gemma3, mixed", use_bidirectional_attention=True)
    with pytest.raises(pikv.ConfigError, match="both directions"):
        attach(model)


def test_supported_families_are_those_tested(family_types):
    """None is claimed that no test runs."""
    assert set(supported_families()) == family_types
