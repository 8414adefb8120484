"""Which pages are read, how many, what is left out, and what a cache says about it."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.core.ports import PageSelector
from pikv.core.selection import best_pages, heaviest_pages
from pikv.policies import Quest
from pikv.testing.page_selector import MassSelectorConformance
from pikv.testing.true_mass import TrueMass

MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=16)


class TestTrueMass(MassSelectorConformance):
    """The shipped suite."""

    tolerance = 1e-4

    def make(self) -> TrueMass:
        return TrueMass(pages=3)


def test_the_newest_page_is_read_beside_infinite_scores():
    """Pages whose scores are infinite, as keys beyond float16 make them, do not take its place."""
    scores = torch.tensor([[[torch.inf, torch.inf, 0.0, 0.0]]])
    counts = torch.tensor([[3]])
    choice = best_pages(scores, counts, pages=2)
    assert choice.columns.tolist() in ([[[0, 2]]], [[[1, 2]]])
    assert best_pages(scores, counts, pages=1).columns.tolist() == [[[2]]]
    assert best_pages(scores, counts, pages=9).reads.tolist() == [[3]]


def heaviest(shares, beside=0.0, counts=None, **bounds):
    """The choice for one row of one query head whose pages get these shares of attention, and `beside` the tail."""
    shares = torch.tensor(shares)
    return heaviest_pages(
        shares.log().view(1, 1, 1, -1) + 3.0,  # whatever they sum up to
        torch.tensor(beside).log().view(1, 1, 1) + 3.0,
        torch.tensor([[len(shares) if counts is None else counts]]),
        **bounds,
    )


def read(choice):
    """The columns that one row reads."""
    return choice.columns[0, 0, : int(choice.reads)].tolist()


def test_as_few_pages_as_reach_the_mass():
    """By hand: the newest comes first, then the heaviest, until no more than 1 - mass is left."""
    shares = [0.1, 0.4, 0.05, 0.3, 0.15]
    for mass, columns, left_out in ((0.5, [1, 4], 0.45), (0.8, [1, 3, 4], 0.15), (0.94, [0, 1, 3, 4], 0.05)):
        choice = heaviest(shares, pages=5, mass=mass, min_pages=1)
        assert read(choice) == columns
        assert float(choice.left_out) == pytest.approx(left_out, abs=1e-6)
        assert bool((choice.columns < 5).all())


def test_the_tail_counts_as_read():
    """With a tail as heavy as all pages, half of the mass is there before any page is read."""
    shares = [0.1, 0.4, 0.05, 0.3, 0.15]
    assert read(heaviest(shares, beside=1.0, pages=5, mass=0.75, min_pages=1)) == [1, 4]
    assert float(heaviest(shares, beside=1.0, pages=5, mass=0.75, min_pages=1).left_out) == pytest.approx(
        0.225, abs=1e-6
    )


def test_bounds_of_a_mass():
    """At least min_pages are read and at most `pages`, whatever the mass; never more than there are."""
    shares = [0.1, 0.4, 0.05, 0.3, 0.15]
    assert read(heaviest(shares, pages=5, mass=0.1, min_pages=3)) == [1, 3, 4]
    assert read(heaviest(shares, pages=2, mass=0.99, min_pages=1)) == [1, 4]
    assert read(heaviest(shares, pages=5, mass=None, min_pages=1)) == [0, 1, 2, 3, 4]
    assert read(heaviest(shares, counts=2, pages=4, mass=0.9, min_pages=3)) == [0, 1]
    nothing = heaviest(shares, counts=0, pages=4, mass=0.9, min_pages=3)
    assert read(nothing) == []
    assert float(nothing.left_out) == 0


@pytest.mark.property
@given(st.data())
def test_the_group_reads_what_leaves_out_the_least_on_its_mean(data):
    """No other set of as many pages with the newest in it leaves out less, and what is left out is what is said."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    group, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    log_mass = torch.randn(2, 2, group, width, generator=generator) * data.draw(st.sampled_from([0.1, 3.0, 30.0]))
    beside = torch.randn(2, 2, group, generator=generator)
    counts = torch.randint(0, width + 1, (2, 2), generator=generator)
    pages, mass = data.draw(st.integers(1, 25)), data.draw(st.sampled_from([None, 0.2, 0.9, 1.0]))
    choice = heaviest_pages(log_mass, beside, counts, pages=pages, mass=mass, min_pages=1)
    for sequence in range(2):
        for head in range(2):
            count, reads = int(counts[sequence, head]), int(choice.reads[sequence, head])
            everything = torch.cat([beside[sequence, head, :, None], log_mass[sequence, head, :, :count]], dim=-1)
            shares = everything.double().softmax(-1).mean(0)[1:]
            columns = choice.columns[sequence, head, :reads]
            best = shares[:-1].sort(descending=True).values[: max(0, reads - 1)].sum() + shares[-1:].sum()
            assert float(shares[columns].sum()) == pytest.approx(float(best), abs=1e-5)
            assert float(choice.left_out[sequence, head]) == pytest.approx(float(shares.sum() - best), abs=1e-5)
            assert mass is None or float(shares.sum() - best) <= 1 - mass + 1e-5 or reads == min(pages, count)


def decode(cache, *, tokens=400, steps=10, batch=2):
    """A prompt and some decoded tokens, the same for every cache; returns what was answered to these."""
    generator, outputs = torch.Generator().manual_seed(3), []
    heads = MODEL.layers[0].query_heads
    for start, count in [(0, tokens), *((tokens + step, 1) for step in range(steps))]:
        for layer_id in range(2):
            k, v = torch.randn(2, batch, 2, count, 16, generator=generator)
            q = 3 * torch.randn(batch, heads, count, 16, generator=generator)
            cache.update(layer_id, start, k, v)
            outputs.append(cache.attend(layer_id, q))
    return torch.cat(outputs[2:], dim=2)


def compose(selector: PageSelector, **parts):
    return pikv.PiKVCache(MODEL, pikv.RuntimeConfig(page_selector=selector, page_size=16, tail_tokens=32, **parts))


def test_reads_are_counted():
    """Layer 0 is dense and reads all pages; layer 1 reads 4 of each row and the index of all."""
    cache = compose(Quest(pages=4, dense_layers=1))
    decode(cache, steps=10)
    dense, chosen = cache.page_reads().layers.values()
    rows, page_bytes = 2 * 2, 2 * 16 * 16 * 4 + 64
    assert dense.steps == chosen.steps == 10
    assert dense.pages == dense.stored_pages == chosen.stored_pages
    assert dense.index_bytes == 0
    assert (dense.left_out, chosen.left_out) == (0.0, None)
    assert chosen.pages == 10 * rows * 4
    assert chosen.page_bytes == chosen.pages * page_bytes
    assert chosen.index_bytes == chosen.stored_pages * 2 * 16 * 2
    assert chosen.read_bytes == chosen.page_bytes + chosen.index_bytes
    reads = cache.page_reads()
    assert reads.page_bytes == dense.page_bytes + chosen.page_bytes
    assert reads.index_bytes == chosen.index_bytes
    assert reads.stored_bytes == 2 * dense.page_bytes
    cache.reset()
    assert cache.page_reads().layers == {}


def test_a_mass_reads_a_number_of_its_own_in_each_row():
    """More mass is more pages, and less is left out than was allowed."""
    pages = []
    for mass in (0.5, 0.9, 0.99):
        cache = compose(TrueMass(pages=100, mass=mass))
        decode(cache)
        reads = cache.page_reads().layers[1]
        assert 0 < reads.left_out <= 1 - mass
        pages.append(reads.pages)
    assert pages[0] < pages[1] < pages[2] < reads.stored_pages


@pytest.mark.parametrize("selector", [TrueMass(pages=5), TrueMass(pages=20, mass=0.9), Quest(pages=5, dense_layers=0)])
def test_audits_measure_what_is_left_out(selector):
    """What the selector knows is what is measured, and answers are the same with audits as without."""
    cache, audited = compose(selector), compose(selector)
    answers = decode(cache)
    with audited.auditing_reads():
        assert torch.equal(decode(audited), answers)
    for before, after in zip(cache.page_reads().layers.values(), audited.page_reads().layers.values(), strict=True):
        assert before.true_left_out is None
        assert before == attrs.evolve(after, true_left_out=None)
        assert after.true_left_out > 0.01
        if after.left_out is not None:
            assert after.true_left_out == pytest.approx(after.left_out, abs=1e-4)


def test_what_is_left_out_is_of_all_attention():
    """By hand: one query head whose scores with 4 pages of 16 tokens and a tail are 0, but for a page that is not read.

    Of 4 * 16 + 16 tokens that weigh the same, the answer lacks those of the pages which are not read.
    """
    model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=16)
    runtime = pikv.RuntimeConfig(page_selector=TrueMass(pages=1), page_size=16, tail_tokens=15)
    cache = pikv.PiKVCache(model, runtime)
    states = torch.ones(1, 1, 79, 16)
    cache.update(0, 0, states, states)
    cache.attend(0, states)
    with cache.auditing_reads():
        cache.update(0, 79, states[:, :, :1], states[:, :, :1])
        cache.attend(0, torch.zeros(1, 1, 1, 16))
    reads = cache.page_reads().layers[0]
    assert reads.pages == 1
    assert reads.stored_pages == 4
    assert reads.left_out == pytest.approx(3 * 16 / 80)
    assert reads.true_left_out == pytest.approx(3 * 16 / 80)


def test_audits_of_layers_that_read_everything():
    """Nothing is left out where all pages are read; audits end with their block."""
    cache = compose(Quest(pages=4, dense_layers=2))
    with cache.auditing_reads():
        decode(cache, steps=3)
    assert [reads.true_left_out for reads in cache.page_reads().layers.values()] == [0.0, 0.0]
    cache.reset()
    decode(cache, steps=3)
    assert [reads.true_left_out for reads in cache.page_reads().layers.values()] == [None, None]


def test_a_sliding_window_is_audited_too():
    """A layer with a window reads and leaves out pages within it."""
    model = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=16, window=200)
    cache = pikv.PiKVCache(model, pikv.RuntimeConfig(page_selector=TrueMass(pages=4), page_size=16, tail_tokens=32))
    with cache.auditing_reads():
        decode(cache)
    for reads in cache.page_reads().layers.values():
        assert 0 < reads.true_left_out < 1
        assert reads.left_out == pytest.approx(reads.true_left_out, abs=0.02)  # a page's dead slots are estimated too


def test_prompts_are_not_counted():
    """They read everything, whatever the selector."""
    cache = compose(Quest(pages=4, dense_layers=0))
    decode(cache, steps=1)
    before = cache.page_reads()
    assert [reads.steps for reads in before.layers.values()] == [1, 1]
    k, v, q = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 4, 40, 16)
    for layer_id in range(2):
        cache.update(layer_id, 401, k, v)
        cache.attend(layer_id, q)
    assert cache.page_reads() == before


def test_without_a_page_selector_there_is_nothing_to_count():
    """And nothing to audit: both say why."""
    cache = pikv.PiKVCache(MODEL)
    for asked in (cache.page_reads, cache.auditing_reads):
        with pytest.raises(pikv.ConfigError, match="without one every token reads all pages"):
            asked()


def test_the_report_is_readable():
    """Shares of the page bytes, and of attention where they are known."""
    cache = compose(TrueMass(pages=4, dense_layers=1))
    with cache.auditing_reads():
        decode(cache)
    first, second = str(cache.page_reads()).splitlines()
    assert first.startswith(
        "layer 0   pages 100.0%, index 0.0% of the page bytes, left out 0.00%, truly left out 0.00%"
    )
    assert "of the page bytes, left out" in second
