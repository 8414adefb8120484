"""PiKV: parts that assemble into a KV cache for mixture-of-experts models with long contexts."""

from pikv.compose import compose, runtime_from
from pikv.core.attention import Partial
from pikv.core.cache import PiKVCache
from pikv.core.config import LayerConfig, ModelConfig
from pikv.core.errors import (
    ConfigError,
    DamagedError,
    InputError,
    LayerError,
    PageLostError,
    PiKVError,
    PoolFullError,
    StateError,
    StoreError,
    TierError,
    TierFullError,
    TransportError,
    UnknownNameError,
    VersionError,
    WaitTimeoutError,
)
from pikv.core.expert_cache import ExpertKVCache
from pikv.core.page_reads import LayerReads, PageReads
from pikv.core.pool import PagePool
from pikv.core.ports.streamer import Version
from pikv.core.reports import Description, StoredBytes
from pikv.core.rotary import Rotary
from pikv.core.runtime import RuntimeConfig
from pikv.core.salvage import Salvage
from pikv.core.views import ContextKV

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "ContextKV",
    "DamagedError",
    "Description",
    "ExpertKVCache",
    "InputError",
    "LayerConfig",
    "LayerError",
    "LayerReads",
    "ModelConfig",
    "PageLostError",
    "PagePool",
    "PageReads",
    "Partial",
    "PiKVCache",
    "PiKVError",
    "PoolFullError",
    "Rotary",
    "RuntimeConfig",
    "Salvage",
    "StateError",
    "StoreError",
    "StoredBytes",
    "TierError",
    "TierFullError",
    "TransportError",
    "UnknownNameError",
    "Version",
    "VersionError",
    "WaitTimeoutError",
    "__version__",
    "compose",
    "runtime_from",
]
