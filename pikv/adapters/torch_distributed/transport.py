"""The Transport of processes that torch.distributed joins: gloo on a CPU, NCCL on GPUs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Self, final

import torch
import torch.distributed as dist
from torch import Tensor

from pikv.core.errors import ConfigError, InputError, TransportError
from pikv.core.ports.transport import Transport, as_bytes, check_parts, check_root


@final
class TorchTransport(Transport):
    """Collectives of a process group of its own, so that no other traffic meets PiKV's. Tensors travel as bytes.

    The processes must have been joined (`torch.distributed.init_process_group`), or use `from_environment`. device:
    where tensors are, which the backend must serve; tried with gloo on the CPU, and not with NCCL. deadline_s: an
    operation that takes longer raises TransportError, at whatever rank waits; the group is then of no more use. Gloo
    ends the process itself, with a message of its own, where another rank sends another length. Constructor and `close`
    are collective.
    """

    def __init__(self, *, device: torch.device | str = "cpu", deadline_s: float = 600.0) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                "TorchTransport needs processes that are joined; call torch.distributed.init_process_group, or use "
                "TorchTransport.from_environment() under torchrun"
            )
        if deadline_s <= 0:
            raise ConfigError(f"deadline_s must be positive, got {deadline_s}")
        self.device, self.deadline_s = torch.device(device), deadline_s
        self._rank, self._size, self._joined = dist.get_rank(), dist.get_world_size(), False
        self._group: dist.ProcessGroup | None = dist.new_group(timeout=timedelta(seconds=deadline_s))

    @classmethod
    def from_environment(cls, *, deadline_s: float = 600.0) -> Self:
        """Join the processes that torchrun started, by gloo; `close` parts them again. TransportError if none come."""
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=deadline_s))
        except (RuntimeError, ValueError) as error:
            raise TransportError(f"the processes could not be joined: {error}; start them by torchrun") from error
        made = cls(deadline_s=deadline_s)
        made._joined = True
        return made

    @property
    def rank(self) -> int:
        """The rank of the process."""
        return self._rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self._size

    def broadcast(self, tensor: Tensor, *, root: int) -> Tensor:
        """Return the root's tensor."""
        check_root(root, self._size)
        received = self._here(tensor).clone(memory_format=torch.contiguous_format)
        with self._operation("broadcast") as group:
            if received.numel():
                dist.broadcast(as_bytes(received), src=root, group=group)
        return received

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's tensor, [size, *shape]."""
        received = self._here(tensor).new_empty((self._size, *tensor.shape))
        with self._operation("all_gather") as group:
            if received.numel():
                dist.all_gather(list(as_bytes(received).view(self._size, -1)), as_bytes(tensor), group=group)
        return received

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks; every rank adds all of them in the same order, for the same bits."""
        return self.all_gather(tensor).sum(0, dtype=tensor.dtype)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Exchange the numbers of rows, then the rows."""
        check_parts(parts, self._size)
        sent = torch.cat([self._here(part) for part in parts])
        sent_rows = torch.tensor([len(part) for part in parts], device=self.device)
        received_rows = torch.empty_like(sent_rows)
        row_bytes = sent.element_size() * sent.shape[1:].numel()
        with self._operation("all_to_all") as group:
            dist.all_to_all_single(received_rows, sent_rows, group=group)
            rows = received_rows.tolist()
            received = sent.new_empty((sum(rows), *sent.shape[1:]))
            if row_bytes:
                splits = [[count * row_bytes for count in counts] for counts in (rows, sent_rows.tolist())]
                dist.all_to_all_single(as_bytes(received), as_bytes(sent), *splits, group=group)
        return list(received.split(rows))

    def barrier(self) -> None:
        """Wait for every rank."""
        with self._operation("barrier") as group:
            dist.barrier(group=group)

    def close(self) -> None:
        """Give the group back, and part the processes if `from_environment` joined them."""
        if self._group is not None:
            group, self._group = self._group, None
            dist.destroy_process_group(None if self._joined else group)

    @contextlib.contextmanager
    def _operation(self, name: str) -> Iterator[dist.ProcessGroup]:
        """Turn what torch raises into TransportError."""
        if self._group is None:
            raise TransportError(f"{name} on rank {self._rank}: the transport is closed; open a new TorchTransport")
        started = time.monotonic()
        try:
            yield self._group
        except RuntimeError as error:
            raise TransportError(
                f"{name} failed on rank {self._rank} of {self._size} after {time.monotonic() - started:.1f} s "
                f"(deadline_s={self.deadline_s:g}): {error}; look for the rank that ended or hangs, check that all "
                "call it with the same shape and dtype, and restart from the last commit"
            ) from error

    def _here(self, tensor: Tensor) -> Tensor:
        if tensor.device != self.device:
            raise InputError(f"this TorchTransport takes tensors on {self.device}, got one on {tensor.device}; move it")
        return tensor.detach()
