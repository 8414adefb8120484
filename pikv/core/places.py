"""Several ranks as one cache: which tokens are stored here, and how the ranks' answers become one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pikv.core import attention
from pikv.core.attention import Partial

if TYPE_CHECKING:
    from pikv.core.runtime import RuntimeConfig


def stored_here(runtime: RuntimeConfig, positions: Tensor) -> Tensor:
    """Positions int64 [sequences, tokens] with -1 for the tokens that another place stores."""
    transport, sharding = runtime.transport, runtime.sharding
    if transport is None or sharding is None:
        return positions
    return positions.masked_fill(sharding.owner(positions, transport.size) != transport.rank, -1)


def merged(runtime: RuntimeConfig, partial: Partial) -> Partial:
    """Attention over what all places store; every place gets the same bits."""
    transport = runtime.transport
    if transport is None or transport.size == 1:
        return partial
    packed = torch.cat([partial.output, partial.log_sum_exp[..., None]], dim=-1)
    gathered = transport.all_gather(packed)
    return attention.merge([Partial(part[..., :-1], part[..., -1]) for part in gathered])
