"""The further facts of a cache whose `update` returns dense keys and values, as tests to inherit."""

from __future__ import annotations

import inspect
from functools import partial

import attrs
import torch
from hypothesis import given
from torch import Tensor
from transformers import Cache

from pikv.testing.policy import inherited
from pikv.testing.transformers.comparison import assert_close, assert_same_answers
from pikv.testing.transformers.hooks import reference
from pikv.testing.transformers.models import llama
from pikv.testing.transformers.operations import Answer, Crop, Feed, Program, Reorder, Repeat, Select
from pikv.testing.transformers.programs import programs
from pikv.testing.transformers.suite import CacheConformance

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16  # of the small models


@attrs.define
class UpdateDialogue:
    """Random keys and values are shown to the cache alone. What comes of it is what `update` returns, by layer."""

    cache: Cache
    mask: Tensor
    random: torch.Generator
    dtype: torch.dtype

    def show(self, real: Tensor) -> list[Tensor]:
        """Update every layer; keys and values [batch, kv_heads, columns, head_dim] of each. Padding is stored too."""
        self.mask = torch.cat([self.mask, real], -1)
        states = [self.states(*real.shape) for _ in range(LAYERS)]
        return [each for layer in range(LAYERS) for each in self.cache.update(*states[layer], layer)]

    def states(self, batch: int, tokens: int) -> Tensor:
        """Keys and values, [2, batch, kv_heads, tokens, head_dim]."""
        return torch.randn(2, batch, KV_HEADS, tokens, HEAD_DIM, generator=self.random).to(self.dtype)


def started(program: Program, cache: Cache, *, dtype: torch.dtype = torch.float32) -> UpdateDialogue:
    """A dialogue in which nothing was shown yet."""
    return UpdateDialogue(cache, program.no_tokens(), program.random(), dtype)


def returned(program: Program, dtype: torch.dtype, cache: Cache) -> list[Answer]:
    """Run a program with an empty cache and no model."""
    return program.run(started(program, cache, dtype=dtype))


class DenseCacheConformance(CacheConformance):
    """Inherit, and say what `make` makes.

    state_tolerance: how far keys and values, of a normal distribution, may be from what was stored; more for a cache
    that rounds.
    """

    state_tolerance: float = 0.0

    def check_updates(self, program: Program, dtype: torch.dtype = torch.float32) -> None:
        """A program gets the same keys and values as from DynamicCache."""
        got, expected = self.both(llama(), partial(returned, program, dtype))
        assert_same_answers(got, expected, self.state_tolerance, "keys and values")

    def test_update_returns_all_that_was_stored(self) -> None:
        """Keys and values of all tokens so far, in their order, in the dtype that they came in."""
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            self.check_updates(Program((Feed(5), Feed(1), Feed(70), Feed(1), Feed(2))), dtype)

    def test_stored_rows_and_columns_move(self) -> None:
        """Reorder, select, repeat and crop move what was stored, and nothing else."""
        moves = (Reorder((2, 0, 0)), Feed(1), Crop(3), Feed(2), Select((2, 1)), Feed(1), Repeat(2), Feed(1))
        self.check_updates(Program((Feed(9), *moves)))

    @inherited
    @given(program=programs())
    def test_any_program_of_updates(self, program: Program) -> None:
        """Any mixture of all this."""
        self.check_updates(program)

    def test_update_changes_nothing_given(self) -> None:
        """Neither an update nor a later one writes to the tensors that came in."""
        with self.prepare(llama()):
            talk, given = started(Program(()), self.make(llama())), []
            for tokens in (5, 1, 3):
                states = talk.states(3, tokens)
                given.append((states, states.clone()))
                for layer in range(LAYERS):
                    talk.cache.update(*states, layer)
        for states, before in given:
            assert_close(states, before, 0.0, "keys and values that were passed to update, afterwards")

    def test_layers_stand_alone(self) -> None:
        """A layer that is a chunk ahead of another does not change its length or what it returns."""
        with self.prepare(llama()):
            talk, other = started(Program(()), self.make(llama())), reference(llama())
            for layer, tokens in ((0, 5), (1, 5), (0, 3), (0, 1), (1, 4)):
                states = talk.states(3, tokens)
                for got, expected in zip(talk.cache.update(*states, layer), other.update(*states, layer), strict=True):
                    assert_close(got, expected, self.state_tolerance, f"layer {layer}")
                lengths = [[int(cache.get_seq_length(each)) for each in range(LAYERS)] for cache in (talk.cache, other)]
                assert lengths[0] == lengths[1], f"lengths of the layers are {lengths[0]}, expected {lengths[1]}"

    def test_mask_sizes_are_of_what_update_returns(self) -> None:
        """`get_mask_sizes` foretells how many columns come back, and the last of them is the newest token."""
        with self.prepare(llama()):
            talk, seen = started(Program(()), self.make(llama())), 0
            for tokens in (5, 1, 40, 2):
                length, offset = _mask_sizes(talk.cache, seen, tokens)
                keys, *_ = talk.show(torch.ones(3, tokens))
                seen += tokens
                assert length == keys.shape[-2], f"a mask for {length} columns, but {keys.shape[-2]} came back"
                assert length + offset == seen, f"a mask for columns {offset} to {offset + length} of {seen}"

    def test_a_token_is_rounded_at_most_once(self) -> None:
        """The keys returned for a token may change once, when they are compressed, and never again."""
        with self.prepare(llama()):
            talk = started(Program((), batch=1), self.make(llama()))
            before, changes = torch.zeros(1, KV_HEADS, 0, HEAD_DIM), torch.zeros(0)
            for tokens in (70, *[1] * 300):
                keys, *_ = talk.show(torch.ones(1, tokens))
                old = before.shape[-2]
                changed = (keys[:, :, :old] != before).any(-1).any(1)[0]
                before, changes = keys.clone(), torch.cat([changes + changed, torch.zeros(tokens)])
        most, mean = int(changes.max()), float(changes.mean())
        assert most <= 1, f"a token's keys changed {most} times in 300 updates, {mean:.1f} times on average"


def _mask_sizes(cache: Cache, seen: int, tokens: int) -> tuple[int, int]:
    """Length and offset of the keys for a chunk; older versions of transformers ask for them by its positions."""
    by_positions = "cache_position" in inspect.signature(Cache.get_mask_sizes).parameters
    return cache.get_mask_sizes(torch.arange(seen, seen + tokens) if by_positions else tokens, 0)
