"""The backend: which layers its kernels serve."""

from __future__ import annotations

from typing import final

import attrs
import torch

from pikv.adapters.numba_cuda.attend import NumbaCudaAttend
from pikv.adapters.numba_cuda.choose import NumbaCudaChoose, chooses
from pikv.adapters.numba_cuda.launch import SIMULATED, serves
from pikv.adapters.numba_cuda.pages import known
from pikv.adapters.numba_cuda.seal import NumbaCudaSeal, seals
from pikv.core.ports import AttendKernel, Backend, ChooseKernel, PageCodec, PageSelector, SealKernel


@final
@attrs.frozen
class NumbaCuda(Backend):
    """Kernels for Dense and Affine pages on an NVIDIA GPU, which say in Python what a fast one does.

    With NUMBA_ENABLE_CUDASIM=1 set before numba is imported, numba's simulator runs them on a CPU, slowly. None for
    values that are a prefix of the keys; torch serves these.
    """

    @property
    def name(self) -> str:
        """The name in `describe()`."""
        return "numba_cuda simulated" if SIMULATED else "numba_cuda"

    def attend(self, codec: PageCodec, device: torch.device) -> AttendKernel | None:
        """A kernel for pages of any sizes."""
        form = codec.form
        return NumbaCudaAttend(codec) if serves(device) and known(form.keys) and known(form.values) else None

    def choose(self, selector: PageSelector, codec: PageCodec, device: torch.device) -> ChooseKernel | None:
        """A kernel for an index of bounds."""
        return NumbaCudaChoose(codec, selector.pages) if serves(device) and chooses(selector, codec) else None

    def seal(self, codec: PageCodec, selector: PageSelector | None, device: torch.device) -> SealKernel | None:
        """A kernel for Dense and Affine pages, if their form is all that there is to know of them."""
        return NumbaCudaSeal(codec, selector) if serves(device) and seals(codec) else None
