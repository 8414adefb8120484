"""Ranks that are MPI processes. Importing this needs mpi4py and an MPI library: `pip install pikv[mpi]`."""

from pikv.adapters.mpi.peer_tier import MpiPeerTier
from pikv.adapters.mpi.transport import MpiTransport, abort_when_uncaught

__all__ = ["MpiPeerTier", "MpiTransport", "abort_when_uncaught"]
