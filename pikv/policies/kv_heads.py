"""KV heads apart: each place stores its own heads of every token, as far as there are heads."""

from __future__ import annotations

import math
from typing import final

import attrs
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import HeadSharding
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class KvHeads(HeadSharding):
    """Groups of KV heads go to the places; places that share a group divide its tokens by ranges of `tokens`.

    A head's answer comes from the places that have it, where with other shardings every place answers for every head.
    Source: Megatron-LM, arXiv 1909.08053, section 3, attention heads in parallel.
    """

    tokens: int = attrs.field(default=64, validator=at_least(1))

    def head_groups(self, kv_heads: int, places: int) -> int:
        """As many as divide both; ConfigError unless that is all heads or all places."""
        groups = math.gcd(kv_heads, places)
        if groups not in (kv_heads, places):
            raise ConfigError(
                f"KvHeads needs a number of ranks that divides the {kv_heads} KV heads, or is a multiple of them, got "
                f"{places}; start another number, or shard by TokenRange(), which divides anything"
            )
        return groups

    def owner(self, positions: Tensor, places: int) -> Tensor:
        """(position // tokens) mod places, of the places that share a group of heads."""
        return (positions // self.tokens) % places
