"""Pure decisions, one method a file: allocators, selectors, routers, shardings, full pools. No I/O."""

from pikv.core.exact import KeepAll, LeastRecentlyRead, Refuse
from pikv.policies.adakv import AdaKV
from pikv.policies.cache_aware import CacheAware
from pikv.policies.capacity import Capacity
from pikv.policies.chunkkv import ChunkKV
from pikv.policies.demotion import FurthestLayer, LeastOftenRead
from pikv.policies.duo_attention import DuoAttention
from pikv.policies.eplb import Eplb
from pikv.policies.evict_oldest import EvictOldest
from pikv.policies.expected_attention import ExpectedAttention
from pikv.policies.expert_groups import ExpertGroups
from pikv.policies.foresight import AsLastStep, AsThisLayer
from pikv.policies.group_limited import GroupLimited
from pikv.policies.h2o import HeavyHitters
from pikv.policies.importance import Importance
from pikv.policies.key_codes import KeyCodes
from pikv.policies.key_norm import KeyNorm
from pikv.policies.keydiff import KeyDiff
from pikv.policies.kv_heads import KvHeads
from pikv.policies.kvzip import KVzip
from pikv.policies.lagkv import LagKV
from pikv.policies.latency_aware import LatencyAware
from pikv.policies.load_balance import LoadBalance
from pikv.policies.planned import Planned
from pikv.policies.pyramid import Pyramid
from pikv.policies.quest import Quest
from pikv.policies.recent import Recent
from pikv.policies.snapkv import SnapKV
from pikv.policies.token_range import TokenRange
from pikv.policies.top_k import TopK
from pikv.policies.tova import Tova
from pikv.policies.uniform import Uniform

__all__ = [
    "AdaKV",
    "AsLastStep",
    "AsThisLayer",
    "CacheAware",
    "Capacity",
    "ChunkKV",
    "DuoAttention",
    "Eplb",
    "EvictOldest",
    "ExpectedAttention",
    "ExpertGroups",
    "FurthestLayer",
    "GroupLimited",
    "HeavyHitters",
    "Importance",
    "KVzip",
    "KeepAll",
    "KeyCodes",
    "KeyDiff",
    "KeyNorm",
    "KvHeads",
    "LagKV",
    "LatencyAware",
    "LeastOftenRead",
    "LeastRecentlyRead",
    "LoadBalance",
    "Planned",
    "Pyramid",
    "Quest",
    "Recent",
    "Refuse",
    "SnapKV",
    "TokenRange",
    "TopK",
    "Tova",
    "Uniform",
]
