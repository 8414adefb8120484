from __future__ import annotations

import platform

import pytest

from pikv import ConfigError
from pikv.adapters.numa import Node, NumaTier, nodes
from pikv.adapters.numa import tier as numa_tier
from pikv.adapters.numa.nodes import SYSTEM
from pikv.core.host_tier import HostTier
from pikv.testing.memory_tier import AddressableTierConformance


@pytest.fixture
def system(tmp_path):
    """Two sockets, CXL memory as node 2, and a node without memory; with what else Linux has there."""
    for number, cpus, kibibytes in ((0, "0-3,8", 4096), (2, "", 2048), (10, "9", 0), (1, "4-7", 1024)):
        folder = tmp_path / f"node{number}"
        folder.mkdir()
        (folder / "cpulist").write_text(f"{cpus}\n")
        lines = [f"Node {number} MemTotal:  {kibibytes} kB", f"Node {number} MemFree:  7 kB"]
        (folder / "meminfo").write_text("\n".join(lines))
    (tmp_path / "power").mkdir()
    return tmp_path


def test_nodes_are_found(system, tmp_path):
    """Those that have memory, by number."""
    assert nodes(system) == [
        Node(number=0, cpus="0-3,8", memory_bytes=4096 * 1024),
        Node(number=1, cpus="4-7", memory_bytes=1024 * 1024),
        Node(number=2, cpus="", memory_bytes=2048 * 1024),
    ]
    assert nodes(tmp_path / "elsewhere") == []


def test_the_node_without_cpus_is_chosen_and_all_of_its_slabs_are_bound_to_it(system, monkeypatch):
    """Or the one that was asked for."""
    bound = []
    monkeypatch.setattr(numa_tier, "bind", lambda address, nbytes, node: bound.append((nbytes, node)))
    with NumaTier(capacity_bytes=4096, system=system) as tier:
        assert tier.node.number == 2
        tier.slab(64)
        tier.slab(128)
    assert bound == [(1, 2), (4096, 2), (4096, 2)]
    assert NumaTier(capacity_bytes=4096, node=1, system=system).node.cpus == "4-7"


def test_more_than_a_node_has_is_refused(system, monkeypatch):
    """When the tier is made."""
    monkeypatch.setattr(numa_tier, "bind", lambda *_: None)
    with pytest.raises(ConfigError, match="node 2 has 2097152 bytes of memory, got capacity_bytes=2097153"):
        NumaTier(capacity_bytes=2097153, system=system)


def test_a_machine_without_such_a_node_is_told_so(system):
    """What was looked for, what there is, and what to compose instead."""
    for name in ("node2/meminfo", "node2/cpulist"):
        (system / name).unlink()
    (system / "node2").rmdir()
    with pytest.raises(ConfigError, match=r"without CPUs, this machine has: 0 with CPUs 0-3,8; 1 with CPUs 4-7\. Comp"):
        NumaTier(capacity_bytes=4096, system=system)
    with pytest.raises(ConfigError, match="with number 7, this machine has"):
        NumaTier(capacity_bytes=4096, node=7, system=system)
    with pytest.raises(ConfigError, match="none that is shown"):
        NumaTier(capacity_bytes=4096, system=system / "nowhere")


def test_a_system_that_does_not_bind_is_told_so(monkeypatch):
    """Whatever it answers: here for memory that is not there, and for a machine whose calls are not known."""
    if platform.machine() in ("x86_64", "aarch64"):
        with pytest.raises(ConfigError, match="does not bind memory to node 0"):
            numa_tier.bind(1, 4096, 0)  # no address of a memory page
    monkeypatch.setattr(platform, "machine", lambda: "abacus")
    with pytest.raises(ConfigError, match="memory is bound on Linux on x86-64 or arm64"):
        numa_tier.bind(0, 4096, 0)


class TestNumaTier(AddressableTierConformance):
    """On the machine's own first node, if it lets memory be bound."""

    def make(self, capacity_bytes):
        try:
            return NumaTier(capacity_bytes=capacity_bytes, node=nodes(SYSTEM)[0].number if nodes() else None)
        except ConfigError as error:
            pytest.skip(f"no NUMA node to bind memory to: {error}")


def test_memory_is_not_ordinary_by_name_alone():
    """NumaTier is no HostTier: it says where its memory is."""
    assert not issubclass(NumaTier, HostTier)
