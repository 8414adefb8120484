"""Tokens where their experts are: a shard for the experts of each place."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import ExpertSharding
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class ExpertGroups(ExpertSharding):
    """Expert e is at place e mod places, and so are the tokens whose best expert it is. Source: PiKV, arXiv 2508.06526.

    The experts of a place share its pages, since each shard has a page of its own that is being filled. How evenly
    places fill is the gate's doing. tokens: until they are routed, tokens go around by ranges of so many.
    """

    tokens: int = attrs.field(default=64, validator=at_least(1))

    def place_of_expert(self, experts: int, places: int) -> Tensor:
        """The expert mod places; ConfigError for more places than experts."""
        if places > experts:
            raise ConfigError(
                f"ExpertGroups needs an expert for each place, got {experts} experts and {places} ranks; start fewer, "
                "or shard by TokenRange()"
            )
        return torch.arange(experts) % places

    def owner(self, positions: Tensor, places: int) -> Tensor:
        """(position // tokens) mod places."""
        return (positions // self.tokens) % places
