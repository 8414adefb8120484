"""PiKV: parts that assemble into a KV cache for mixture-of-experts models with long contexts."""

from pikv.compose import compose, runtime_from
from pikv.core.attention import Partial
from pikv.core.cache import PiKVCache
from pikv.core.config import LayerConfig, ModelConfig, RuntimeConfig
from pikv.core.errors import (
    ConfigError,
    InputError,
    LayerError,
    PageLostError,
    PiKVError,
    PoolFullError,
    StateError,
    TierError,
    TierFullError,
    TransportError,
    UnknownNameError,
    WaitTimeoutError,
)
from pikv.core.page_reads import LayerReads, PageReads
from pikv.core.pool import PagePool
from pikv.core.reports import Description, StoredBytes
from pikv.core.rotary import Rotary
from pikv.core.views import ContextKV

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "ContextKV",
    "Description",
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
    "StateError",
    "StoredBytes",
    "TierError",
    "TierFullError",
    "TransportError",
    "UnknownNameError",
    "WaitTimeoutError",
    "__version__",
    "compose",
    "runtime_from",
]
