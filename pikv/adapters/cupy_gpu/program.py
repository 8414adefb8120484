"""CUDA sources and what compiles and runs them: on a GPU, CuPy."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import attrs
import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cuda"
Argument = Tensor | int | float | None
"""Of a kernel, 8 bytes each: the address of a tensor's memory or of none, an int64, a float64."""


@attrs.frozen
class Program:
    """A file of kernels, and the constants that it is compiled with."""

    file: str
    constants: tuple[tuple[str, int | str], ...] = ()

    @property
    def definitions(self) -> list[str]:
        """The constants as compilers take them."""
        return [f"-D{name}={value}" for name, value in self.constants]


class Runner(abc.ABC):
    """What compiles programs and runs their kernels."""

    @abc.abstractmethod
    def serves(self, device: torch.device) -> bool:
        """Whether its kernels reach the memory of this device."""

    @abc.abstractmethod
    def run(
        self, program: Program, kernel: str, blocks: Sequence[int], threads: int, arguments: Sequence[Argument]
    ) -> None:
        """Run a kernel by blocks (x, y, z, those left out 1) of so many threads, in the order of torch's work.

        The first argument is a tensor, on the device that runs it. Does nothing if there are no blocks.
        """


@final
@attrs.frozen
class CupyRunner(Runner):
    """Compiles by NVRTC at first use, which CuPy keeps on disk, and runs on torch's current stream."""

    def serves(self, device: torch.device) -> bool:
        """A GPU of compute capability 8.0 or higher: older ones have no bfloat16."""
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

    def run(
        self, program: Program, kernel: str, blocks: Sequence[int], threads: int, arguments: Sequence[Argument]
    ) -> None:
        """See Runner. Waits for nothing."""
        if 0 in blocks:
            return
        import cupy  # heavy, and only there where there is a GPU

        device = arguments[0].device
        with cupy.cuda.Device(device.index or 0):
            stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(device))
            with stream:
                _function(program, kernel, device.index or 0)(_three(blocks), (threads, 1, 1), _scalars(arguments))


@functools.cache
def _function(program: Program, kernel: str, device: int) -> Any:
    """A compiled kernel; the device is the current one."""
    import cupy

    options = ("--std=c++17", f"-I{SOURCES}", *program.definitions)
    module = cupy.RawModule(code=(SOURCES / program.file).read_text(), options=options)
    return module.get_function(kernel)


def _scalars(arguments: Sequence[Argument]) -> tuple[Any, ...]:
    import numpy as np

    return tuple(np.float64(each) if isinstance(each, float) else np.int64(address(each)) for each in arguments)


def address(argument: Tensor | int | None) -> int:
    """The number that a kernel gets for a tensor, none or a whole number."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return argument or 0


def _three(blocks: Sequence[int]) -> tuple[int, ...]:
    return (*blocks, *(1,) * (3 - len(blocks)))
