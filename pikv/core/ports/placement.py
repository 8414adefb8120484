"""The placement port: which experts each place holds, some of them several times."""

from __future__ import annotations

import abc

from torch import Tensor


class Placement(abc.ABC):
    """Place experts and further replicas of busy ones, so that places have about the same to do. Settings only."""

    @abc.abstractmethod
    def place(self, load: Tensor, places: int) -> Tensor:
        """Return the expert in every slot of every place: int64 [places, slots].

        load: [experts], how much each has to do, none negative; replicas of an expert share it evenly. Every expert has
        a slot. Raises ConfigError where the slots do not hold the experts. Changes nothing.
        """
