"""How torch's tensors reach kernels: without a copy, on torch's current stream."""

from __future__ import annotations

import torch
from numba import config, cuda
from torch import Tensor

SIMULATED = bool(config.ENABLE_CUDASIM)


def serves(device: torch.device) -> bool:
    """Whether kernels reach this device's memory: a GPU's, or in the simulator the main memory."""
    return device.type == ("cpu" if SIMULATED else "cuda")


def launch(kernel, blocks: tuple[int, ...], threads: int, *arguments: Tensor | int | float) -> None:
    """Run a kernel; it does nothing if there are no blocks."""
    if 0 in blocks:
        return
    if SIMULATED:
        kernel[blocks, threads](*(_simulated(each) if isinstance(each, Tensor) else each for each in arguments))
        return
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    with torch.cuda.device(device):
        stream = cuda.external_stream(torch.cuda.current_stream(device).cuda_stream)
        kernel[blocks, threads, stream](*arguments)


def _simulated(tensor: Tensor):
    """What the simulator takes for an array of a GPU; it would copy one of numpy's, and refuse strides."""
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray  # there is no public way to name strided memory

    return FakeCUDAArray(tensor.numpy())
