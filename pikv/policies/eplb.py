"""Replicas for busy experts, packed onto places."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from pikv.core.errors import ConfigError
from pikv.core.ports import Placement
from pikv.policies.settings import at_least


@final
@attrs.frozen(kw_only=True)
class Eplb(Placement):
    """Balance experts by replicas. Source: DeepSeek's EPLB (github.com/deepseek-ai/EPLB), both of its policies.

    Each further replica goes to the expert with the most load a replica; replicas are packed heaviest first onto the
    place with the least load that has a slot. With several nodes it is hierarchical: groups of consecutive experts are
    packed onto nodes first, then each node replicates and packs its own, so a group's experts stay on one node.

    slots: replicas a place holds. nodes: places are spread over them evenly. groups: how many groups the experts form;
    a multiple of nodes.
    """

    slots: int = attrs.field(default=1, validator=at_least(1))
    nodes: int = attrs.field(default=1, validator=at_least(1))
    groups: int = attrs.field(default=1, validator=at_least(1))

    def __attrs_post_init__(self) -> None:
        if self.groups % self.nodes:
            raise ConfigError(f"groups must be a multiple of nodes = {self.nodes}, got {self.groups}")

    def place(self, load: Tensor, places: int) -> Tensor:
        """Node by node; on each the heaviest first."""
        experts = len(load)
        if places % self.nodes or experts % self.groups or places * self.slots < experts:
            raise ConfigError(
                f"{experts} experts must be a multiple of groups = {self.groups} and fit on places = {places}, a "
                f"multiple of nodes = {self.nodes}, with slots = {self.slots} each"
            )
        load = load.double().cpu()
        by_group = torch.arange(experts).view(self.groups, -1)
        node_of_group = _packed(load[by_group].sum(-1), self.nodes, self.groups // self.nodes)
        rows = []
        for node in range(self.nodes):
            ours = by_group[node_of_group == node].flatten()
            replicas, share = _replicated(load[ours], places // self.nodes * self.slots)
            place = _packed(share, places // self.nodes, self.slots)
            rows.append(ours[replicas[place.argsort(stable=True)]].view(-1, self.slots))
        return torch.cat(rows)


def _replicated(load: Tensor, replicas: int) -> tuple[Tensor, Tensor]:
    """The expert of each replica, and its share of the load: one of each, then one more of whoever has most."""
    expert, counts = list(range(len(load))), torch.ones(len(load), dtype=torch.float64)
    while len(expert) < replicas:
        busiest = int((load / counts).argmax())
        expert.append(busiest)
        counts[busiest] += 1
    held = torch.tensor(expert)
    return held, (load / counts)[held]


def _packed(weights: Tensor, bins: int, room: int) -> Tensor:
    """The bin of each weight, exactly `room` in each: heaviest first, onto the lightest bin with room."""
    filled, counts = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.int64)
    where = torch.zeros(len(weights), dtype=torch.int64)
    for item in weights.argsort(descending=True, stable=True).tolist():
        lightest = int(filled.masked_fill(counts == room, torch.inf).argmin())
        where[item] = lightest
        filled[lightest] += weights[item]
        counts[lightest] += 1
    return where
