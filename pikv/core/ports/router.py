"""The router port: which experts a token goes to, and so the shard of its keys and values."""

from __future__ import annotations

import abc

import attrs
import torch
from torch import Tensor

from pikv.core.errors import InputError


@attrs.frozen(eq=False)
class Routing:
    """The experts of each token: int64 [tokens, k], best first, and their weights [tokens, k]."""

    experts: Tensor
    weights: Tensor

    @classmethod
    def to(cls, experts: Tensor, probabilities: Tensor) -> Routing:
        """To these experts [tokens, k], weighted by the gate's own probabilities [tokens, experts], summing to 1."""
        weights = probabilities.gather(-1, experts)
        return cls(experts, weights / weights.sum(-1, keepdim=True))

    @property
    def home(self) -> Tensor:
        """The expert whose shard holds the token's keys and values: int64 [tokens]."""
        return self.experts[:, 0]


def _places(instance: object, attribute: attrs.Attribute[Tensor], places: Tensor) -> None:
    if places.dtype != torch.int64 or places.dim() != 1 or not len(places) or bool((places < 0).any()):
        raise InputError(
            f"places must be int64 [experts], the place of each expert and none negative, got {places.dtype} "
            f"{places.tolist()}"
        )


@attrs.frozen(kw_only=True, eq=False)
class RouterState:
    """What a router knows. Never changed: `observe` returns another one.

    A router that remembers more derives from this. All fields are tensors, so that a commit can carry them by name.
    places: int64 [experts], the place that holds each expert, a rank of the transport.
    """

    places: Tensor = attrs.field(validator=_places)

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.places)


@attrs.frozen(kw_only=True, eq=False)
class Observation:
    """What one step of one layer cost. Every place must observe the same, or their routing goes apart.

    tokens: int64 [places], how many each place computed. seconds: float64 [places], how long that took; of no account
    where there were no tokens. load: int64 [experts], how many tokens each expert got. misses: int64 [experts], how
    many pages of an expert's shard the next query would have to fetch. Both are [0] where nobody counts.
    """

    tokens: Tensor = attrs.field()
    seconds: Tensor = attrs.field()
    load: Tensor = attrs.field(factory=lambda: torch.zeros(0, dtype=torch.int64))
    misses: Tensor = attrs.field(factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __attrs_post_init__(self) -> None:
        if self.tokens.dim() != 1 or self.tokens.shape != self.seconds.shape:
            raise InputError(
                f"tokens and seconds must both be [places], got {list(self.tokens.shape)} and "
                f"{list(self.seconds.shape)}"
            )
        for name in ("load", "misses"):
            counts = getattr(self, name)
            if counts.dtype != torch.int64 or counts.dim() != 1 or bool((counts < 0).any()):
                raise InputError(f"{name} must be int64 [experts], none negative, got {counts.dtype} {counts.tolist()}")
        wrong = (self.tokens < 0) | ((self.tokens > 0) & ~(self.seconds >= 0))  # not "< 0", for NaN
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            raise InputError(
                f"tokens and seconds must not be negative, got {int(self.tokens[place])} and "
                f"{float(self.seconds[place])} of place {place}"
            )


class Router(abc.ABC):
    """Choose experts. Settings only; what a router learns travels as its state."""

    @abc.abstractmethod
    def start(self, experts: int, places: Tensor) -> RouterState:
        """Return what is known before the first step.

        places: int64 [experts], the place that holds each expert. Raises InputError for anything else.
        """

    @abc.abstractmethod
    def route(self, state: RouterState, probabilities: Tensor, k: int) -> Routing:
        """Choose k experts for each token of probabilities [tokens, experts], and their weights, which sum to 1.

        probabilities: the gate's softmax. What transformers calls router logits is softmaxed already. Changes nothing.
        Raises InputError for what `check_routing` refuses.
        """

    @abc.abstractmethod
    def observe(self, state: RouterState, seen: Observation) -> RouterState:
        """Return what is known after a step; a router that learns nothing returns the state. Changes nothing."""


def check_places(experts: int, places: Tensor) -> Tensor:
    """Return places if it is one for each expert; else InputError."""
    if places.shape != (experts,):
        raise InputError(f"places must be [experts] = [{experts}], got {list(places.shape)}")
    return places


def check_counts(state: RouterState, name: str, counts: Tensor) -> None:
    """Raise InputError unless counts of an Observation are one for each expert, or none at all."""
    if len(counts) not in (0, state.experts):
        raise InputError(f"{name} must be [experts] = [{state.experts}], or [0], got {list(counts.shape)}")


def check_routing(state: RouterState, probabilities: Tensor, k: int) -> None:
    """Raise InputError unless probabilities are [tokens, experts] of at least k experts, and none below 0 or NaN.

    Values are looked at on the CPU only: elsewhere that would stop the device.
    """
    if probabilities.dim() != 2 or probabilities.shape[1] != state.experts or not probabilities.is_floating_point():
        raise InputError(
            f"probabilities must be floating [tokens, experts] = [any, {state.experts}], "
            f"got {probabilities.dtype} {list(probabilities.shape)}"
        )
    if not 1 <= k <= state.experts:
        raise InputError(f"k must be between 1 and experts = {state.experts}, got {k}")
    if probabilities.device.type == "cpu" and not bool((probabilities >= 0).all()):
        raise InputError(
            f"probabilities must be at least 0, got {float(probabilities.min())}; are these logits? softmax them first"
        )
