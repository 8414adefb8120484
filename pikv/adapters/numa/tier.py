"""NumaTier: memory bound to one NUMA node."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import final

from pikv.adapters.numa.nodes import SYSTEM, Node, nodes
from pikv.core.errors import ConfigError
from pikv.core.host_tier import SlabTier
from pikv.core.slab import HostSlab

_MBIND = {"x86_64": 237, "aarch64": 235}  # the number of the system call
_BIND = 2  # MPOL_BIND: of this node or not at all
_NODES = 1024  # the most that Linux counts


@final
class NumaTier(SlabTier):
    """Main memory of one NUMA node: CXL memory is a node without CPUs, addressed and read in place like any other.

    node: its number; by default the first one without CPUs. Raises ConfigError where there is none, if the node has
    less memory than capacity_bytes, or if the system does not let memory be bound.
    """

    def __init__(self, *, capacity_bytes: int, node: int | None = None, system: Path = SYSTEM) -> None:
        super().__init__(capacity_bytes=capacity_bytes)
        self.node = _chosen(nodes(system), node)
        if capacity_bytes > self.node.memory_bytes:
            raise ConfigError(
                f"NumaTier: node {self.node.number} has {self.node.memory_bytes} bytes of memory, got "
                f"capacity_bytes={capacity_bytes}; lower it"
            )
        self.reserve(1, 1)  # a system that does not bind refuses now, not in the middle of a text

    def reserve(self, rows: int, page_bytes: int) -> HostSlab:
        """Memory that comes from the node as it is written."""
        slab = HostSlab(rows, page_bytes)
        bind(slab.tensor.data_ptr(), max(1, rows * page_bytes), self.node.number)
        return slab


def _chosen(found: list[Node], number: int | None) -> Node:
    if number is None:
        chosen = [node for node in found if not node.cpus]
    else:
        chosen = [node for node in found if node.number == number]
    if not chosen:
        wanted = "without CPUs" if number is None else f"with number {number}"
        there = "; ".join(f"{node.number} with CPUs {node.cpus or 'none'}" for node in found) or "none that is shown"
        raise ConfigError(
            f"NumaTier needs a NUMA node {wanted}, this machine has: {there}. Compose HostTier for ordinary memory, or "
            "ModelledTier to see what slower memory would do"
        )
    return chosen[0]


def bind(address: int, nbytes: int, node: int) -> None:
    """Let the memory pages from an address on, the start of one, come from a node and no other (mbind).

    Raises ConfigError.
    """
    call = _MBIND.get(platform.machine())
    if call is None or platform.system() != "Linux":
        raise ConfigError(f"NumaTier: memory is bound on Linux on x86-64 or arm64, not on {platform.platform()}")
    words = (ctypes.c_ulong * (_NODES // 64))()
    words[node // 64] = 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_void_p(address), ctypes.c_ulong(nbytes), ctypes.c_int(_BIND), words, ctypes.c_ulong(_NODES))
    if libc.syscall(ctypes.c_long(call), *arguments, ctypes.c_uint(0)):
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(
            f"NumaTier: the system does not bind memory to node {node} ({reason}); in a container mbind must be "
            "allowed (SYS_NICE), or compose HostTier"
        )
