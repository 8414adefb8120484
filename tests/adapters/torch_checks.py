"""What every process runs, started by torchrun: the checks, and what is torch.distributed's own."""

from __future__ import annotations

import sys

import pytest
import torch

from pikv.adapters.torch_distributed import TorchTransport
from pikv.core.errors import ConfigError, InputError, TransportError
from pikv.testing.transport_checks import TRANSPORT_CHECKS

with pytest.raises(ConfigError, match="processes that are joined"):
    TorchTransport()
with TorchTransport.from_environment() as outer:
    for check in TRANSPORT_CHECKS:
        with TorchTransport() as transport:
            check(transport)
    with pytest.raises(TransportError, match="closed"):
        transport.barrier()
    with pytest.raises(InputError, match="meta"):
        outer.all_gather(torch.zeros(1, device="meta"))
    with pytest.raises(ConfigError, match="deadline_s must be positive"):
        TorchTransport(deadline_s=0)
    if outer.rank == 0:
        sys.stdout.write(f"{len(TRANSPORT_CHECKS)} checks passed on {outer.size} ranks\n")
