"""Prefixes in transformers: `generate` computes what no cache of the pool has, and says the same."""

from __future__ import annotations

import contextlib

import pytest
import torch
from obstore.store import MemoryStore

import pikv
from pikv.adapters.transformers import attach
from pikv.adapters.zarr_store import StoredPrefixes
from pikv.testing.transformers.models import cache_argument

NAMES = {"page_size": 16, "tail_tokens": 16}


@contextlib.contextmanager
def computed(model):
    """The tokens of each call of the model's layers, as they come."""
    counts = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: counts.append(output.shape[1]))
    yield counts
    hook.remove()


class Asker:
    """A model, and the pool that its caches share."""

    def __init__(self, model, prefix_store=None):
        self.model, self.host = model, attach(model, pikv.RuntimeConfig(**NAMES, prefix_store=prefix_store))
        self.pool = pikv.PagePool(self.host.model, self.host.runtime, capacity_bytes=1 << 22)

    def says(self, ids, cache=None, **settings):
        """The output of generate, the cache, and how many tokens its first call computed."""
        cache = self.host.new_cache(prefix_from=self.pool) if cache is None else cache
        settings = {"attention_mask": torch.ones_like(ids), **settings, "do_sample": False, "max_new_tokens": 12}
        settings |= {"return_dict_in_generate": True, "output_logits": True}
        with computed(self.model) as counts:
            said = self.model.generate(ids, pad_token_id=0, **{cache_argument(self.model): cache}, **settings)
        return said, cache, counts[0]


@pytest.fixture
def asker():
    """Makes askers, and checks in the end that nothing leaks."""
    made = []

    def make(*args):
        made.append(Asker(*args))
        return made[-1]

    yield make
    for each in made:
        each.host.detach()
        each.pool.prefixes.clear()
        each.pool.check_integrity()


@pytest.mark.parametrize("family", ["mixtral", "llama", "qwen3_moe", "deepseek_v2"])
def test_a_known_document_is_not_computed_again(models, family, pad, plain, alike, asker):
    """Answers are those without a prefix, and only the rest of the prompt is computed; the next turn goes on."""
    model = models(family)
    document, questions = pad(70, [0])[0], pad(9, [0, 0], seed=1)[0]
    asking = asker(model)
    for question, tokens in zip(questions, (79, 31), strict=True):
        ids = torch.cat([document, question[None]], dim=1)
        talk = plain(model)
        said, cache, first = asking.says(ids)
        asking.host.detach()
        expected = talk.says(ids, torch.ones_like(ids), max_new_tokens=12)
        asking.host = attach(model, NAMES)
        alike(said, expected)
        assert first == tokens
    turn = torch.cat([said.sequences, questions[:1]], dim=1)
    assert asking.says(turn, cache)[2] == 10  # the last word and the new question
    cache.reset()
    alike(asking.says(ids, cache)[0], expected)


def test_batches_of_different_coverage(mixtral, pad, plain, alike, asker):
    """What all sequences have is skipped; what some have is computed beside the others, and not stored twice."""
    document = pad(70, [0])[0]
    asking = asker(mixtral)
    asking.says(document)
    other = document.clone()
    other[:, 40:] = 7
    ids = torch.cat([document, other])
    said, cache, first = asking.says(ids)
    again, _, none = asking.says(torch.cat([ids, pad(70, [0], seed=5)[0]]))
    asking.host.detach()
    alike(said, plain(mixtral).says(ids, torch.ones_like(ids), max_new_tokens=12))
    asking.host = attach(mixtral, NAMES)
    assert (first, none) == (70 - 32, 70)
    torch.testing.assert_close(again.logits[0][:2], said.logits[0], atol=1e-4, rtol=1e-4)
    assert cache.pikv.retrieve(0).positions[:, 0, :70].tolist() == [list(range(70))] * 2


def test_padded_batches_and_embeddings_are_computed_whole(mixtral, pad, asker):
    """Their tokens do not stand where those of a prompt alone would."""
    asking = asker(mixtral)
    ids, mask = pad(70, [0, 5])
    for _ in range(2):
        assert asking.says(ids, attention_mask=mask)[2] == 70
    cache = asking.host.new_cache(prefix_from=asking.pool)
    embedded = mixtral.get_input_embeddings()(ids[:1]).detach()
    mixtral.generate(inputs_embeds=embedded, max_new_tokens=2, pad_token_id=0, past_key_values=cache)
    assert cache.get_seq_length() == 71


def test_other_weights_miss(random_model, pad, asker):
    """Another model of the same shape, and the same model after a step of training."""
    ids, models = pad(70, [0])[0], [random_model("llama") for _ in range(2)]
    asking, other = (asker(model) for model in models)
    other.pool = asking.pool
    assert [asking.says(ids)[2], asking.says(ids)[2], other.says(ids)[2]] == [70, 22, 70]
    with torch.no_grad():
        next(models[0].parameters()).mul_(1.5)
    assert asking.says(ids)[2] == 70


def test_another_process_adopts_what_this_one_has_written(random_model, pad, asker):
    """Equal weights have one name wherever they are, other weights another; the answers are the same."""
    ids, store, models = pad(70, [0])[0], MemoryStore(), [random_model("llama") for _ in range(2)]
    with StoredPrefixes(store) as one, StoredPrefixes(store) as other:
        writer, reader = (asker(model, stored) for model, stored in zip(models, (one, other), strict=True))
        expected, _, first = writer.says(ids)
        assert first == 70
        one.flush()
        for _ in range(2):  # from the store, then from memory
            said, _, first = reader.says(ids)
            assert first == 22
            torch.testing.assert_close(said.logits, expected.logits, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            next(models[1].parameters()).mul_(1.5)
        assert reader.says(ids)[2] == 70


def test_a_prompt_that_another_process_computes_is_waited_for(random_model, pad, asker):
    """Each layer for its own pages; a call that waits in vain leaves the cache empty, and can be made again."""
    ids, store, models = pad(70, [0])[0], MemoryStore(), [random_model("llama") for _ in range(2)]
    with StoredPrefixes(store) as one, StoredPrefixes(store) as other:
        writer, reader = (asker(model, stored) for model, stored in zip(models, (one, other), strict=True))
        cache = reader.host.new_cache(prefix_from=reader.pool, wait_s=0)
        with pytest.raises(pikv.WaitTimeoutError, match="page 0 of 3 of layer 0"):
            reader.says(ids, cache)
        assert (cache.get_seq_length(), cache.pikv.sequences) == (0, 0)
        expected, _, _ = writer.says(ids)
        one.flush()
        said, _, first = reader.says(ids, cache)
        assert first == 22
        torch.testing.assert_close(said.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_waiting_needs_a_pool_and_a_store(mixtral, asker):
    """InputError says what is missing."""
    asking = asker(mixtral)
    for settings in ({"prefix_from": asking.pool, "wait_s": 1}, {"wait_s": 1}):
        with pytest.raises(pikv.InputError, match="wait_s needs prefix_from=pool, and a prefix_store"):
            asking.host.new_cache(**settings)


def test_a_first_call_that_fails_leaves_the_cache_empty(mixtral, pad, plain, alike, asker):
    """What it adopted is let go, so that the call can be made again; a fork of an empty cache adopts too."""
    ids = pad(70, [0])[0]
    asking = asker(mixtral)
    expected, _, _ = asking.says(ids)
    cache = asking.host.new_cache(prefix_from=asking.pool)
    hook = mixtral.base_model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asking.says(ids, cache)
    hook.remove()
    assert (cache.get_seq_length(), cache.pikv.sequences) == (0, 0)
    for each in (cache.fork(), cache):
        said, _, first = asking.says(ids, each)
        assert first == 22
        alike(said, expected)


def test_what_is_not_shared_is_computed(models, pad, asker):
    """A model with sliding windows says why."""
    asking = asker(models("mixtral, sliding"))
    for _ in range(2):
        _, cache, first = asking.says(pad(70, [0])[0])
        assert first == 70
    assert "sliding window" in cache.pikv.why_unshared


def test_two_pools_are_refused(mixtral, asker):
    """prefix_from is the pool."""
    asking = asker(mixtral)
    with pytest.raises(pikv.InputError, match="give prefix_from alone"):
        asking.host.new_cache(pool=asking.pool, prefix_from=asking.pool)
