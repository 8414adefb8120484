"""What a rank runs whose neighbour fails: `failing_ranks.py TRANSPORT FAILURE [FOLDER]`, in a process for each rank.

Rank 1 fails in the way that is named. Every other rank must end by an error that names the operation, the rank and the
time; it is printed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import pikv
from pikv.core.ports import Transport

DEADLINE_S = 3.0
MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=16)
TOKENS, COMMITTED, FAILED = 120, 80, 100


def opened(name: str) -> Transport:
    """The transport under test, with a deadline."""
    if name == "mpi":
        from pikv.adapters.mpi import MpiTransport

        return MpiTransport(deadline_s=DEADLINE_S)
    from pikv.adapters.torch_distributed import TorchTransport

    return TorchTransport.from_environment(deadline_s=DEADLINE_S)


def fail(transport: Transport, failure: str) -> None:
    """What rank 1 does in the place of a gather; `truncated` makes one of another length."""
    if failure == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if failure == "hangs":
        time.sleep(60)  # far beyond the deadline of those who wait
    transport.all_gather(torch.zeros(1 << 18))


def decode(transport: Transport, folder: Path, failure: str | None) -> Tensor:
    """Decode on every rank with a commit on the way; rank 1 may fail after it. Goes on from a commit that is there."""
    runtime = pikv.runtime_from(
        {"streamer": {"name": "zarr", "folder": str(folder / str(transport.rank))}, "page_size": 16, "tail_tokens": 16},
        MODEL,
        transport=transport,
    )
    with runtime.streamer as streamer:
        begun = bool(streamer.versions())
        cache = pikv.PiKVCache.restore(MODEL, runtime) if begun else pikv.PiKVCache(MODEL, runtime)
        outputs = []
        for position in range(COMMITTED if begun else 0, TOKENS):
            if position == COMMITTED and not begun:
                cache.commit()
            if position == FAILED and failure is not None and transport.rank == 1:
                fail(transport, failure)
            outputs.append(step(cache, position))
        return torch.stack(outputs)


def step(cache: pikv.PiKVCache, position: int) -> Tensor:
    """A token that its position determines, through all layers; returns what the last one answers."""
    generator = torch.Generator().manual_seed(position)
    for layer_id in range(2):
        k, v = torch.randn(2, 1, 2, 1, 16, generator=generator)
        cache.update(layer_id, position, k, v)
        answer = cache.attend(layer_id, torch.randn(1, 4, 1, 16, generator=generator))
    return answer


def main() -> None:
    """One rank."""
    name, failure, *folder = sys.argv[1:]
    transport = opened(name)
    try:
        transport.barrier()
        if folder:
            answers = decode(transport, Path(folder[0]), None if failure == "none" else failure)
            torch.save(answers, Path(folder[0]) / f"answers-{transport.rank}.pt")
        elif transport.rank == 1:
            fail(transport, failure)
        else:
            transport.all_gather(torch.zeros(10))
            transport.barrier()
    except pikv.TransportError as error:
        sys.stderr.write(f"TransportError: {error}\n")
        sys.stderr.flush()
        os._exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    main()
