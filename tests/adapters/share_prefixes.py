"""A process that shares a prompt's pages: `python share_prefixes.py ROLE FOLDER-OR-ENDPOINT [BUCKET]`.

ROLE is `compute`, or `compute-slowly`, which pauses before each layer and says when a layer's pages are written, or
`follow`, which waits for what another process computes. It prints "ready", begins when it is told anything, and prints
what its answers add up to.
"""

from __future__ import annotations

import sys
import time

import torch

import pikv
from pikv.adapters.zarr_store import StoredPrefixes

MODEL = pikv.ModelConfig(layers=4, query_heads=2, kv_heads=2, head_dim=16)
TOKENS = torch.arange(300)[None] % 7
COVERED = (300 - 16) // 16 * 16
PAUSE_S = 0.05


def place(where, bucket=None):
    """What StoredPrefixes opens: a folder, or a bucket of a server on this machine."""
    if bucket is None:
        return where
    from s3_server import store_of  # brings a server along, which a folder does not need

    return store_of(where, bucket)


def cache_on(store):
    """A cache with a pool of its own."""
    return pikv.PiKVCache(MODEL, pikv.RuntimeConfig(page_size=16, tail_tokens=16, prefix_store=store))


def feed(cache, start, after_layer=lambda layer_id: None):
    """Give the layers the tokens from `start` on; the sum of the last token's answers."""
    total = torch.zeros(())
    for layer_id in range(len(MODEL.layers)):
        generator = torch.Generator().manual_seed(layer_id)
        k, v, q = torch.randn(3, 1, 2, 300, 16, generator=generator)
        cache.update(layer_id, start, k[:, :, start:], v[:, :, start:])
        total += cache.attend(layer_id, q[:, :, start:])[:, :, -1].sum()
        after_layer(layer_id)
    return float(total)


def main(role, *where):
    with StoredPrefixes(place(*where)) as store:

        def written(layer_id):
            store.flush()
            print(f"layer {layer_id}", flush=True)
            time.sleep(PAUSE_S)  # a model that computes

        cache = cache_on(store)
        print("ready", flush=True)
        sys.stdin.readline()
        wait_s = 60.0 if role == "follow" else None
        covered = int(cache.begin(TOKENS, weights="any", wait_s=wait_s))
        answer = feed(cache, covered, written if role == "compute-slowly" else lambda layer_id: None)
        store.flush()
        cache.reset()
        cache.pool.prefixes.clear()
        cache.pool.check_integrity()
        print(f"{covered} {answer:.4f} {cache.pool.used_bytes}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
