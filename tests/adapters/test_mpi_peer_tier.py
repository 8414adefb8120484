from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pikv.core.errors import ConfigError
from pikv.core.ports import MemoryTier
from pikv.testing.memory_tier import MemoryTierConformance

MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="no mpi4py: pip install pikv[mpi]"),
    pytest.mark.skipif(MPIRUN is None, reason="no mpirun next to python or on PATH: pip install pikv[mpi]"),
]


class TestMpiPeerTier(MemoryTierConformance):
    """The shipped suite, of a rank that is its own peer."""

    def make(self, capacity_bytes: int) -> MemoryTier:
        from mpi4py import MPI

        from pikv.adapters.mpi import MpiPeerTier

        return MpiPeerTier(MPI.COMM_SELF, capacity_bytes=capacity_bytes)

    def test_a_peer_is_a_rank(self) -> None:
        """ConfigError, on all ranks."""
        from mpi4py import MPI

        from pikv.adapters.mpi import MpiPeerTier

        with pytest.raises(ConfigError, match=r"peer must be another rank for each rank, all of 0 to 0, got \[1\]"):
            MpiPeerTier(MPI.COMM_SELF, capacity_bytes=64, peer=1)


def test_ranks_use_each_others_memory():
    """With pages of their own, and for a cache."""
    program = str(Path(__file__).with_name("peer_checks.py"))
    command = [str(MPIRUN), "-n", "2", sys.executable, "-m", "mpi4py", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 checks passed on 2 ranks" in done.stdout
