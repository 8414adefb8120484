"""The ports: what a part of a cache must do, whoever writes it."""

from pikv.core.ports.allocator import Allocator, BoundedAllocator, ScoreAllocator
from pikv.core.ports.backend import (
    AttendKernel,
    Backend,
    Choice,
    ChooseKernel,
    IndexedPages,
    NewPages,
    PageCodec,
    Pages,
    SealKernel,
    StepKernel,
)
from pikv.core.ports.compressor import BasisCompressor, Compressor, FormCompressor, UnrotatedCompressor
from pikv.core.ports.demotion import Demotion, PagePredictor, PageUse
from pikv.core.ports.fetching import Fetching, Offer
from pikv.core.ports.full_pool import FullPool
from pikv.core.ports.memory_tier import AddressableTier, Done, MemoryTier, Ticket
from pikv.core.ports.placement import Placement
from pikv.core.ports.prefix_store import PrefixStore
from pikv.core.ports.router import Observation, Router, RouterState, Routing
from pikv.core.ports.selector import (
    AttendedTokenSelector,
    IndexForm,
    IndexMeaning,
    MassSelector,
    NeedsRotary,
    PageIndex,
    PageSelector,
    QueryTokenSelector,
    SecondPassSelector,
    SharingTokenSelector,
    TokenSelector,
)
from pikv.core.ports.sharding import ExpertSharding, HeadSharding, Sharding
from pikv.core.ports.streamer import Manifest, Streamer, Version
from pikv.core.ports.transport import Transport

__all__ = [
    "AddressableTier",
    "Allocator",
    "AttendKernel",
    "AttendedTokenSelector",
    "Backend",
    "BasisCompressor",
    "BoundedAllocator",
    "Choice",
    "ChooseKernel",
    "Compressor",
    "Demotion",
    "Done",
    "ExpertSharding",
    "Fetching",
    "FormCompressor",
    "FullPool",
    "HeadSharding",
    "IndexForm",
    "IndexMeaning",
    "IndexedPages",
    "Manifest",
    "MassSelector",
    "MemoryTier",
    "NeedsRotary",
    "NewPages",
    "Observation",
    "Offer",
    "PageCodec",
    "PageIndex",
    "PagePredictor",
    "PageSelector",
    "PageUse",
    "Pages",
    "Placement",
    "PrefixStore",
    "QueryTokenSelector",
    "Router",
    "RouterState",
    "Routing",
    "ScoreAllocator",
    "SealKernel",
    "SecondPassSelector",
    "Sharding",
    "SharingTokenSelector",
    "StepKernel",
    "Streamer",
    "Ticket",
    "TokenSelector",
    "Transport",
    "UnrotatedCompressor",
    "Version",
]
