"""What an author of a cache writes, and what the suites share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from transformers import Cache, DynamicCache, PreTrainedModel

from pikv.testing.transformers.comparison import assert_same_answers
from pikv.testing.transformers.dialogue import ModelDialogue
from pikv.testing.transformers.models import llama, mixtral
from pikv.testing.transformers.operations import Answer, Operation, Program

Output = TypeVar("Output")

LEFT, RIGHT = (0, 3, 6), (4, 0, 2)  # columns of padding in each of three rows


def reference(model: PreTrainedModel) -> Cache:
    """What every cache is compared with."""
    return DynamicCache(config=model.config)


def answers(model: PreTrainedModel, program: Program, cache: Cache) -> list[Answer]:
    """Run a program with a model and an empty cache."""
    return program.run(ModelDialogue.start(model, cache, program))


class CacheHooks:
    """`make` has to be written; the others may be overridden.

    logit_tolerance: how far logits in float32 may be from DynamicCache's; more for a cache that rounds.
    """

    logit_tolerance: float = 1e-4

    def make(self, model: PreTrainedModel) -> Cache:
        """Make an empty cache for one batch of this model, inside of `prepare`."""
        raise NotImplementedError("make: return the cache to test, empty")

    @contextmanager
    def prepare(self, model: PreTrainedModel) -> Iterator[None]:
        """Set the model up for the cache, and on leaving undo all of it. By default nothing is done."""
        yield

    def models(self) -> list[PreTrainedModel]:
        """The models in float32, for a cache that does not work with one of them to leave that out."""
        return [llama(), mixtral()]

    def both(self, model: PreTrainedModel, act: Callable[[Cache], Output]) -> tuple[Output, Output]:
        """What `act` returns for the cache under test, and for a DynamicCache."""
        expected = act(reference(model))
        with self.prepare(model):
            return act(self.make(model)), expected

    def check(self, *operations: Operation, batch: int = 3) -> None:
        """The operations get the same logits from every model, and the cache states the same lengths."""
        self.check_program(Program(operations, batch))

    def check_program(self, program: Program) -> None:
        """So does a program."""
        for model in self.models():
            got, expected = self.both(model, partial(answers, model, program))
            assert_same_answers(got, expected, self.logit_tolerance, type(model).__name__)
