"""Memory of a NUMA node, as Linux shows CXL memory."""

from pikv.adapters.numa.nodes import Node, nodes
from pikv.adapters.numa.tier import NumaTier

__all__ = ["Node", "NumaTier", "nodes"]
