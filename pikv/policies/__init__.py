"""Pure decisions, one method a file: allocators, selectors, routers, shardings, full pools. No I/O."""

from pikv.core.exact import KeepAll, Refuse
from pikv.policies.evict_oldest import EvictOldest
from pikv.policies.importance import Importance
from pikv.policies.latency_aware import LatencyAware
from pikv.policies.pyramid import Pyramid
from pikv.policies.quest import Quest
from pikv.policies.recent import Recent
from pikv.policies.token_range import TokenRange
from pikv.policies.top_k import TopK
from pikv.policies.uniform import Uniform

__all__ = [
    "EvictOldest",
    "Importance",
    "KeepAll",
    "LatencyAware",
    "Pyramid",
    "Quest",
    "Recent",
    "Refuse",
    "TokenRange",
    "TopK",
    "Uniform",
]
