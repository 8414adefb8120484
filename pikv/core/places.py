"""Several ranks as one cache: what is stored here, and how the ranks' answers become one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from pikv.core import attention
from pikv.core.attention import Partial
from pikv.core.config import LayerConfig, ModelConfig
from pikv.core.errors import ConfigError
from pikv.core.ports.allocator import ScoreAllocator
from pikv.core.ports.sharding import ExpertSharding, HeadSharding, Sharding
from pikv.core.ports.transport import Solo, Transport

if TYPE_CHECKING:
    from pikv.core.runtime import RuntimeConfig


@attrs.frozen(kw_only=True, eq=False)
class Places:
    """The ranks that store one cache, as one of them sees it.

    model: all of it. head_groups: how many groups the KV heads form; place p has group p mod head_groups.
    """

    model: ModelConfig
    transport: Transport
    sharding: Sharding | None
    head_groups: int

    @classmethod
    def of(cls, model: ModelConfig, runtime: RuntimeConfig) -> Places:
        """The places of a composition. Raises ConfigError where they do not fit the model."""
        groups = 1
        if isinstance(runtime.sharding, HeadSharding):
            groups = _head_groups(model, runtime, runtime.sharding)
        if isinstance(runtime.sharding, ExpertSharding):
            _check_experts(model, runtime, runtime.sharding)
        transport = Solo() if runtime.transport is None else runtime.transport
        return cls(model=model, transport=transport, sharding=runtime.sharding, head_groups=groups)

    @property
    def by_expert(self) -> ExpertSharding | None:
        """The sharding, if routing says where a token is stored."""
        return self.sharding if isinstance(self.sharding, ExpertSharding) else None

    def at_home(self, positions: Tensor, experts: Tensor) -> Tensor:
        """Positions int64 [sequences, tokens] with -1 for tokens whose experts [sequences * tokens] are elsewhere."""
        assert self.by_expert is not None
        assert self.model.experts is not None
        place = self.by_expert.place_of_expert(self.model.experts, self.transport.size)
        here = place[experts.cpu()].view(positions.shape) == self.transport.rank
        return positions.masked_fill(~here, -1)

    @property
    def sharing(self) -> int:
        """How many places divide the tokens of a head."""
        return self.transport.size // self.head_groups

    def own_heads(self, heads: int) -> slice:
        """Which of so many heads, of keys or of queries, are this place's."""
        count = heads // self.head_groups
        first = self.transport.rank % self.head_groups * count
        return slice(first, first + count)

    def stored_model(self) -> ModelConfig:
        """The model with this place's heads only."""
        if self.head_groups == 1:
            return self.model
        whole = self.model
        return ModelConfig.of(
            [self._stored(layer) for layer in whole.layers],
            dtype=whole.dtype,
            device=whole.device,
            experts=whole.experts,
            experts_per_token=whole.experts_per_token,
        )

    def _stored(self, layer: LayerConfig) -> LayerConfig:
        return attrs.evolve(
            layer,
            query_heads=layer.query_heads // self.head_groups,
            kv_heads=layer.kv_heads // self.head_groups,
            sinks=None if layer.sinks is None else layer.sinks[self.own_heads(layer.query_heads)],
        )

    def own(self, states: Tensor) -> Tensor:
        """Of states [sequences, heads, tokens, dim] this place's heads."""
        return states if self.head_groups == 1 else states[:, self.own_heads(states.shape[1])]

    def stored(self, positions: Tensor) -> Tensor:
        """Positions int64 [sequences, tokens] with -1 for the tokens that another place stores."""
        if self.sharding is None or self.sharing == 1:
            return positions
        owner = self.sharding.owner(positions, self.sharing)
        return positions.masked_fill(owner != self.transport.rank // self.head_groups, -1)

    def merged(self, partial: Partial) -> Partial:
        """Attention over what all places store, of all heads; every place gets the same bits.

        The Partial has the shape [sequences, kv_heads, group, tokens, ...].
        """
        if self.transport.size == 1:
            return partial
        packed = torch.cat([partial.output, partial.log_sum_exp[..., None]], dim=-1)
        gathered = self.transport.all_gather(packed).unflatten(0, (self.sharing, self.head_groups))
        whole = gathered.movedim(1, 2).flatten(2, 3)  # [sharing, sequences, kv_heads, group, tokens, value_dim + 1]
        return attention.merge([Partial(part[..., :-1], part[..., -1]) for part in whole])


def _head_groups(model: ModelConfig, runtime: RuntimeConfig, sharding: HeadSharding) -> int:
    """The number of groups, the same in all layers."""
    groups = {sharding.head_groups(layer.kv_heads, runtime.places) for layer in model.layers}
    if len(groups) > 1:
        raise ConfigError(
            f"{type(sharding).__name__} must divide the KV heads of all layers alike, got groups {sorted(groups)} on "
            f"{runtime.places} ranks; shard by TokenRange()"
        )
    if isinstance(runtime.allocator, ScoreAllocator):
        raise ConfigError(
            f"{type(runtime.allocator).__name__} splits a layer's budget among its heads by scores, and with "
            f"{type(sharding).__name__} no rank has those of all heads; shard by TokenRange(), or allocate by Uniform()"
        )
    return groups.pop()


def _check_experts(model: ModelConfig, runtime: RuntimeConfig, sharding: ExpertSharding) -> None:
    """Raise ConfigError unless tokens can be routed to these places."""
    name = type(sharding).__name__
    if model.experts is None or runtime.router is None:
        raise ConfigError(
            f"{name} needs experts in the model and a router in the runtime, got experts={model.experts} and "
            f"router={runtime.router}; say them (the nearest router is TopK()), or shard by TokenRange()"
        )
    if runtime.remembers is not None:
        raise ConfigError(
            f"{type(runtime.remembers).__name__} remembers what a token was attended where it was stored, and with "
            f"{name} it moves after that; compose another token selector, or shard by TokenRange()"
        )
    if runtime.shares_layers(model):
        raise ConfigError(
            f"{type(runtime.token_selector).__name__} has layers keep what others keep, and with {name} a rank stores "
            "other tokens of each layer; let each layer choose for itself, or shard by TokenRange()"
        )
    sharding.place_of_expert(model.experts, runtime.places)
