"""What every rank runs, by `mpirun -n N python -m mpi4py mpi_checks.py`: the checks, and what is MPI's own."""

from __future__ import annotations

import sys
from unittest.mock import Mock

import pytest
import torch
from mpi4py import MPI

from pikv.adapters.mpi import MpiTransport
from pikv.core.errors import InputError, TransportError
from pikv.testing.transport_checks import TRANSPORT_CHECKS


def check_a_closed_transport_raises() -> None:
    """After close an operation raises TransportError."""
    transport = MpiTransport()
    transport.close()
    with pytest.raises(TransportError, match="closed"):
        transport.barrier()


def check_tensors_elsewhere_are_refused() -> None:
    """A tensor that is not on the CPU raises InputError."""
    with MpiTransport() as transport, pytest.raises(InputError, match="meta"):
        transport.all_gather(torch.zeros(1, device="meta"))


def check_errors_of_mpi_are_transport_errors() -> None:
    """What MPI raises arrives as TransportError, with the operation and the rank."""
    communicator = Mock(Get_rank=lambda: 0, Get_size=lambda: 1)
    communicator.Dup.return_value.Barrier.side_effect = MPI.Exception(MPI.ERR_OTHER)
    with pytest.raises(TransportError, match="barrier failed on rank 0 of 1"):
        MpiTransport(communicator).barrier()


for check in TRANSPORT_CHECKS:
    with MpiTransport() as transport:
        check(transport)
check_a_closed_transport_raises()
check_tensors_elsewhere_are_refused()
check_errors_of_mpi_are_transport_errors()
if MPI.COMM_WORLD.Get_rank() == 0:
    sys.stdout.write(f"{len(TRANSPORT_CHECKS)} checks passed on {MPI.COMM_WORLD.Get_size()} ranks\n")
