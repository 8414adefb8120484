"""The router port: which experts a token goes to, and so the shard of its keys and values."""

from __future__ import annotations

import abc

import attrs
from torch import Tensor


@attrs.frozen
class Routing:
    """The experts of each token: int64 [tokens, k], best first, and their weights [tokens, k]."""

    experts: Tensor
    weights: Tensor

    @property
    def home(self) -> Tensor:
        """The expert whose shard holds the token's keys and values: int64 [tokens]."""
        return self.experts[:, 0]


class Router(abc.ABC):
    """Choose experts. Settings only."""

    @abc.abstractmethod
    def route(self, probabilities: Tensor, k: int) -> Routing:
        """Choose k experts for each token of probabilities [tokens, experts], the gate's softmax."""
