"""Forks, reorders, crops, joins and drops, and the corners where pages, windows and padding meet."""

from __future__ import annotations

import attrs
import pytest
import torch

import pikv
from pikv.core.tail import Tail
from pikv.policies import Pyramid, Recent
from pikv.testing.plain import PlainCache, check_holds

MODEL = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8)
RUNTIME = pikv.RuntimeConfig(page_size=16, tail_tokens=16)
GENERATOR = torch.Generator().manual_seed(0)


@attrs.define
class Pair:
    """A cache and its plain counterpart."""

    cache: pikv.PiKVCache
    plain: PlainCache

    @classmethod
    def of(cls, model=MODEL, *, like=None):
        pool = None if like is None else like.cache.pool
        return cls(pikv.PiKVCache(model, RUNTIME, pool=pool), PlainCache(model))

    def grow(self, positions):
        """Give both new tokens at positions [batch, tokens], and compare what attend answers and what is held."""
        positions, layer = torch.as_tensor(positions), self.plain.model.layers[0]
        k, v, q = (
            torch.randn(len(positions), heads, positions.shape[1], layer.key_dim, generator=GENERATOR)
            for heads in (layer.kv_heads, layer.kv_heads, layer.query_heads)
        )
        self.cache.update(0, positions, k, v)
        self.plain.update(0, positions, k, v)
        expected = self.plain.attend(0, q, positions)
        torch.testing.assert_close(self.cache.attend(0, q).double(), expected, atol=1e-5, rtol=0)
        self.check()
        return self

    def decode(self, start, stop):
        """The same, a token at a time."""
        for position in range(start, stop):
            self.grow([[position]] * self.plain.sequences)
        return self

    def both(self, name, *arguments):
        for each in (self.cache, self.plain):
            getattr(each, name)(*arguments)
        self.check()
        return self

    def fork(self):
        return Pair(self.cache.fork(), self.plain.fork())

    def check(self):
        self.cache.pool.check_integrity()
        check_holds(self.cache, self.plain)


def rows(*lengths):
    """Positions 0 .. length - 1 in each row, padded on the right."""
    index = torch.arange(max(lengths)).expand(len(lengths), -1)
    return torch.where(index < torch.tensor(lengths)[:, None], index, -1)


def test_a_fork_shares_pages_and_goes_its_own_way():
    """No page is copied; both go on, seal pages of their own, and let go of what they held."""
    one = Pair.of().grow(rows(60, 41))
    used = one.cache.pool.used_bytes
    other = one.fork()
    assert one.cache.pool.used_bytes == used
    one.decode(60, 80)
    other.decode(60, 95)
    one.check()
    one.cache.reset()
    other.check()
    other.cache.reset()
    assert one.cache.pool.used_bytes == 0


def test_a_sequence_may_be_taken_several_times():
    """As in beam search: its copies share pages, then seal their own; dropping one leaves the others."""
    pair = Pair.of().grow(rows(60, 33, 50))
    used = pair.cache.pool.used_bytes
    pair.both("reorder", [2, 0, 0, 2])
    assert pair.cache.pool.used_bytes < used
    pair.decode(60, 85)
    pair.both("drop", [1, 3])
    pair.decode(85, 90)
    pair.cache.reset()
    assert pair.cache.pool.used_bytes == 0


def test_caches_of_different_lengths_join():
    """The batch is both, the other cache stays as it is, and both go on."""
    one, other = Pair.of().grow(rows(70, 3)), Pair.of()
    other = Pair.of(like=one).grow(rows(20))
    one.cache.join(other.cache)
    one.plain.join(other.plain)
    one.check()
    assert one.cache.sequences == 3
    one.decode(70, 90)
    other.check()
    other.decode(20, 40)
    one.check()


def test_an_empty_cache_joins_and_is_joined():
    """Joining nothing changes nothing; joining to nothing copies."""
    one = Pair.of().grow(rows(40, 5))
    empty = Pair.of(like=one)
    one.cache.join(empty.cache)
    one.check()
    empty.cache.join(one.cache)
    empty.plain.join(one.plain)
    empty.check()
    empty.decode(40, 60)
    one.check()


@pytest.mark.parametrize("everything", [[0, 1], [1, 0, 1], torch.tensor([0, 1])])
def test_dropping_all_sequences_empties_the_cache(everything):
    """All pages go back, and the next update may bring another batch."""
    pair = Pair.of().grow(rows(60, 40))
    pair.both("drop", everything)
    assert pair.cache.sequences == 0
    assert pair.cache.stored_bytes().total == 0
    assert pair.cache.pool.used_bytes == 0
    pair.grow(rows(5, 4, 3))


def test_dropping_none_changes_nothing():
    """An empty list is a list of no sequences."""
    pair = Pair.of().grow(rows(60, 40))
    pair.both("drop", [])
    pair.both("reorder", [0, 1])
    assert pair.cache.sequences == 2
    pair.both("reorder", [])
    assert pair.cache.sequences == 0


def test_an_empty_cache_has_nothing_to_do():
    """Every operation on sequences is allowed, and changes nothing."""
    pair = Pair.of()
    pair.both("drop", []).both("reorder", []).both("reset")
    pair.cache.crop(5)
    pair.cache.finish_prefill()
    assert pair.fork().cache.sequences == 0
    assert pair.cache.stored_bytes().total == 0


@pytest.mark.parametrize("end", [0, 1, 7, 16, 20, 39, 40, 59, 60, 100])
def test_a_cropped_cache_goes_on(end):
    """Cropped in a page, between pages, in the tail, to nothing, or to more than there is; then it seals again."""
    pair = Pair.of().grow(rows(60, 40))
    pair.both("crop", [end, end])
    pair.decode(max(end, 60) if end > 40 else end, max(end, 60) + 30)
    pair.both("crop", [end, 3])
    pair.cache.reset()
    assert pair.cache.pool.used_bytes == 0


def test_one_number_crops_all_sequences():
    """As a list of it would."""
    pair = Pair.of().grow(rows(60, 40))
    pair.cache.crop(30)
    pair.plain.crop([30, 30])
    pair.check()


def test_a_crop_does_not_touch_a_forks_pages():
    """Slots are cleared in one sequence's table; the page is as it was."""
    pair = Pair.of().grow(rows(60))
    fork = pair.fork()
    pair.both("crop", [10])
    fork.check()
    pair.decode(10, 60)
    fork.check()


def test_a_sequence_may_be_all_padding():
    """It holds nothing and is answered with 0, while its neighbour seals; then it begins."""
    pair = Pair.of().grow(rows(50, 0))
    pair.grow([[50], [-1]])
    pair.grow([[51], [0]])
    pair.grow(torch.stack([torch.full((40,), -1), torch.arange(1, 41)]))
    pair.decode(52, 80)


def test_a_batch_of_padding_alone():
    """Nothing is stored, in one chunk or several."""
    pair = Pair.of().grow([[-1, -1], [-1, -1]]).grow([[-1], [-1]])
    assert pair.cache.retrieve(0).keys.shape == (2, 2, 0, 8)
    pair.grow(rows(40, 30))


@pytest.mark.parametrize("tokens", [0, 5, 40])
def test_an_empty_chunk_changes_nothing(tokens):
    """An update of no tokens is answered by no outputs: before any token, with a tail, and with sealed pages."""
    none = torch.empty(2, 0, dtype=torch.int64)
    Pair.of().grow(rows(tokens, tokens) if tokens else none).grow(none).grow(none).decode(tokens, tokens + 20)


@pytest.mark.parametrize("window", [1, 5, 16, 20, 33, 64])
def test_a_window_hides_what_is_sealed_behind_it(window):
    """Token by token and in chunks, with windows shorter and longer than pages and tail, and after a jump."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=4, window=window)
    Pair.of(model).grow(rows(1)).decode(1, 70)
    Pair.of(model).grow(rows(50, 20)).decode(50, 90)
    Pair.of(model).grow(rows(50, 20)).grow([[50 + window // 2], [50]]).decode(100, 140)


def test_a_windows_pages_leave():
    """Memory does not grow with a sequence that is longer than its window."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=4, window=20)
    pair = Pair.of(model).grow(rows(1)).decode(1, 100)
    before = pair.cache.stored_bytes()
    pair.decode(100, 100 + 64)
    assert pair.cache.stored_bytes() == before


def test_a_window_may_be_cropped_to_nothing():
    """What would never be seen again is not missed."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=4, window=8)
    pair = Pair.of(model).grow(rows(50)).both("crop", [0])
    pair.grow(rows(50))


def test_rows_of_unequal_length_need_no_page_that_exists():
    """A shorter row's absent pages are not looked up, even where the pool's first page is free again."""
    other = Pair.of().grow(rows(40))
    pair = Pair.of(like=other).grow(rows(64, 20))
    other.cache.reset()
    pair.decode(64, 70)


def test_sinks_begin_where_the_sequence_begins():
    """Also for one that is cropped to nothing and begins again further on."""
    cache = pikv.compose(MODEL, token_selector=Recent(sinks=2), budget_tokens=32, page_size=16, tail_tokens=16)
    for start, tokens in [(0, 5), (100, 80)]:
        cache.crop(0)
        cache.update(0, start, *torch.ones(2, 1, 2, tokens, 8))
        cache.attend(0, torch.ones(1, 4, tokens, 8))
    assert cache.retrieve(0).positions[0, 0].tolist() == [100, 101, *range(150, 180)]


def test_what_is_forgotten_does_not_count_as_seen():
    """A sequence cropped to less than its budget is kept whole, in the top layers of a pyramid too."""
    model = pikv.ModelConfig(layers=4, query_heads=4, kv_heads=2, head_dim=8)
    settings = {"budget_tokens": 64, "page_size": 16, "tail_tokens": 16}
    cache = pikv.compose(model, token_selector=Recent(sinks=0), allocator=Pyramid(), **settings)
    for start, tokens in [(0, 200), (10, 50)]:
        cache.crop(10)
        for layer_id in range(4):
            cache.update(layer_id, start, *torch.ones(2, 1, 2, tokens, 8))
            cache.attend(layer_id, torch.ones(1, 4, tokens, 8))
    for layer_id in range(4):
        assert cache.retrieve(layer_id).positions.max() == 59
        assert (cache.retrieve(layer_id).positions >= 10).sum() == 2 * 50


def test_without_attend_a_layer_settles_at_its_next_update():
    """A host with an attention of its own: retrieve gives everything, and pages are sealed all the same."""
    cache = pikv.PiKVCache(MODEL, RUNTIME)
    cache.update(0, 0, *torch.ones(2, 1, 2, 40, 8))
    assert cache.stored_bytes().pages == 0
    assert cache.retrieve(0).keys.shape == (1, 2, 40, 8)
    cache.update(0, 40, *torch.ones(2, 1, 2, 2, 8))
    assert cache.stored_bytes().pages > 0
    assert cache.retrieve(0).positions[0, 0].tolist() == list(range(42))


def test_the_first_token_after_a_prompt_seals_it():
    """On a budget a prompt's survivors wait in the tail; finish_prefill seals them, once, and so does one token."""
    settings = {"token_selector": Recent(), "budget_tokens": 64, "page_size": 16, "tail_tokens": 16}
    by_itself, asked = (pikv.compose(MODEL, **settings) for _ in range(2))
    for cache in (by_itself, asked):
        cache.update(0, 0, *torch.ones(2, 1, 2, 100, 8))
        cache.attend(0, torch.ones(1, 4, 100, 8))
        assert cache.stored_bytes().pages == 0
    asked.finish_prefill()
    assert asked.stored_bytes().pages > 0
    before = asked.stored_bytes()
    asked.finish_prefill()
    assert asked.stored_bytes() == before
    for cache in (by_itself, asked):
        cache.update(0, 100, *torch.ones(2, 1, 2, 1, 8))
        cache.attend(0, torch.ones(1, 4, 1, 8))
    assert by_itself.stored_bytes() == asked.stored_bytes()


def test_where_a_layer_cannot_be_made_all_stay(monkeypatch):
    """Memory that is refused half way through a reorder leaves every layer as it was, and no page held twice."""
    model = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=8)
    cache = pikv.PiKVCache(model, RUNTIME)
    for layer_id in range(2):
        cache.update(layer_id, 0, *torch.randn(2, 2, 2, 40, 8, generator=GENERATOR))
        cache.attend(layer_id, torch.ones(2, 4, 40, 8))
    before, used = [cache.retrieve(layer_id).keys for layer_id in range(2)], cache.pool.used_bytes
    select, calls = Tail.select, []

    def refuse(tail, index):
        calls.append(tail)
        if len(calls) == 2:
            raise MemoryError
        return select(tail, index)

    monkeypatch.setattr(Tail, "select", refuse)
    with pytest.raises(MemoryError):
        cache.reorder([1, 1])
    assert all(torch.equal(cache.retrieve(layer_id).keys, before[layer_id]) for layer_id in range(2))
    assert cache.pool.used_bytes == used
    cache.reset()
    cache.pool.check_integrity()
    assert cache.pool.used_bytes == 0


def test_stored_bytes_are_those_of_the_storages():
    """Pages by the slab's rows, a page that two sequences share once; the total is the sum, in words too."""
    pair = Pair.of().grow(rows(64))
    form = RUNTIME.form(MODEL, 0)
    stored = pair.cache.stored_bytes()
    assert stored.pages == 3 * 2 * form.stride
    assert stored.tail >= 16 * 2 * (8 + 8) * 4
    assert stored.total == stored.pages + stored.tail + stored.indexes + stored.tables
    pair.both("reorder", [0, 0])
    assert pair.cache.stored_bytes().pages == stored.pages
    assert str(pikv.StoredBytes(pages=2**20, tail=2**19, indexes=0, tables=0)) == (
        "1.50 MiB (pages 1.00, tail 0.50, indexes 0.00, tables 0.00, bases 0.00)"
    )


# --- open defects; each test is strict, so that mending one shows


def test_a_cache_may_leave_inference_mode():
    """A prompt in inference mode, then decoding outside of it."""
    cache = pikv.PiKVCache(MODEL, RUNTIME)
    with torch.inference_mode():
        cache.update(0, 0, *torch.ones(2, 1, 2, 40, 8))
        cache.attend(0, torch.ones(1, 4, 40, 8))
    try:
        cache.update(0, 40, *torch.ones(2, 1, 2, 1, 8))
        cache.attend(0, torch.ones(1, 4, 1, 8))
    finally:
        with torch.inference_mode():
            cache.reset()


def test_no_graph_is_kept():
    """Keys and values that require a gradient are stored as numbers."""
    cache = pikv.PiKVCache(MODEL, RUNTIME)
    cache.update(0, 0, *torch.ones(2, 1, 2, 20, 8, requires_grad=True))
    assert not cache.retrieve(0).keys.requires_grad


def test_one_token_may_be_asked_about_twice():
    """With the same answer, also in a layer with a window."""
    model = pikv.ModelConfig(layers=1, query_heads=2, kv_heads=1, head_dim=4, window=40)
    cache = pikv.PiKVCache(model, RUNTIME)
    for start, tokens in [(0, 64), (64, 1)]:
        k, v = torch.randn(2, 1, 1, tokens, 4, generator=GENERATOR)
        q = torch.randn(1, 2, tokens, 4, generator=GENERATOR)
        cache.update(0, start, k, v)
        output = cache.attend(0, q)
    assert torch.equal(cache.attend(0, q), output)


def test_join_leaves_the_other_as_it_is():
    """To the byte."""
    one = Pair.of().grow(rows(70))
    other = Pair.of(like=one).grow(rows(5))
    before = other.cache.stored_bytes()
    one.cache.join(other.cache)
    assert other.cache.stored_bytes() == before


def test_a_cache_joins_itself_before_it_is_settled():
    """Its layers are settled once: tokens that were retrieved and wait to be sealed are sealed, and then doubled."""
    cache = pikv.PiKVCache(MODEL, pikv.RuntimeConfig(page_size=16, tail_tokens=1))
    k = torch.randn(1, 2, 40, 8)
    for layer_id in range(len(MODEL.layers)):
        cache.update(layer_id, 0, k, k)
    cache.join(cache)
    for layer_id in range(len(MODEL.layers)):
        assert torch.equal(cache.retrieve(layer_id).keys, torch.cat([k, k]))


def test_a_device_may_be_written_with_or_without_its_number():
    """The tensors of 'cpu:0' are on 'cpu', as those of 'cuda' are on 'cuda:0'."""
    model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8, device="cpu:0")
    pikv.PiKVCache(model).update(0, 0, *torch.ones(2, 1, 2, 3, 8, device=model.device))
