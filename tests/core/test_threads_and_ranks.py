"""Caches side by side: in threads, in forked processes, on ranks of which one runs out of room."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

import pikv
from pikv.core.exact import Exact
from pikv.policies import Quest, Recent, TokenRange, Uniform
from pikv.testing.transport import run_ranks

MODEL = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8)
RUNTIME = pikv.RuntimeConfig(page_size=16, tail_tokens=16)
PAGE_BYTES = Exact().form(MODEL.layers[0], page_size=16, dtype=torch.float32).stride


def tokens(count: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random k, v and q of one sequence."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, 2, count, 8, generator=generator)
    return k, v, torch.randn(1, 4, count, 8, generator=generator)


def step(cache: pikv.PiKVCache, position: int, count: int, *, seed: int) -> Tensor:
    """Give the cache new tokens; returns what they attend to."""
    k, v, q = tokens(count, seed=seed)
    cache.update(0, position, k, v)
    return cache.attend(0, q)


def test_a_rank_without_room_tries_again_alone() -> None:
    """Where one rank's pool is full, the other goes on; the retry asks it nothing, and later answers are right."""
    alone = pikv.PiKVCache(MODEL, RUNTIME)
    wanted = [step(alone, 0, 80, seed=1), *(step(alone, 80 + i, 1, seed=2 + i) for i in range(40))]

    def decode(transport) -> list[Tensor]:
        sharded = pikv.RuntimeConfig(page_size=16, tail_tokens=16, transport=transport, sharding=TokenRange(tokens=16))
        pool = pikv.PagePool(MODEL, sharded, capacity_bytes=8 * PAGE_BYTES)
        cache = pikv.PiKVCache(MODEL, sharded, pool=pool)
        hog = pool.allocate(sharded.form(MODEL, 0), 8) if transport.rank == 0 else None
        k, v, q = tokens(80, seed=1)
        cache.update(0, 0, k, v)
        if hog is not None:
            with pytest.raises(pikv.PoolFullError):
                cache.attend(0, q)
            pool.release(sharded.form(MODEL, 0), hog)
        outputs = [cache.attend(0, q)]
        return outputs + [step(cache, 80 + i, 1, seed=2 + i) for i in range(40)]

    for outputs in run_ranks(2, decode):
        for got, want in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_cache_and_its_fork_decode_in_two_threads() -> None:
    """They share pages and nothing else, so that neither disturbs the other."""
    cache = pikv.compose(MODEL, page_size=16, tail_tokens=16)
    other = pikv.compose(MODEL, page_size=16, tail_tokens=16, pool=cache.pool)
    for position in range(0, 640, 32):  # in turns, so that pages do not lie side by side
        for held in (cache, other):
            step(held, position, 32, seed=position)
    forks = [cache.fork() for _ in range(2)]
    wanted = step(cache, 640, 1, seed=7)
    outputs: list[list[Tensor]] = [[], []]

    def attend(number: int) -> None:
        k, v, q = tokens(1, seed=7)
        forks[number].update(0, 640, k, v)
        outputs[number] += [forks[number].attend(0, q) for _ in range(50)]

    threads = [threading.Thread(target=attend, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(output, wanted) for output in [*outputs[0], *outputs[1]])
    assert len(outputs[0]) == len(outputs[1]) == 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork a process")
def test_a_forked_process_has_a_tail_of_its_own() -> None:
    """What a child process writes to its copy of a cache is not seen by the parent, however large the tail."""
    # In an interpreter of its own: after a fork OpenMP waits forever if the parent has used its threads before.
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


FORK = """
import os, torch, pikv

torch.set_num_threads(1)
cache = pikv.PiKVCache(pikv.ModelConfig(layers=1, query_heads=8, kv_heads=8, head_dim=128))
k, v = torch.ones(2, 1, 8, 100, 128)
cache.update(0, 0, k, v)
child = os.fork()
if child == 0:
    cache.update(0, 100, 0 * k, 0 * v)
    cache.crop(0)
    cache.update(0, 0, 0 * k, 0 * v)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(cache.retrieve(0).keys, k)
"""


def test_a_collected_cache_lets_go_of_its_pages() -> None:
    """A cache that is part of a reference cycle is collected at any moment; its pages are free when room is needed."""
    pool = pikv.PagePool(MODEL, RUNTIME, capacity_bytes=8 * PAGE_BYTES)
    cache = pikv.PiKVCache(MODEL, RUNTIME, pool=pool)
    step(cache, 0, 80, seed=1)
    assert pool.used_bytes == 8 * PAGE_BYTES
    cycle = [cache]
    cycle.append(cycle)
    del cache, cycle
    gc.collect()
    step(pikv.PiKVCache(MODEL, RUNTIME, pool=pool), 0, 80, seed=1)
    pool.check_integrity()


def test_drafted_tokens_are_sealed_under_a_budget() -> None:
    """Updates of a few tokens after a prompt go on decoding: the tail stays short, and the budget holds."""
    cache = pikv.compose(
        MODEL, token_selector=Recent(), allocator=Uniform(), budget_tokens=96, page_size=16, tail_tokens=16
    )
    step(cache, 0, 120, seed=1)
    step(cache, 120, 1, seed=2)
    for position in range(121, 400, 4):
        step(cache, position, 4, seed=position)
        assert int(cache.retrieve(0).mask.sum(-1).max()) <= 96
    assert cache.stored_bytes().pages >= 2 * 4 * PAGE_BYTES


def test_a_crop_of_nothing_leaves_a_pending_question() -> None:
    """Cropping behind the newest token, between update and attend, changes nothing."""
    cache, plain = pikv.PiKVCache(MODEL, RUNTIME), pikv.PiKVCache(MODEL, RUNTIME)
    k, v, q = tokens(40, seed=1)
    for held in (cache, plain):
        held.update(0, 0, k, v)
    cache.crop(40)
    assert torch.equal(cache.attend(0, q), plain.attend(0, q))


def test_a_pool_without_an_index_is_refused() -> None:
    """A cache that chooses pages needs a pool that indexes them: ConfigError when composed, not when sealing."""
    pool = pikv.PagePool(MODEL, RUNTIME)
    with pytest.raises(pikv.ConfigError, match="it keeps no index as Quest needs it"):
        pikv.compose(MODEL, page_selector=Quest(), page_size=16, tail_tokens=16, pool=pool)
