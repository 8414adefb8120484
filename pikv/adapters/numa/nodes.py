"""Which NUMA nodes this machine has, as Linux says in /sys."""

from __future__ import annotations

import re
from pathlib import Path

import attrs

SYSTEM = Path("/sys/devices/system/node")


@attrs.frozen(kw_only=True)
class Node:
    """A NUMA node. cpus: as Linux lists them ("0-3,8"), empty for memory alone: CXL memory is such a node."""

    number: int
    cpus: str
    memory_bytes: int


def nodes(system: Path = SYSTEM) -> list[Node]:
    """The nodes that have memory, in the order of their numbers; none where the system does not say."""
    folders = [folder for folder in system.glob("node*") if re.fullmatch(r"node\d+", folder.name)]
    found = [
        Node(
            number=int(folder.name.removeprefix("node")),
            cpus=(folder / "cpulist").read_text().strip(),
            memory_bytes=_memory_bytes((folder / "meminfo").read_text()),
        )
        for folder in folders
    ]
    return sorted((node for node in found if node.memory_bytes), key=lambda node: node.number)


def _memory_bytes(meminfo: str) -> int:
    """Of a line such as "Node 1 MemTotal:  65536 kB"."""
    total = re.search(r"MemTotal:\s*(\d+) kB", meminfo)
    return 1024 * int(total.group(1)) if total else 0
