"""Fetch or compute: MOONCAKE's inequality with what was measured, and what the log says of it."""

from __future__ import annotations

import logging

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore
from prompts import DOCUMENT, MODEL, RUNTIME, VOCABULARY, Process

import pikv
from pikv.core.fetching import FetchAlways, FetchIfFaster, Rates, flops_of
from pikv.core.ports import Offer

LAYER = pikv.LayerConfig(query_heads=64, kv_heads=8, key_dim=128, value_dim=128)


def offer(*, bytes_a_second=1.0, flops_a_second=1.0, refused=0, nbytes=100, flops=100.0):
    return Offer(
        nbytes=nbytes, flops=flops, bytes_a_second=bytes_a_second, flops_a_second=flops_a_second, refused=refused
    )


@pytest.mark.property
@given(
    tokens=st.integers(1, 100_000), bandwidth=st.floats(1e6, 1e12), speed=st.floats(1e9, 1e15), bits=st.integers(2, 32)
)
def test_it_is_the_papers_inequality(tokens, bandwidth, speed, bits):
    """B / G > 2 d s / (gqa (a p d + b d^2)), for dense pages of any width and any prefix from position 0 on."""
    width, gqa, size = 64 * 128, 64 // 8, bits / 8
    nbytes, flops = tokens * 2 * 8 * 128 * size, flops_of(LAYER, 0, tokens)
    left, right = bandwidth / speed, 2 * width * size / (gqa * (4 * tokens * width + 22 * width**2))
    if abs(left / right - 1) > 1e-6:
        asked = offer(nbytes=nbytes, flops=flops, bytes_a_second=bandwidth, flops_a_second=speed)
        assert FetchIfFaster().accepts(asked)[0] == (left > right)


def test_later_tokens_cost_more():
    """A prompt in two parts costs what it costs in one."""
    assert flops_of(LAYER, 0, 300) == flops_of(LAYER, 0, 100) + flops_of(LAYER, 100, 200)


def test_what_is_not_known_is_fetched_and_what_was_refused_is_tried_again():
    """Or it would never be known."""
    policy = FetchIfFaster(try_again=3)
    assert policy.accepts(offer(bytes_a_second=None)) == (
        True,
        "bandwidth and compute rate have not both been measured yet",
    )
    assert policy.accepts(offer(flops_a_second=None))[0]
    slow = {"bytes_a_second": 0.5}
    assert [policy.accepts(offer(refused=refused, **slow))[0] for refused in range(3)] == [False, False, True]
    assert "it is time to measure again" in policy.accepts(offer(refused=2, **slow))[1]
    assert policy.accepts(offer(bytes_a_second=2.0, refused=1))[0]
    assert FetchAlways().accepts(offer(**slow))[0]


def test_medians_of_the_last_few_count():
    """A first run that compiled kernels is outvoted, and then forgotten."""
    rates = Rates()
    for seconds in (100.0, 1.0, 2.0):
        rates.fetched(100, seconds)
        rates.computed(300.0, seconds)
    assert rates.offer(1, 1.0) == Offer(nbytes=1, flops=1.0, bytes_a_second=50.0, flops_a_second=150.0, refused=0)
    for _ in range(9):
        rates.fetched(100, 4.0)
    assert rates.offer(1, 1.0).bytes_a_second == 25.0


def test_a_cache_measures_and_decides(caplog):
    """By what its own reads and layers took; a slow store is left alone until it is time to measure again."""
    objects = MemoryStore()
    writer, reader = Process(objects), Process(objects)
    writer.run()
    reader.runtime = attrs.evolve(reader.runtime, fetching=FetchIfFaster(try_again=2))
    rates = reader.pool.prefixes.rates
    with caplog.at_level(logging.INFO, "pikv.core.stored_pages"):
        reader.run((DOCUMENT + 1) % VOCABULARY)  # a prompt of which nothing is stored: computed, and measured
        asked = rates.offer(1, 1.0)
        assert asked.flops_a_second > 0
        assert asked.bytes_a_second is None
        assert reader.begin()[1].tolist() == [80]
        assert rates.offer(1, 1.0).bytes_a_second > 0
        assert "80 tokens that are stored are fetched: bandwidth and compute rate have not both" in caplog.text
        outcomes = []
        for _ in range(3):
            for cache in reader.caches:
                cache.reset()
            reader.pool.prefixes.clear()
            for _ in range(9):
                rates.fetched(1, 1e6)  # a store that has become slow
            outcomes.append(int(reader.begin()[1]))
    assert outcomes == [0, 80, 0]
    assert "80 tokens that are stored are computed: B / G = 1e-06 B/s / " in caplog.text
    for process in (writer, reader):
        process.end()


def test_decoded_tokens_are_not_measured():
    """They are limited by memory, and short updates by overheads."""
    process = Process(MemoryStore())
    cache = process.run(DOCUMENT[:, :10])
    assert process.pool.prefixes.rates.offer(1, 1.0).flops_a_second is None
    cache.reset()
    process.end()


def test_it_composes_by_name():
    """The default compares."""
    assert pikv.runtime_from({"fetching": "always"}, MODEL).fetching == FetchAlways()
    assert pikv.compose(MODEL).runtime.fetching == RUNTIME.fetching == FetchIfFaster()
