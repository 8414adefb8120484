from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pikv.testing.transport_checks import TRANSPORT_CHECKS

MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="no mpi4py: pip install pikv[mpi]"),
    pytest.mark.skipif(MPIRUN is None, reason="no mpirun next to python or on PATH: pip install pikv[mpi]"),
]


def mpirun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(MPIRUN), "-n", str(ranks), sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_mpi_transport_passes_the_checks(ranks):
    """MPI processes do what every transport must."""
    done = mpirun(ranks, "-m", "mpi4py", str(Path(__file__).with_name("mpi_checks.py")))
    assert done.returncode == 0, done.stderr
    assert f"{len(TRANSPORT_CHECKS)} checks passed on {ranks} ranks" in done.stdout


def test_an_exception_that_nobody_catches_ends_all_ranks():
    """The others do not wait for ever, and the traceback is seen."""
    program = """
from pikv.adapters.mpi import MpiTransport, abort_when_uncaught
abort_when_uncaught()
with MpiTransport() as transport:
    if transport.rank == 1:
        raise LookupError("lost")
    transport.barrier()
"""
    done = mpirun(2, "-c", program)
    assert done.returncode != 0
    assert "LookupError: lost" in done.stderr
