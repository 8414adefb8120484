"""A process that commits until it is killed: `python commit_until_killed.py FOLDER`. Prints each version it has made.

`states_at(n)` says what version n must hold, so that whoever killed it can compare.
"""

from __future__ import annotations

import sys

import torch

import pikv
from pikv.adapters.zarr_store import ZarrStreamer

MODEL = pikv.ModelConfig(layers=2, query_heads=2, kv_heads=2, head_dim=16)
TOKENS = 24  # a commit


def runtime_of(folder):
    return pikv.RuntimeConfig(page_size=16, tail_tokens=16, streamer=ZarrStreamer(folder, segment_bytes=4096))


def extend(cache, number):
    """The tokens of commit `number`, from 1 on; their answers."""
    generator = torch.Generator().manual_seed(number)
    answers = []
    for layer_id in range(len(MODEL.layers)):
        k, v, q = torch.randn(3, 1, 2, TOKENS, 16, generator=generator)
        cache.update(layer_id, (number - 1) * TOKENS, k, v)
        answers.append(cache.attend(layer_id, q))
    return answers


def at(number):
    """A cache as version `number` must be, made without a store."""
    cache = pikv.PiKVCache(MODEL, pikv.RuntimeConfig(page_size=16, tail_tokens=16))
    for each in range(1, number + 1):
        extend(cache, each)
    return cache


def main(folder):
    runtime = runtime_of(folder)
    newest = runtime.streamer.newest_good()
    number = 0 if newest is None else newest.number
    cache = pikv.PiKVCache(MODEL, runtime) if newest is None else pikv.PiKVCache.restore(MODEL, runtime, newest)
    print("ready", flush=True)
    while True:
        number += 1
        extend(cache, number)
        print(cache.commit(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
