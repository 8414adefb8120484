"""The suite for transformers caches: a good cache passes, and each test finds a cache with a defect of its own."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is missing: pip install pikv[transformers]")
from transformers import DynamicCache

from pikv.testing.transformers import DenseCacheConformance


class TestDynamicCache(DenseCacheConformance):
    def make(self, model):
        return DynamicCache(config=model.config)


def test_other_suites_do_not_need_transformers():
    """In a fresh interpreter."""
    program = "import pikv.testing.router, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "pikv.testing.router" in loaded
    assert "transformers" not in loaded


class IgnoresReorder(DynamicCache):
    def reorder_cache(self, beam_idx):
        pass


class IgnoresCrop(DynamicCache):
    def crop(self, tokens):
        pass


class LosesATokenAtCrop(DynamicCache):
    def crop(self, tokens):
        if tokens:
            super().crop(tokens - 1)


class SelectsTheFirstRows(DynamicCache):
    def batch_select_indices(self, indices):
        super().batch_select_indices(torch.arange(len(indices)))


class RepeatsTheBatch(DynamicCache):
    def batch_repeat_interleave(self, repeats):
        for layer in self.layers:
            layer.keys, layer.values = (states.repeat(repeats, 1, 1, 1) for states in (layer.keys, layer.values))


class CountsOneTooMany(DynamicCache):
    def get_seq_length(self, layer_idx=0):
        length = super().get_seq_length(layer_idx)
        return length and length + 1


class CountsByTheFirstLayer(DynamicCache):
    def get_seq_length(self, layer_idx=0):
        return super().get_seq_length(0)


class MasksOneTooFew(DynamicCache):
    def get_mask_sizes(self, query, layer_idx):
        length, offset = super().get_mask_sizes(query, layer_idx)
        return length - 1, offset


class Changes(DynamicCache):
    """What is stored is changed by a subclass's `change`(stored keys, tokens that come) before tokens come."""

    def update(self, keys, values, layer_idx, *rest, **others):
        layer = self.layers[layer_idx]
        if layer.is_initialized:
            layer.keys = self.change(layer.keys, keys.shape[-2])
        return super().update(keys, values, layer_idx, *rest, **others)


class Rounds(Changes):
    def change(self, keys, tokens):
        return keys.bfloat16().to(keys.dtype)


class RoundsToEightBits(Changes):
    def change(self, keys, tokens):
        return keys.to(torch.float8_e4m3fn).to(keys.dtype)


class RoundsAgain(Changes):
    def change(self, keys, tokens):
        return keys * 1.001


class RoundsWhatIsOld(Changes):
    def change(self, keys, tokens):
        return torch.cat([keys[..., :-128, :].bfloat16().to(keys.dtype), keys[..., -128:, :]], -2)


class ForgetsAtAChunk(Changes):
    def change(self, keys, tokens):
        return keys if tokens == 1 else keys * 0


class RoundsWhatComes(DynamicCache):
    def update(self, keys, values, *rest, **others):
        return super().update(keys.bfloat16().to(keys.dtype), values, *rest, **others)


class WritesToWhatComes(DynamicCache):
    def update(self, keys, values, *rest, **others):
        return super().update(keys.mul_(2), values, *rest, **others)


class Suite(DenseCacheConformance):
    """For a cache that is made like a DynamicCache."""

    def __init__(self, cache=DynamicCache):
        self.cache = cache

    def make(self, model):
        return self.cache(config=model.config)


class SuiteWithHook(Suite):
    """For a cache that comes with a change of the model: `change`(keyword arguments) before each call."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    @contextmanager
    def prepare(self, model):
        handle = model.register_forward_pre_hook(lambda _, args, kwargs: (args, self.changed(kwargs)), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def changed(self, kwargs):
        return {**kwargs, **self.change(kwargs)}


def no_padding(kwargs):
    return {"attention_mask": torch.ones_like(kwargs["attention_mask"])}


def padding_on_the_left_alone(kwargs):
    return {"attention_mask": kwargs["attention_mask"].cummax(-1).values}


def padding_at_the_start_alone(kwargs):
    start, rest = kwargs["attention_mask"].split([8, kwargs["attention_mask"].shape[-1] - 8], dim=-1)
    return {"attention_mask": torch.cat([start, torch.ones_like(rest)], -1)}


def embeddings_in_another_order(kwargs):
    embeddings = kwargs.get("inputs_embeds")
    return {} if embeddings is None else {"inputs_embeds": embeddings.roll(1, dims=1)}


class SuiteOfSharedLayers(Suite):
    """All caches of one model hold the same layers."""

    layers = None

    def make(self, model):
        cache = super().make(model)
        cache.layers = self.layers = self.layers or cache.layers
        return cache


class SuiteThatLeavesSomethingBehind(Suite):
    """The model is not what it was; a copy, since others use it too."""

    def models(self):
        return [copy.deepcopy(model) for model in super().models()]

    @contextmanager
    def prepare(self, model):
        yield
        model.lm_head.weight.data += 1e-6


DEFECTS = {
    "it_is_a_cache": Suite(lambda config: SimpleNamespace(get_seq_length=lambda: 0)),
    "a_prompt": Suite(RoundsWhatComes),
    "single_tokens": Suite(Rounds),
    "chunks": Suite(ForgetsAtAChunk),
    "a_long_dialogue": Suite(RoundsWhatIsOld),
    "left_padding": SuiteWithHook(no_padding),
    "right_padding": SuiteWithHook(padding_on_the_left_alone),
    "padding_between_turns": SuiteWithHook(padding_at_the_start_alone),
    "length_is_what_was_shown": Suite(CountsOneTooMany),
    "reorder": Suite(IgnoresReorder),
    "select": Suite(SelectsTheFirstRows),
    "repeat": Suite(RepeatsTheBatch),
    "crop": Suite(LosesATokenAtCrop),
    "crop_into_padding": Suite(LosesATokenAtCrop),
    "bfloat16": Suite(RoundsToEightBits),
    "two_caches_stand_alone": SuiteOfSharedLayers(),
    "the_model_is_given_back": SuiteThatLeavesSomethingBehind(),
    "greedy_generate": Suite(Rounds),
    "generate_for_unequal_prompts": SuiteWithHook(no_padding),
    "three_turns": Suite(ForgetsAtAChunk),
    "prefill_in_chunks": Suite(ForgetsAtAChunk),
    "generate_from_embeddings": SuiteWithHook(embeddings_in_another_order),
    "beam_search": Suite(IgnoresReorder),
    "assisted_generate": Suite(LosesATokenAtCrop),
    "update_returns_all_that_was_stored": Suite(Rounds),
    "stored_rows_and_columns_move": Suite(IgnoresCrop),
    "update_changes_nothing_given": Suite(WritesToWhatComes),
    "layers_stand_alone": Suite(CountsByTheFirstLayer),
    "mask_sizes_are_of_what_update_returns": Suite(MasksOneTooFew),
    "a_token_is_rounded_at_most_once": Suite(RoundsAgain),
}
PROPERTIES = {"any_program": Suite(IgnoresReorder), "any_program_of_updates": Suite(SelectsTheFirstRows)}


@pytest.mark.parametrize("test", sorted(DEFECTS))
def test_the_suite_finds_a_defect(test):
    """Each test of the suite fails for a cache that breaks the fact it states."""
    with pytest.raises(AssertionError):
        getattr(DEFECTS[test], f"test_{test}")()


@pytest.mark.slow  # hypothesis looks for the simplest case of each
@pytest.mark.parametrize("test", sorted(PROPERTIES))
def test_the_suite_finds_a_defect_in_a_mixture(test):
    """So do those that try mixtures."""
    with pytest.raises((AssertionError, ExceptionGroup)):
        getattr(PROPERTIES[test], f"test_{test}")()


def test_every_test_of_the_suite_has_its_defect():
    """None of them could pass whatever the cache does."""
    tests = {name.removeprefix("test_") for name in dir(DenseCacheConformance) if name.startswith("test_")}
    assert tests == set(DEFECTS) | set(PROPERTIES)
