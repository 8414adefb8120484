"""The processes of a run: one, or those that torchrun or the environment names."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import attrs
import torch

from downstream_tasks.shared.errors import TaskError

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
START = "torchrun --standalone --nproc_per_node=2 SCRIPT --model_type distributed ..."


@attrs.frozen
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0


@contextmanager
def joined(flags: argparse.Namespace) -> Iterator[Ranks]:
    """Join the other processes, if there are any: gloo on CPU, nccl on GPU. They part at the end.

    Raises TaskError where the environment does not fit --model_type, a port is in use, or others do not come.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if flags.model_type == "single":
        if size > 1:
            raise TaskError(f"{size} processes were started for --model_type single; add --model_type distributed")
        yield Ranks()
        return
    missing = [name for name in NAMES if name not in os.environ]
    if missing:
        raise TaskError(
            f"--model_type distributed needs {', '.join(missing)} in the environment; start it by `{START}`, or set "
            f"all of {', '.join(NAMES)} for each process"
        )
    ranks = Ranks(int(os.environ["RANK"]), size)
    if flags.batch_size % (size * flags.gradient_accumulation):
        raise TaskError(
            f"--batch_size must be a multiple of processes * gradient_accumulation = {size} * "
            f"{flags.gradient_accumulation}, got {flags.batch_size}: it counts the samples of all processes"
        )
    _join(flags, ranks)
    try:
        yield ranks
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _join(flags: argparse.Namespace, ranks: Ranks) -> None:
    """Start the process group. torchrun sets LOCAL_RANK too; accelerate goes by it."""
    on_gpu = flags.device.startswith("cuda")
    here = int(os.environ.setdefault("LOCAL_RANK", str(ranks.rank % max(1, torch.cuda.device_count()))))
    if on_gpu:
        torch.cuda.set_device(here)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=flags.timeout_s))
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise TaskError(
                f"port {address} is in use by another program; set MASTER_PORT to a free one, or let "
                "`torchrun --standalone` choose"
            ) from error
        raise TaskError(
            f"rank {ranks.rank} could not meet the other {ranks.world_size - 1} processes at {address} within "
            f"{flags.timeout_s} s: {_first_line(error)}; check that all were started with the same MASTER_ADDR, "
            "MASTER_PORT and WORLD_SIZE, each with its own RANK"
        ) from error


def lost(error: RuntimeError, ranks: Ranks) -> TaskError | None:
    """What to say of an error of a collective: another process is gone. None if it is something else."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "NCCL", "gloo")
    if ranks.world_size == 1 or not any(sign in str(error) for sign in signs):
        return None
    return TaskError(
        f"rank {ranks.rank}: another of the {ranks.world_size} processes died or hangs ({_first_line(error)}); its own "
        "output says why. Then start all of them again with --resume, which goes on from the newest checkpoint"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
