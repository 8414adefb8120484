"""Pinned main memory beside a GPU: pages go and come on a stream of their own, while attention runs on another."""

from __future__ import annotations

import contextlib
from typing import final

import attrs
import torch
from torch import Tensor

from pikv.adapters.cupy_gpu.program import CupyRunner, Program, Runner
from pikv.core.directory import runs
from pikv.core.errors import ConfigError, InputError
from pikv.core.host_tier import SlabTier
from pikv.core.ports import Ticket
from pikv.core.slab import HostSlab

RUN_BYTES = 32 << 10  # from here on a copy of a run is faster than a kernel that gathers: below it, copies are too many
THREADS = 256
_COPY = Program("copy.cu")


@final
@attrs.frozen
class Moving(Ticket):
    """Pages on their way between a GPU and main memory. event: at their end; None if they are there."""

    event: torch.cuda.Event | None

    def done(self) -> bool:
        """Whether they have arrived."""
        return self.event is None or self.event.query()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when they have arrived. A GPU's copies do not hang, so timeout_s is not needed."""
        if self.event is not None:
            self.event.synchronize()

    def before_what_follows(self) -> None:
        """Let torch's current stream go on when they have arrived; the caller does not wait."""
        if self.event is not None:
            self.event.wait()

    def cancel(self) -> bool:
        """No: copies begin at once."""
        return False


class _PinnedSlab(HostSlab):
    """Rows in memory that the system may not move, taken whole; it stays taken until `release`."""

    def __init__(self, rows: int, stride: int) -> None:
        super().__init__(rows, stride)
        self._address = self.tensor.data_ptr()
        if torch.cuda.is_available() and self.tensor.nbytes:
            error = torch.cuda.cudart().cudaHostRegister(self._address, self.tensor.nbytes, 0)
            if int(error):
                raise ConfigError(
                    f"PinnedTier: CUDA did not pin {self.tensor.nbytes} bytes (error {int(error)}); ask less"
                )

    def give_back(self, start_byte: int, stop_byte: int) -> None:
        """Nothing: pinned memory cannot be given back in parts."""

    def release(self) -> None:
        """Let the system move the memory again."""
        if torch.cuda.is_available() and self.tensor.nbytes:
            torch.cuda.cudart().cudaHostUnregister(self._address)


@final
class PinnedTier(SlabTier):
    """Main memory that a GPU reads and writes by itself. Not yet tried on a GPU.

    As a MemoryTier its pages come from the CPU and go there. `send` and `fetch` move them from and to a slab on the
    device, on the tier's own stream: in copies of the runs of rows that lie side by side in both places, or by one
    kernel, where runs are short. A page that is on its way is waited for before its memory is used for anything else.

    device: the GPU's, or the CPU, where everything happens at once. runner: of the kernel.
    """

    def __init__(self, *, capacity_bytes: int, device: torch.device, runner: Runner | None = None) -> None:
        super().__init__(capacity_bytes=capacity_bytes)
        self.device = device
        self._runner = CupyRunner() if runner is None else runner
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last = Moving(None)
        self._pinned: list[_PinnedSlab] = []

    def reserve(self, rows: int, page_bytes: int) -> HostSlab:
        """Pinned memory."""
        self._pinned.append(_PinnedSlab(rows, page_bytes))
        return self._pinned[-1]

    def send(self, keys: Tensor, slab: Tensor, rows: Tensor) -> Moving:
        """Store rows int64 [n] (on the CPU) of a slab uint8 [any, page_bytes] on the device under keys int64 [n].

        The rows must stay as they are until the ticket is done. Raises what `write` raises.
        """
        self._check(keys, slab, rows)
        near = self.slab(slab.shape[1])
        return self._move(near, slab, self._directory.add(keys, slab.shape[1]), rows)

    def fetch(self, keys: Tensor, slab: Tensor, rows: Tensor) -> Moving:
        """Copy the pages of keys int64 [n] into rows int64 [n] (on the CPU) of a slab on the device.

        Work that follows on another stream needs `before_what_follows`. Raises what `read` raises.
        """
        self._check(keys, slab, rows)
        return self._move(slab, self.slab(slab.shape[1]), rows, self.rows(keys, slab.shape[1]))

    def write(self, keys: Tensor, pages: Tensor) -> Ticket:
        """See MemoryTier."""
        self._last.wait()
        return super().write(keys, pages)

    def read(self, keys: Tensor, out: Tensor) -> Ticket:
        """See MemoryTier."""
        self._last.wait()
        return super().read(keys, out)

    def close(self) -> None:
        """Wait for what is on its way, and let go of the memory."""
        self._last.wait()
        super().close()
        while self._pinned:
            self._pinned.pop().release()

    def _check(self, keys: Tensor, slab: Tensor, rows: Tensor) -> None:
        self._open()
        if slab.dtype != torch.uint8 or slab.dim() != 2 or slab.shape[1] % 16 or not slab.is_contiguous():
            raise InputError(f"slab must be uint8 [rows, bytes], bytes a multiple of 16, got {slab.dtype} {slab.shape}")
        if keys.shape != rows.shape or keys.dtype != torch.int64 or rows.dtype != torch.int64:
            raise InputError(f"keys and rows must be int64 [pages], got {keys.dtype} {keys.shape}, {rows.shape}")
        if len(keys) and (int(keys.min()) < 0 or len(keys.unique()) != len(keys)):
            raise InputError(f"keys must be distinct and not negative, got {keys.tolist()}")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(slab):
            raise InputError(f"rows must lie in a slab of {len(slab)}, got {rows.tolist()}")

    def _move(self, target: Tensor, source: Tensor, to: Tensor, from_: Tensor) -> Moving:
        if not len(to):
            return Moving(None)
        with self._on_own_stream():
            order = to.argsort()
            to, from_ = to[order], from_[order]
            pieces = [
                (here + first, there, count)
                for at, here, length in runs(to)
                for first, there, count in runs(from_[at : at + length])
            ]
            if len(to) * target.shape[1] >= RUN_BYTES * len(pieces):
                for here, there, count in pieces:
                    target[here : here + count].copy_(source[there : there + count], non_blocking=True)
            else:
                rows = torch.stack([to, from_]).to(self.device)
                arguments = (rows[0], rows[1], target, source, target.shape[1])
                self._runner.run(_COPY, "copy_pages", (len(to),), THREADS, arguments)
            self._last = Moving(None if self._stream is None else self._stream.record_event())
        return self._last

    def _on_own_stream(self) -> contextlib.AbstractContextManager[object]:
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # pages may just have been written
        return torch.cuda.stream(self._stream)
