"""The Transport of MPI processes, by blocking collectives of mpi4py."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import final

import torch
from mpi4py import MPI
from torch import Tensor

from pikv.core.errors import InputError, TransportError
from pikv.core.ports.transport import Transport, as_bytes, check_parts, check_root
from pikv.core.watchdog import Watchdog


@final
class MpiTransport(Transport):
    """Blocking collectives on a duplicate of an MPI communicator, so that no other traffic meets PiKV's.

    Tensors are on the CPU, of any dtype: they travel as bytes. The constructor and `close` are collective too.
    A rank that dies ends the whole job, which is mpirun's doing; see `abort_when_uncaught` for one that raises.
    deadline_s: a collective that takes longer ends this process, after a message with the operation, the rank and the
    time, since MPI has no way to leave it; by default it waits for ever. The other ranks get a second to say the same.
    """

    def __init__(self, communicator: MPI.Intracomm = MPI.COMM_WORLD, *, deadline_s: float | None = None) -> None:
        self._watchdog = None if deadline_s is None else Watchdog(deadline_s=deadline_s, expired=_end)
        self._communicator = communicator.Dup()
        self._rank = communicator.Get_rank()
        self._size = communicator.Get_size()

    @property
    def rank(self) -> int:
        """The rank in the communicator."""
        return self._rank

    @property
    def size(self) -> int:
        """The size of the communicator."""
        return self._size

    def broadcast(self, tensor: Tensor, *, root: int) -> Tensor:
        """Return the root's tensor, by MPI_Bcast."""
        check_root(root, self._size)
        received = _on_cpu(tensor).clone(memory_format=torch.contiguous_format)
        with self._operation("broadcast"):
            self._communicator.Bcast([as_bytes(received), MPI.BYTE], root=root)
        return received

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's tensor, [size, *shape], by MPI_Allgather."""
        received = _on_cpu(tensor).new_empty((self._size, *tensor.shape))
        with self._operation("all_gather"):
            self._communicator.Allgather([as_bytes(tensor), MPI.BYTE], [as_bytes(received), MPI.BYTE])
        return received

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks; every rank adds all of them, since MPI has no sum of bfloat16."""
        return self.all_gather(tensor).sum(0, dtype=tensor.dtype)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Exchange the numbers of rows by MPI_Alltoall, then the rows by MPI_Alltoallv."""
        check_parts(parts, self._size)
        sent = torch.cat([_on_cpu(part) for part in parts])
        sent_rows = torch.tensor([len(part) for part in parts])
        received_rows = torch.empty_like(sent_rows)
        row_bytes = sent.element_size() * math.prod(sent.shape[1:])
        with self._operation("all_to_all"):
            self._communicator.Alltoall(sent_rows, received_rows)
            rows = received_rows.tolist()
            received = sent.new_empty((sum(rows), *sent.shape[1:]))
            self._communicator.Alltoallv(
                [as_bytes(sent), (sent_rows * row_bytes).tolist(), MPI.BYTE],
                [as_bytes(received), (received_rows * row_bytes).tolist(), MPI.BYTE],
            )
        return list(received.split(rows))

    def barrier(self) -> None:
        """Wait for every rank, by MPI_Barrier."""
        with self._operation("barrier"):
            self._communicator.Barrier()

    def close(self) -> None:
        """Free the duplicate; the communicator it was made of stays."""
        if self._communicator != MPI.COMM_NULL:
            self._communicator.Free()
        if self._watchdog is not None:
            self._watchdog.close()

    @contextlib.contextmanager
    def _operation(self, name: str) -> Iterator[None]:
        """Turn MPI's errors into TransportError."""
        if self._communicator == MPI.COMM_NULL:
            raise TransportError(f"{name} on rank {self._rank}: the transport is closed; open a new MpiTransport")
        started = time.monotonic()
        try:
            with self._watched(name):
                yield
        except MPI.Exception as error:
            raise TransportError(
                f"{name} failed on rank {self._rank} of {self._size} after {time.monotonic() - started:.1f} s: "
                f"{error.Get_error_string()}; check that all ranks call it with the same shape and dtype"
            ) from error

    def _watched(self, name: str) -> AbstractContextManager[None]:
        if self._watchdog is None:
            return contextlib.nullcontext()
        return self._watchdog.watching(f"{name} on rank {self._rank} of {self._size}")


def _end(message: str) -> None:
    """End the process from the watchdog's thread: what hangs in MPI cannot be told."""
    advice = "look for the rank that ended or hangs, and restart from the last commit"
    sys.stderr.write(f"TransportError: {message}; {advice}\n")
    sys.stderr.flush()
    time.sleep(1)  # mpirun passes the message on before it kills the other ranks
    os._exit(os.EX_TEMPFAIL)


def abort_when_uncaught() -> None:
    """Let an exception that nobody catches end all ranks, as `python -m mpi4py` does.

    Without it the other ranks wait for ever in their next collective. For programs: it replaces `sys.excepthook`.
    """

    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)

    sys.excepthook = abort


def _on_cpu(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        raise InputError(f"MpiTransport takes tensors on the CPU, got one on {tensor.device}; call .cpu() first")
    return tensor.detach()
