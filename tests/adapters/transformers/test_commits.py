"""A host's cache is committed, restored and gone on with."""

from __future__ import annotations

import pytest
import torch
from damage import flip
from obstore.store import MemoryStore

import pikv
from pikv.adapters.transformers import attach
from pikv.adapters.zarr_store import ZarrStreamer
from pikv.testing.transformers.models import cache_argument


@pytest.fixture
def store():
    return MemoryStore()


def runtime_of(store, **parts):
    return pikv.RuntimeConfig(page_size=16, tail_tokens=16, streamer=ZarrStreamer(store), **parts)


def generate(model, cache, ids, mask, **settings):
    settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0} | settings
    return model.generate(ids, attention_mask=mask, **{cache_argument(model): cache}, **settings)


@pytest.mark.parametrize("family", ["mixtral", "mixtral, sliding", "gemma3, mixed", "deepseek_v3"])
def test_a_restored_cache_goes_on_with_the_same_tokens(family, models, prompt, store):
    """Of a padded batch, in another attachment, without being told what was read; and its text goes on growing."""
    model, (ids, mask) = models(family), prompt
    with attach(model, runtime_of(store)) as host:
        cache = host.new_cache()
        said = generate(model, cache, ids, mask)
        cache.commit()
        whole = generate(model, cache, said, torch.cat([mask, mask.new_ones(3, 24)], 1))
    with attach(model, runtime_of(store)) as host:
        restored = host.restore()
        assert torch.equal(restored.token_ids, said[:, :-1])
        restored.crop(-1)
        seen = restored.token_ids
        mask = torch.cat([mask, mask.new_ones(3, seen.shape[1] - 40)], 1)
        first = model(
            input_ids=said[:, -2:-1],
            attention_mask=torch.cat([mask, mask.new_ones(3, 1)], 1),
            **{
                cache_argument(model): restored,
                "position_ids": (mask.sum(-1, keepdim=True)),
            },
        ).logits
        assert torch.equal(first[:, -1].argmax(-1), said[:, -1])
        again = generate(model, restored, said, torch.cat([mask, mask.new_ones(3, 2)], 1))
        assert torch.equal(again, whole)
        assert torch.equal(restored.token_ids, whole[:, :-1])


def test_the_last_token_is_read_again(mixtral, pad, store):
    """So `generate` goes on from what was committed alone."""
    ids, mask = pad(20, [0])
    with attach(mixtral, runtime_of(store)) as host:
        cache = host.new_cache()
        whole = generate(mixtral, cache, ids, mask, max_new_tokens=30)
        cache.crop(40)
        version = cache.commit()
        cache.commit()
        restored = host.restore(version)
        read = restored.token_ids
        restored.crop(-1)
        assert torch.equal(generate(mixtral, restored, read, None, max_new_tokens=10), whole)


def test_what_was_read_follows_the_sequences(mixtral, prompt, store):
    """Through selection, forks, crops and resets; what came as embeddings is not known."""
    ids, mask = prompt
    with attach(mixtral, runtime_of(store)) as host, torch.no_grad():
        cache = host.new_cache()
        assert cache.token_ids is None
        mixtral(input_ids=ids, attention_mask=mask, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        fork = cache.fork()
        cache.crop(30)
        assert torch.equal(cache.token_ids, ids[[2, 0], :30])
        assert torch.equal(fork.token_ids, ids[[2, 0]])
        cache.reset()
        assert cache.token_ids is None
        mixtral(inputs_embeds=mixtral.get_input_embeddings()(ids), past_key_values=cache)
        mixtral(input_ids=ids, past_key_values=cache)
        assert cache.token_ids is None
        cache.commit()
        assert host.restore().token_ids is None


def test_adopted_tokens_are_known_too(mixtral, pad, store):
    """Though the model never saw them."""
    ids, _ = pad(60, [0])
    with attach(mixtral, runtime_of(store)) as host, torch.no_grad():
        pool = pikv.PagePool(host.model, host.runtime)
        first, second = (host.new_cache(prefix_from=pool) for _ in range(2))
        for cache in (first, second):
            mixtral(input_ids=ids, past_key_values=cache)
        assert torch.equal(second.token_ids, ids)


def test_a_version_of_another_origin_is_refused(mixtral, store):
    """PiKVCache.commit keeps no padding; without a streamer there is nothing to restore."""
    with attach(mixtral, runtime_of(store)) as host:
        host.new_cache().pikv.commit()
        with pytest.raises(pikv.VersionError, match="restore it by PiKVCache"):
            host.restore()
    with attach(mixtral) as host, pytest.raises(pikv.ConfigError, match="need a streamer"):
        host.restore()


# --- recovery


def recovered(pad, model, folder, *damaged, settings=None, **parts):
    """A version of three rows with damaged pages, recovered; what the model goes on to say, and what it should."""
    ids, mask = pad(80, [0, 7, 20])
    with attach(model, runtime_of(folder, **parts)) as host:
        cache = host.new_cache()
        said = generate(model, cache, ids, mask, max_new_tokens=20)
        cache.commit()
        whole = torch.cat([mask, mask.new_ones(3, 20)], 1)
        expected = generate(model, cache.fork(), said, whole)
        for place in damaged:
            flip(folder, cache.pikv, *place)
    with attach(model, runtime_of(folder, **parts)) as host:
        if damaged:
            with pytest.raises(pikv.DamagedError):
                host.restore()
        made = host.recover(**settings or {})
        assert torch.equal(made.cache.token_ids, said[:, :-1])
        return made, generate(model, made.cache, said, whole), expected


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "granitemoe"])
def test_damaged_pages_are_read_again(family, models, pad, tmp_path):
    """The model reads what they held, and no more than a token beside; it goes on as from the undamaged version."""
    places = [(0, 0, 0, 0), (1, 1, 1, 2), (2, 1, 0, 3), (0, 2, 0, 1)]
    made, said, expected = recovered(pad, models(family), tmp_path, *places)
    assert torch.equal(said, expected)
    assert made.why_whole is None
    assert made.read_tokens == 17 + 33 + 17
    assert {(each.layer_id, each.sequence) for each in made.lost} == {(0, 0), (1, 1), (2, 1), (0, 2)}


def test_the_first_page_of_a_padded_sequence(mixtral, pad, tmp_path):
    """It is read with its padding, in chunks."""
    made, said, expected = recovered(pad, mixtral, tmp_path, (0, 2, 0, 0), settings={"chunk_tokens": 8})
    assert torch.equal(said, expected)
    assert made.read_tokens == 20 + 17


def test_where_tokens_leave_everything_is_read_again(models, pad, tmp_path):
    """A model with windows: the answer is the same, from a new cache."""
    made, said, expected = recovered(pad, models("gemma3, mixed"), tmp_path, (1, 0, 0, 0))
    assert torch.equal(said, expected)
    assert "tokens leave" in made.why_whole
    assert made.read_tokens == 3 * 99


def test_a_version_without_damage_is_restored(mixtral, pad, tmp_path):
    """Nothing is read."""
    made, said, expected = recovered(pad, mixtral, tmp_path)
    assert torch.equal(said, expected)
    assert (made.lost, made.read_tokens) == ((), 0)


def test_embeddings_cannot_be_read_again(mixtral, pad, tmp_path):
    """StateError, which says what is left to do."""
    ids, _ = pad(60, [0])
    with attach(mixtral, runtime_of(tmp_path)) as host, torch.no_grad():
        cache = host.new_cache()
        mixtral(inputs_embeds=mixtral.get_input_embeddings()(ids), past_key_values=cache)
        cache.commit()
        flip(tmp_path, cache.pikv, 0, 0, 0, 1)
        with pytest.raises(pikv.StateError, match="came as inputs_embeds"):
            host.recover()


def test_a_call_that_was_interrupted_is_not_committed(mixtral, pad, store):
    """What it had stored is taken back first, as at the next call."""
    ids, _ = pad(40, [0])
    with attach(mixtral, runtime_of(store)) as host, torch.no_grad():
        cache = host.new_cache()
        mixtral(input_ids=ids, past_key_values=cache)
        step = cache.begin(1, 5, {"input_ids": ids[:, :5]})
        cache.take(0, *torch.randn(2, 1, 2, 5, 16))
        assert step.positions.shape == (1, 5)
        cache.commit()
        restored = host.restore()
        assert torch.equal(restored.token_ids, ids)
        assert {layer.last.item() for layer in restored.pikv._layers.values()} == {39}
