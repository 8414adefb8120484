"""The backend: which layers its kernels serve."""

from __future__ import annotations

from typing import final

import attrs
import torch

from pikv.adapters.cupy_gpu.attend import CupyAttend, attend_program
from pikv.adapters.cupy_gpu.choose import CupyChoose, choose_program
from pikv.adapters.cupy_gpu.program import CupyRunner, Runner
from pikv.adapters.cupy_gpu.seal import CupySeal, seal_program
from pikv.core.ports import AttendKernel, Backend, ChooseKernel, PageCodec, PageSelector, SealKernel


@final
@attrs.frozen(kw_only=True)
class CupyGpu(Backend):
    """CUDA kernels for an NVIDIA GPU of compute capability 8.0 or higher. runner: what compiles and runs them."""

    runner: Runner = attrs.field(factory=CupyRunner)

    @property
    def name(self) -> str:
        """The name in `describe()`."""
        return "cupy_gpu"

    def attend(self, codec: PageCodec, device: torch.device) -> AttendKernel | None:
        """A kernel for Dense pages of 16-bit numbers and Affine ones, with dimensions of `attend.DIMS`."""
        program = attend_program(codec) if self.runner.serves(device) else None
        return None if program is None else CupyAttend(codec, program, self.runner)

    def choose(self, selector: PageSelector, codec: PageCodec, device: torch.device) -> ChooseKernel | None:
        """A kernel for an index of bounds."""
        program = choose_program(selector, codec) if self.runner.serves(device) else None
        return None if program is None else CupyChoose(program, selector.pages, self.runner)

    def seal(self, codec: PageCodec, selector: PageSelector | None, device: torch.device) -> SealKernel | None:
        """A kernel for Dense and Affine pages, if their form is all that there is to know of them."""
        program = seal_program(codec, selector) if self.runner.serves(device) else None
        return None if program is None else CupySeal(codec, selector, program, self.runner)
