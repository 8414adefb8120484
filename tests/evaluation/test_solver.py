"""The byte solver: a cap holds for real caches, and what is measured of a real model is spent where it matters."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import pikv
from pikv.adapters.compressors import Int2, Int4, LowRank, Rotated
from pikv.adapters.transformers.families import model_config
from pikv.core.exact import Exact
from pikv.evaluation.contestants import Composed
from pikv.evaluation.items import Task
from pikv.evaluation.plan import LayerLosses
from pikv.evaluation.recall import recall, standard_library
from pikv.evaluation.solver import composed_within, measure, never_falling, sizes_of
from pikv.policies import HeavyHitters, Importance, Quest, Recent, Uniform

MODEL_FOLDER = Path(__file__).parents[2] / "downstream_tasks" / "models" / "tiny_moe"
LAYERS = [
    pikv.LayerConfig(query_heads=4, kv_heads=heads, key_dim=32, value_dim=32, window=window)
    for heads, window in ((2, None), (1, 60), (4, None))
]
MODEL = pikv.ModelConfig.of(LAYERS, dtype=torch.float16)
COMPRESSORS = (Int2(), Rotated(Int4()), Exact(), LowRank(rank=8))
RUNTIME = pikv.RuntimeConfig(
    token_selector=Recent(sinks=0, recent=8), allocator=Uniform(), budget_tokens=160, page_size=16, tail_tokens=16
)
SELECTORS = (Recent(sinks=0, recent=8), Recent(sinks=20), Importance(window=8, recent=8))


def read(cache: pikv.PiKVCache, tokens: int, chunk: int) -> None:
    for first, layer_id in itertools.product(range(0, tokens, chunk), range(len(LAYERS))):
        layer, some = LAYERS[layer_id], min(chunk, tokens - first)
        k, v = torch.randn(2, 1, layer.kv_heads, some, 32).half()
        cache.update(layer_id, first, k, v)
        cache.attend(layer_id, torch.randn(1, 4, some, 32).half())
    cache.finish_prefill()


@functools.cache
def sizes(runtime: pikv.RuntimeConfig) -> list[dict[str, tuple[int, ...]]]:
    return [sizes_of(MODEL, layer, runtime, COMPRESSORS) for layer in LAYERS]


@st.composite
def measured(draw, runtime: pikv.RuntimeConfig) -> list[LayerLosses]:
    """Real bytes, and losses that a model might have; the fewest pages are those of the sinks."""
    least, some = -(-runtime.token_selector.sinks // 16), st.floats(0, 4)
    return [
        LayerLosses(
            formats=tuple(draw(some) for _ in COMPRESSORS),
            heads=tuple({least: draw(some), least + 2: draw(some), 8: 0.0} for _ in range(layer.kv_heads)),
            **each,
        )
        for layer, each in zip(LAYERS, sizes(runtime), strict=True)
    ]


@pytest.mark.property
@settings(deadline=None, max_examples=30)
@given(
    data=st.data(),
    selector=st.sampled_from(SELECTORS),
    page_selector=st.sampled_from([None, Quest(pages=2)]),
    room=st.integers(0, 60_000),
    tokens=st.integers(1, 300),
    chunk=st.integers(16, 300),
)
def test_a_real_cache_never_exceeds_the_cap(data, selector, page_selector, room, tokens, chunk):
    """Whatever the text's length and chunks: pages, tails, tables, indexes, bases and what selectors keep."""
    tail = max(16, selector.recent)
    runtime = attrs.evolve(RUNTIME, token_selector=selector, page_selector=page_selector, tail_tokens=tail)
    losses = data.draw(measured(runtime))
    least = sum(min(map(sum, zip(w.fixed_bytes, _fewest(w), strict=True))) for w in losses)
    composed, plan = composed_within(least + room, losses, runtime=runtime, compressors=COMPRESSORS)
    cache = pikv.PiKVCache(MODEL, composed)
    read(cache, tokens, chunk)
    assert cache.stored_bytes().total <= plan.nbytes <= least + room


def _fewest(layer: LayerLosses) -> list[int]:
    return [sum(map(min, layer.heads)) * page for page in layer.page_bytes]


def test_bytes_are_not_overestimated_by_much():
    """Of a long plan, by a tenth at most."""
    losses = [
        LayerLosses(formats=(1.0, 0.5, 0.0, 2.0), heads=({0: 9.0, 8: 0.0},) * layer.kv_heads, **each)
        for layer, each in zip(LAYERS, sizes(RUNTIME), strict=True)
    ]
    composed, plan = composed_within(60_000, losses, runtime=RUNTIME, compressors=COMPRESSORS)
    cache = pikv.PiKVCache(MODEL, composed)
    read(cache, 300, 300)
    assert 0.9 * plan.nbytes <= cache.stored_bytes().total <= plan.nbytes


def test_a_model_is_measured_and_its_cache_composed():
    """The shipped model: more bytes are expected to lose less, and the cache that is composed takes no more."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    task = recall(standard_library(held_out=False), length=200, pairs=6, samples=2, seed=0)
    formats = (Int2(), Exact())
    losses = measure(model, tokenizer, task, runtime=RUNTIME, compressors=formats)
    assert [len(layer.heads) for layer in losses] == [2] * 4
    assert all(layer.heads[0][max(layer.heads[0])] == 0 for layer in losses)
    ids, plans = torch.tensor([tokenizer(task.items[0].context).input_ids]), []
    for cap in (115_000, 150_000):
        composed, plan = composed_within(cap, losses, runtime=RUNTIME, compressors=formats)
        plans.append(plan)
        with Composed(name="", runtime=composed).in_place(model) as kept, torch.no_grad():
            assert kept.held(kept.read(model, ids, 64)).total <= cap
    assert plans[1].loss < plans[0].loss
    assert model_config(model).layers[0].kv_heads == len(plans[0].pages[0])


def test_a_cut_costs_no_less_than_a_lesser_one():
    """What noise says otherwise is raised, below nothing too."""
    assert never_falling({1: 3.0, 2: -0.5, 4: 0.25, 8: -0.1, 16: 0.0}) == {1: 3.0, 2: 0.25, 4: 0.25, 8: 0.0, 16: 0.0}


def test_what_cannot_be_solved_is_refused():
    """Before anything is measured: nothing that may leave, bytes that depend on chunks, no format."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    task = Task(name="own", items=())
    remembering = attrs.evolve(RUNTIME, token_selector=HeavyHitters(recent=8))
    for runtime, formats, said in [
        (pikv.RuntimeConfig(), (Int2(),), "token_selector"),
        (remembering, (Int2(),), "HeavyHitters"),
        (RUNTIME, (), "compressors"),
    ]:
        with pytest.raises(pikv.ConfigError, match=said):
            measure(model, None, task, runtime=runtime, compressors=formats)
