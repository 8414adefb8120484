"""PiKV as the cache of a transformers model. Importing this needs transformers: `pip install pikv[transformers]`."""

from pikv.adapters.transformers.cache import HostCache
from pikv.adapters.transformers.families import model_config, supported_families
from pikv.adapters.transformers.host import Host, attach
from pikv.adapters.transformers.recovery import Recovered

__all__ = ["Host", "HostCache", "Recovered", "attach", "model_config", "supported_families"]
