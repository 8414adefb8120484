"""A Transport for tests: its ranks are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from pikv.core.errors import TransportError
from pikv.core.ports.transport import Transport, check_parts, check_root

Result = TypeVar("Result")


class _Meeting:
    """Where the ranks of one group meet: a place for what each brings, and a barrier before and after reading."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.brought: list[tuple[str, Any]] = [("", None)] * size
        self.barrier = threading.Barrier(size, timeout=timeout_s)


@final
class FakeTransport(Transport):
    """Ranks that are threads of one process. Ranks that disagree get an error, never a wrong tensor.

    Grad mode, inference mode and the like are set for each thread anew, as torch does.
    """

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self._rank = rank
        self._meeting = meeting
        self._closed = False

    @classmethod
    def group(cls, size: int, *, timeout_s: float = 60.0) -> list[FakeTransport]:
        """Make the transports of `size` ranks; one that waits longer than `timeout_s` raises TransportError."""
        meeting = _Meeting(size, timeout_s)
        return [cls(rank, meeting) for rank in range(size)]

    @property
    def rank(self) -> int:
        """The place in the list that `group` returned."""
        return self._rank

    @property
    def size(self) -> int:
        """The size of the group."""
        return len(self._meeting.brought)

    def broadcast(self, tensor: Tensor, *, root: int) -> Tensor:
        """Return a copy of the root's tensor."""
        check_root(root, self.size)
        return self._meet(f"broadcast from {root}", tensor, lambda tensors: _alike(tensors)[root].clone())

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return copies of every rank's tensor, [size, *shape]."""
        return self._meet("all_gather", tensor, lambda tensors: torch.stack(_alike(tensors)))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks."""
        return self._meet("all_reduce", tensor, lambda tensors: torch.stack(_alike(tensors)).sum(0, dtype=tensor.dtype))

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of what each rank sent here."""
        check_parts(parts, self.size)

        def receive(sent: list[Sequence[Tensor]]) -> list[Tensor]:
            _alike([peer[0][:0] for peer in sent])
            return [peer[self._rank].clone() for peer in sent]

        return self._meet("all_to_all", parts, receive)

    def barrier(self) -> None:
        """Wait for every thread."""
        self._meet("barrier", None, lambda _: None)

    def close(self) -> None:
        """Let this rank do no more; the others go on."""
        self._closed = True

    def abort(self) -> None:
        """Release every rank that waits, now or later, with TransportError."""
        self._meeting.barrier.abort()

    def _meet(self, operation: str, brought: Any, receive: Callable[[list[Any]], Result]) -> Result:
        """Bring something, wait for all, receive from what all brought, wait until all have received."""
        if self._closed:
            raise TransportError(f"{operation} on rank {self._rank}: the transport is closed; make a new group")
        self._meeting.brought[self._rank] = (operation, brought)
        self._wait(operation)
        try:
            operations = [name for name, _ in self._meeting.brought]
            if len(set(operations)) > 1:
                raise TransportError(f"ranks called {operations}; all must call the same operation")
            return receive([item for _, item in self._meeting.brought])
        finally:
            self._wait(operation)

    def _wait(self, operation: str) -> None:
        try:
            self._meeting.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise TransportError(f"{operation} on rank {self._rank}: another rank failed or did not come") from error


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    """Return `tensors`, or raise TransportError if the ranks brought different shapes or dtypes."""
    if len({(tensor.dtype, tensor.shape) for tensor in tensors}) > 1:
        kinds = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors]
        raise TransportError(f"ranks brought {kinds}; all must bring the same shape and dtype")
    return tensors


def run_ranks(size: int, function: Callable[[Transport], Result], *, timeout_s: float = 60.0) -> list[Result]:
    """Run `function` on `size` threads, each with its transport; return the results in the order of ranks.

    When a rank raises, the others are released and the first error is raised here.
    """
    transports = FakeTransport.group(size, timeout_s=timeout_s)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(transport: FakeTransport) -> None:
        try:
            with transport:
                results[transport.rank] = function(transport)
        except BaseException as error:
            errors.append(error)
            transport.abort()

    threads = [threading.Thread(target=run, args=(transport,), daemon=True) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
