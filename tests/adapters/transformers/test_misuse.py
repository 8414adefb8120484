"""What cannot work is refused, and says what to do; the cache is as it was."""

from __future__ import annotations

import pytest
import torch

import pikv
from pikv.adapters.transformers import attach
from pikv.testing.transformers.models import cache_argument


@pytest.fixture
def talk(mixtral, pikv_talk):
    """One that has seen a prompt of three rows and twelve tokens, the second padded by two."""
    talk = pikv_talk(mixtral)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :2] = 0
    talk.logits(input_ids=torch.ones(3, 12, dtype=torch.int64), attention_mask=mask)
    talk.mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    talk.token = torch.ones(3, 1, dtype=torch.int64)
    return talk


def refused(talk, error, match, **inputs):
    """The call raises, and a good one gives the same as if it had not been tried."""
    good, untouched = {"input_ids": talk.token, "attention_mask": talk.mask}, talk.cache.fork()
    with pytest.raises(error, match=match):
        talk.logits(**inputs)
    assert talk.cache.get_seq_length() == 12
    logits, talk.cache = talk.logits(**good), untouched
    assert torch.equal(logits, talk.logits(**good))


def test_attention_weights(talk):
    """PiKV's attention keeps none."""
    inputs = {"input_ids": talk.token, "attention_mask": talk.mask, "output_attentions": True}
    refused(talk, pikv.InputError, "output_attentions must be off", **inputs)


def test_token_trees(talk):
    """A mask of four dimensions says who sees whom; PiKV goes by positions."""
    tree = torch.ones(3, 1, 1, 13, dtype=torch.bool)
    refused(talk, pikv.InputError, "token trees", input_ids=talk.token, attention_mask=tree)


def test_a_mask_of_the_new_tokens_alone(talk):
    """It has to cover all."""
    inputs = {"input_ids": talk.token, "attention_mask": torch.ones(3, 1)}
    refused(talk, pikv.InputError, r"must be .* = \[3, 13\], got \[3, 1\]", **inputs)


def test_a_mask_that_hides_what_is_stored(talk):
    """What is stored stays."""
    hidden = talk.mask.clone()
    hidden[0, 5] = 0
    refused(talk, pikv.InputError, "go on saying of older tokens", input_ids=talk.token, attention_mask=hidden)


def test_a_mask_that_shows_padding(talk):
    """What was padding is not stored."""
    refused(talk, pikv.InputError, "go on saying", input_ids=talk.token, attention_mask=torch.ones(3, 13))


def test_a_mask_that_is_forgotten(talk):
    """Padding has to be said again."""
    refused(talk, pikv.InputError, "must be given again", input_ids=talk.token)


def test_another_batch(talk):
    """A cache is for one batch."""
    refused(talk, pikv.InputError, "holds 3 sequences, got a batch of 2", input_ids=talk.token[:2])


def test_a_model_that_is_not_attached(mixtral, talk, plain):
    """The cache would give it the new tokens alone."""
    stranger = plain(mixtral)
    stranger.cache = talk.cache
    with pytest.raises(pikv.StateError, match="not attached to"):
        stranger.logits(input_ids=talk.token, attention_mask=talk.mask)


def test_an_attention_that_was_changed_afterwards(mixtral):
    """The new tokens would attend to themselves alone."""
    with attach(mixtral) as host:
        cache = host.new_cache()
        mixtral.set_attn_implementation("eager")
        with pytest.raises(pikv.StateError, match="changed to 'eager'"):
            mixtral(input_ids=torch.ones(1, 4, dtype=torch.int64), **{cache_argument(mixtral): cache})


def test_a_scale_that_was_changed_afterwards(random_model):
    """The cache goes by what the layer said when PiKV was attached."""
    model = random_model("llama")
    with attach(model) as host:
        model.base_model.layers[1].self_attn.scaling = 0.5
        with pytest.raises(pikv.StateError, match=r"layer 1 attends with scale 0\.5"):
            model(input_ids=torch.ones(1, 4, dtype=torch.int64), **{cache_argument(model): host.new_cache()})


def test_an_attention_that_never_asks(talk):
    """Should a version of transformers not hand keywords down, the next layer's tokens show it."""
    talk.cache.begin(3, 1, {"attention_mask": talk.mask})
    states = torch.zeros(3, 2, 1, 16)
    talk.cache.take(0, states, states)
    with pytest.raises(pikv.StateError, match="layer 0 took new tokens and its attention did not ask"):
        talk.cache.take(1, states, states)


def test_attaching_twice(mixtral):
    """One host at a time."""
    with attach(mixtral), pytest.raises(pikv.StateError, match="attached to this model already"):
        attach(mixtral)


def test_sink_logits_without_a_cache(models):
    """SDPA has no sinks; the model's own attention has."""
    model = models("gpt_oss")
    with attach(model), pytest.raises(pikv.StateError, match="sink logits or a softcap"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)


def test_a_composition_that_cannot_work(mixtral):
    """Before the model changes."""
    before = mixtral.config._attn_implementation
    with pytest.raises(pikv.ConfigError, match="budget_tokens"):
        attach(mixtral, {"token_selector": "recent"})
    assert mixtral.config._attn_implementation == before


def test_dropout(random_model):
    """A cache and training do not go together."""
    model = random_model("llama", attention_dropout=0.5).train()
    with attach(model) as host, pytest.raises(pikv.InputError, match=r"dropout must be 0 .* got 0.5"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), **{cache_argument(model): host.new_cache()})


def test_a_pool_that_is_full_takes_the_call_back(models, pad):
    """The tokens of the call are forgotten in all layers; with more room the answer is what it would have been."""
    model = models("mixtral")
    ids, mask = pad(40, [0])
    inputs = {"input_ids": ids, "attention_mask": mask}
    with attach(model, {"page_size": 16, "tail_tokens": 16}) as host:
        pool = pikv.PagePool(host.model, host.runtime, capacity_bytes=20_000)
        first, second = host.new_cache(pool=pool), host.new_cache(pool=pool)
        with torch.no_grad():
            expected = model(**inputs, **{cache_argument(model): first}).logits
            held = first.pikv.stored_bytes().pages
            with pytest.raises(pikv.PoolFullError):
                model(**inputs, **{cache_argument(model): second})
            assert second.get_seq_length() == 0
            first.reset()
            assert held > 0
            torch.testing.assert_close(model(**inputs, **{cache_argument(model): second}).logits, expected)


class BrokenModelError(Exception):
    """Raised in the middle of a model."""


def fail_in(module):
    """A hook that makes a module fail once it has computed."""

    def fail(*_):
        raise BrokenModelError

    return module.register_forward_hook(fail)


@pytest.mark.parametrize("layer_id", [0, 2])
def test_a_call_that_fails_is_taken_back(layer_id, mixtral, talk):
    """Also after the last layer's attention; the next call gives what it would have given."""
    inputs = {"input_ids": talk.token, "attention_mask": talk.mask}
    copied, expected = talk.cache.fork(), None
    expected, talk.cache = talk.logits(**inputs), copied
    hook = fail_in(mixtral.base_model.layers[layer_id].mlp)
    with pytest.raises(BrokenModelError):
        talk.logits(**inputs)
    hook.remove()
    assert talk.cache.get_seq_length() == 12
    torch.testing.assert_close(talk.logits(**inputs), expected)


def test_a_first_call_that_fails_leaves_the_batch_open(mixtral, pikv_talk):
    """Nothing is held, so another batch may come."""
    talk = pikv_talk(mixtral)
    hook = fail_in(mixtral.base_model.layers[1].mlp)
    with pytest.raises(BrokenModelError):
        talk.logits(input_ids=torch.ones(3, 4, dtype=torch.int64))
    hook.remove()
    talk.logits(input_ids=torch.ones(2, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("family", "names"),
    [("mixtral", {"token_selector": "recent", "budget_tokens": 84, "tail_tokens": 68}), ("mixtral, sliding", {})],
)
def test_where_layers_evict_a_call_cannot_be_taken_back(family, names, models, pad, pikv_talk):
    """The cache says so, and starts anew after a reset."""
    model, (ids, mask) = models(family), pad(150, [0])
    talk = pikv_talk(model, **names)
    expected = talk.logits(input_ids=ids, attention_mask=mask)
    hook = fail_in(model.base_model.layers[1].mlp)
    with pytest.raises(BrokenModelError):
        talk.logits(input_ids=ids)
    hook.remove()
    with pytest.raises(pikv.StateError, match="no longer hold the same text; reset"):
        talk.cache.commit()
    with pytest.raises(pikv.StateError, match="no longer hold the same text; reset"):
        talk.logits(input_ids=ids)
    talk.cache.reset()
    torch.testing.assert_close(talk.logits(input_ids=ids, attention_mask=mask), expected)


def test_an_interrupted_call_is_taken_back(mixtral, talk):
    """Torch tells no hook of a KeyboardInterrupt; the next call finds what it left."""
    inputs = {"input_ids": talk.token, "attention_mask": talk.mask}
    copied = talk.cache.fork()
    expected, talk.cache = talk.logits(**inputs), copied

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = mixtral.base_model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        talk.logits(**inputs)
    hook.remove()
    torch.testing.assert_close(talk.logits(**inputs), expected)


def test_a_gradient_through_a_cache(mixtral):
    """It would leave out keys and values."""
    with attach(mixtral) as host:
        logits = mixtral(
            input_ids=torch.ones(1, 4, dtype=torch.int64), **{cache_argument(mixtral): host.new_cache()}
        ).logits
        with pytest.raises(pikv.StateError, match="train without a cache"):
            logits.sum().backward()
    mixtral.zero_grad()


def test_a_cache_of_another_model(mixtral, models, pikv_talk):
    """Its layers are others."""
    talk = pikv_talk(models("gemma3, mixed"))
    with attach(mixtral), pytest.raises(pikv.InputError, match="made for a model of another shape"):
        mixtral(input_ids=torch.ones(1, 4, dtype=torch.int64), **{cache_argument(mixtral): talk.cache})


def test_a_cache_that_is_not_to_be_used(talk):
    """One of the two is a mistake."""
    inputs = {"input_ids": talk.token, "attention_mask": talk.mask, "use_cache": False}
    refused(talk, pikv.InputError, "use_cache must not be False", **inputs)


def test_no_tokens(talk):
    """Neither ids nor embeddings."""
    refused(talk, pikv.InputError, "input_ids or inputs_embeds", attention_mask=talk.mask)


def test_a_runtime_that_is_none(mixtral):
    """A name alone composes nothing."""
    with pytest.raises(pikv.ConfigError, match="got 'int8'"):
        attach(mixtral, "int8")
