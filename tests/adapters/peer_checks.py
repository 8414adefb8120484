"""What every rank runs: `mpirun -n 2 python -m mpi4py peer_checks.py`. Each uses the memory of the next."""

from __future__ import annotations

import sys
import time

import attrs
import torch
from mpi4py import MPI

import pikv
from pikv.adapters.mpi import MpiPeerTier
from pikv.testing.memory_tier import PAGE_BYTES, check_read, pages_of

RANK = MPI.COMM_WORLD.Get_rank()
MODEL = pikv.ModelConfig(layers=4, query_heads=4, kv_heads=2, head_dim=16)


def check_pages_of_ranks_do_not_meet() -> None:
    """Every rank's pages come back as they were, though all use the same keys, and a peer may be busy."""
    with MpiPeerTier(capacity_bytes=100 * PAGE_BYTES) as tier:
        keys = torch.arange(60)
        tier.write(keys, pages_of(keys + 1000 * RANK)).wait()
        if RANK:
            time.sleep(0.5)  # it takes part in nothing
        out = torch.zeros(60, PAGE_BYTES, dtype=torch.uint8)
        tier.read(keys.flip(0), out).wait()
        assert torch.equal(out, pages_of(keys.flip(0) + 1000 * RANK))
        tier.discard(keys[::2])
        more = torch.arange(100, 160)
        tier.write(more, pages_of(more)).wait()
        check_read(tier, more)
        tier.check_integrity()


def check_a_cache_in_the_memory_of_another_rank() -> None:
    """It answers as one whose pages are all near, bit for bit."""
    near = pikv.RuntimeConfig(page_size=16, tail_tokens=16)
    stride, generator = near.form(MODEL, 0).stride, torch.Generator().manual_seed(RANK)
    with MpiPeerTier(capacity_bytes=400 * stride) as tier:
        runtime = attrs.evolve(near, tiers=[tier])
        pool = pikv.PagePool(MODEL, runtime, capacity_bytes=40 * stride)
        caches = [pikv.PiKVCache(MODEL, near), pikv.PiKVCache(MODEL, runtime, pool=pool)]
        for position in range(0, 240, 20):
            for layer_id in range(4):
                k, v = torch.randn(2, 1, 2, 20, 16, generator=generator)
                q = torch.randn(1, 4, 20, 16, generator=generator)
                for cache in caches:
                    cache.update(layer_id, position, k, v)
                assert torch.equal(*(cache.attend(layer_id, q) for cache in caches))
        (use,) = pool.residency.stack.use
        assert use.pages_read > 0
        MPI.COMM_WORLD.Barrier()


check_pages_of_ranks_do_not_meet()
check_a_cache_in_the_memory_of_another_rank()
if RANK == 0:
    sys.stdout.write(f"2 checks passed on {MPI.COMM_WORLD.Get_size()} ranks\n")
