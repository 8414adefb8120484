"""A backend that an installation lacks, so that `describe()` can say so."""

from __future__ import annotations

from typing import final

import attrs
import torch

from pikv.core.ports.backend import AttendKernel, Backend, ChooseKernel, PageCodec, SealKernel
from pikv.core.ports.selector import PageSelector


@final
@attrs.frozen(kw_only=True)
class MissingBackend(Backend):
    """Has no kernel for anything. missing: what it would be called; remedy: how to get it."""

    missing: str
    remedy: str

    @property
    def name(self) -> str:
        """What is missing, and how to get it."""
        return f"{self.missing} is missing: {self.remedy}"

    def attend(self, codec: PageCodec, device: torch.device) -> AttendKernel | None:
        """None."""
        return None

    def choose(self, selector: PageSelector, codec: PageCodec, device: torch.device) -> ChooseKernel | None:
        """None."""
        return None

    def seal(self, codec: PageCodec, selector: PageSelector | None, device: torch.device) -> SealKernel | None:
        """None."""
        return None
