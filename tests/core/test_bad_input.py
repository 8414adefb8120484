"""Bad input raises the named error, which is also the builtin that a caller expects, and changes nothing.

Each message names the thing, what was expected, what came, and what to do where that is not plain.
"""

from __future__ import annotations

import pytest
import torch

import pikv
from pikv.policies import TopK

MODEL = pikv.ModelConfig(layers=2, query_heads=4, kv_heads=2, head_dim=8)
BATCH, TOKENS = 2, 40


def states(batch, tokens, *, heads=2, dim=8):
    return torch.ones(batch, heads, tokens, dim)


def queries(batch, tokens, *, dim=8):
    return states(batch, tokens, heads=4, dim=dim)


def with_a(number, *index):
    tensor = states(BATCH, 3)
    tensor[index] = number
    return tensor


NEW = states(BATCH, 3)


@pytest.fixture
def cache():
    """Two sequences of 40 tokens in layer 0, some of them sealed, and none in layer 1."""
    cache = pikv.PiKVCache(MODEL, pikv.RuntimeConfig(page_size=16, tail_tokens=8))
    cache.update(0, 0, states(BATCH, TOKENS), states(BATCH, TOKENS))
    cache.attend(0, queries(BATCH, TOKENS))
    return cache


def check_raises(cache, operation, error, builtin, parts):
    """The operation raises the error with all the parts in its message, and the cache is as before."""
    before = cache.retrieve(0), cache.stored_bytes(), cache.pool.used_bytes, cache.sequences
    assert issubclass(error, builtin)
    assert issubclass(error, pikv.PiKVError)
    with pytest.raises(error) as raised:
        operation(cache)
    for part in parts:
        assert part in str(raised.value)
    now = cache.retrieve(0)
    assert torch.equal(now.keys, before[0].keys)
    assert torch.equal(now.positions, before[0].positions)
    assert (cache.stored_bytes(), cache.pool.used_bytes, cache.sequences) == before[1:]
    cache.pool.check_integrity()
    cache.update(0, TOKENS, NEW, NEW)  # and it goes on


UPDATES = {
    "dimensions": (
        (0, 40, NEW[0], NEW),
        ["k must be [batch, kv_heads, tokens, head_dim] = [any, 2, any, 8]", "[2, 3, 8]"],
    ),
    "head_dim": ((0, 40, NEW[..., 1:], NEW), ["k must be", "[any, 2, any, 8]", "got [2, 2, 3, 7]"]),
    "kv_heads": ((0, 40, NEW[:, :1], NEW), ["k must be", "got [2, 1, 3, 8]"]),
    "values": ((0, 40, NEW, NEW[:, :, :2]), ["v must be", "[2, 2, 3, 8]", "got [2, 2, 2, 8]"]),
    "dtype": ((0, 40, NEW, NEW.half()), ["v must be torch.float32 like the model", "got torch.float16", "convert it"]),
    "device": ((0, 40, NEW.to("meta"), NEW), ["k must be on cpu like the model", "got meta", "move it"]),
    "no batch": ((0, 40, NEW[:0], NEW[:0]), ["k must have at least one sequence", "batch of 0"]),
    "batch": ((0, 40, *[states(3, 1)] * 2), ["k must have batch = 2", "got 3", "join and drop"]),
    "one token of one sequence": ((0, 40, *[torch.ones(2, 8)] * 2), ["k must have batch = 2", "got 1"]),
    "batch of another layer": ((1, 0, *[states(3, 1)] * 2), ["k must have batch = 2", "got 3", "join and drop"]),
    "back": ((0, 39, NEW, NEW), ["layer 0, sequence 0 has seen position 39", "got 39", "crop the cache first"]),
    "back within": ((0, torch.tensor([[40, 41, 42], [40, -1, 40]]), NEW, NEW), ["sequence 1", "position 40, got 40"]),
    "negative": ((0, -1, NEW, NEW), ["token_id must not be negative", "got -1", "position of the first token"]),
    "far": ((0, 2**31 - 2, NEW, NEW), ["token_id must be at most 2147483647", "got 2147483646"]),
    "far tensor": ((0, torch.full((2, 3), 2**31), NEW, NEW), ["token_id must be at most 2147483647", "got 2147483648"]),
    "below all padding": ((0, torch.full((2, 3), -(2**31) - 2), NEW, NEW), ["-1 for padding", "got -2147483650"]),
    "float positions": ((0, torch.ones(2, 3), NEW, NEW), ["token_id must be a whole number", "got torch.float32"]),
    "list": ((0, [40, 41, 42], NEW, NEW), ["token_id must be a whole number or a tensor", "got list"]),
    "positions' shape": ((0, torch.arange(3), NEW, NEW), ["token_id must be [batch, tokens] = [2, 3]", "got [3]"]),
    "no values": ((0, 40, NEW, None), ["v of layer 0 must be a tensor", "got NoneType", "LayerConfig.values"]),
    "NaN in k": (
        (0, 40, with_a(torch.nan, 1, 0, 2, 5), NEW),
        ["k must be finite", "got nan", "[1, 0, 2, 5] of layer 0"],
    ),
    "inf in v": (
        (0, 40, NEW, with_a(torch.inf, 0, 1, 0, 0)),
        ["v must be finite", "got inf", "[0, 1, 0, 0]", "overflow"],
    ),
}


@pytest.mark.parametrize(("arguments", "parts"), UPDATES.values(), ids=UPDATES)
def test_update_refuses(cache, arguments, parts):
    """Tensors, positions and values that it cannot store: InputError, a ValueError."""
    check_raises(cache, lambda cache: cache.update(*arguments), pikv.InputError, ValueError, parts)


@pytest.mark.parametrize("layer_id", [2, -1, "0", 0.0])
def test_an_unknown_layer_is_refused(cache, layer_id):
    """By update, attend and retrieve: LayerError, an IndexError."""
    parts = ["layer_id must be between 0 and 1", f"got {layer_id!r}"]
    for operation in (
        lambda cache: cache.update(layer_id, TOKENS, NEW, NEW),
        lambda cache: cache.attend(layer_id, queries(BATCH, TOKENS)),
        lambda cache: cache.retrieve(layer_id),
    ):
        check_raises(cache.fork(), operation, pikv.LayerError, IndexError, parts)


QUERIES = {
    "head_dim": (queries(BATCH, 1, dim=7), ["q must be [batch, query_heads, tokens of the last update, head_dim]"]),
    "tokens": (queries(BATCH, 2), ["= [2, 4, 1, 8]", "got [2, 4, 2, 8]"]),
    "batch": (queries(1, 1), ["= [2, 4, 1, 8]", "got [1, 4, 1, 8]"]),
    "dtype": (queries(BATCH, 1).bfloat16(), ["q must be torch.float32 like the model", "got torch.bfloat16"]),
    "device": (queries(BATCH, 1).to("meta"), ["q must be on cpu like the model", "got meta"]),
}


@pytest.mark.parametrize(("query", "parts"), QUERIES.values(), ids=QUERIES)
def test_attend_refuses(cache, query, parts):
    """Queries that are not those of the last update's tokens: InputError."""
    cache.update(0, TOKENS, *[states(BATCH, 1)] * 2)
    before = cache.retrieve(0).keys
    with pytest.raises(pikv.InputError) as raised:
        cache.attend(0, query)
    assert all(part in str(raised.value) for part in parts)
    assert torch.equal(cache.retrieve(0).keys, before)
    cache.attend(0, queries(BATCH, 1))


def test_a_layer_without_tokens_has_nothing_to_read(cache):
    """Attend and retrieve raise StateError, a RuntimeError, that says which layer and what to do."""
    parts = ["layer 1 is empty", "call update first"]
    check_raises(cache.fork(), lambda cache: cache.retrieve(1), pikv.StateError, RuntimeError, parts)
    check_raises(cache, lambda cache: cache.attend(1, queries(BATCH, 1)), pikv.StateError, RuntimeError, parts)


def test_several_tokens_are_asked_about_once(cache):
    """A second attend for the same chunk would read sealed tokens as if they were older: StateError."""
    parts = ["layer 0", "its last update of 40 tokens", "call attend once after each update"]
    check_raises(cache, lambda cache: cache.attend(0, queries(BATCH, TOKENS)), pikv.StateError, RuntimeError, parts)


SEQUENCES = {
    "reorder beyond": (lambda cache: cache.reorder([0, 2]), ["ids must be between 0 and 1", "got [0, 2]"]),
    "reorder negative": (lambda cache: cache.reorder([-1]), ["ids must be between 0 and 1", "got [-1]"]),
    "reorder floats": (lambda cache: cache.reorder([0.0]), ["ids must be a list of sequence numbers", "float32"]),
    "reorder a mask": (lambda cache: cache.reorder([True, False]), ["ids must be a list of sequence numbers", "bool"]),
    "reorder a matrix": (lambda cache: cache.reorder(torch.tensor([[0]])), ["ids must be a list", "[1, 1]"]),
    "drop beyond": (lambda cache: cache.drop([2]), ["ids must be between 0 and 1", "got [2]"]),
    "crop negative": (
        lambda cache: cache.crop(-1),
        ["tokens must not be negative", "got -1", "first position to forget"],
    ),
    "crop floats": (lambda cache: cache.crop(torch.ones(2)), ["tokens must be a whole number", "float32"]),
    "crop shape": (lambda cache: cache.crop(torch.ones(3, dtype=torch.int64)), ["one a sequence, [2]", "got [3]"]),
}


@pytest.mark.parametrize(("operation", "parts"), SEQUENCES.values(), ids=SEQUENCES)
def test_operations_on_sequences_refuse(cache, operation, parts):
    """Sequences that there are not, and lengths that there cannot be: InputError."""
    check_raises(cache, operation, pikv.InputError, ValueError, parts)


def test_join_refuses_a_cache_of_another_pool(cache):
    """InputError, which says how to share one."""
    other = pikv.PiKVCache(MODEL, cache.runtime)
    parts = ["other must share the model, the runtime and the pool", "pool="]
    check_raises(cache, lambda cache: cache.join(other), pikv.InputError, ValueError, parts)


def test_join_refuses_a_cache_in_the_middle_of_a_step(cache):
    """StateError: a sequence would lack tokens in some layer."""
    other = cache.fork()
    other.update(1, 0, NEW, NEW)
    parts = ["this cache has tokens in layers [0], the other in [0, 1]", "join between steps"]
    check_raises(cache, lambda cache: cache.join(other), pikv.StateError, RuntimeError, parts)


def test_crop_refuses_what_a_window_has_passed():
    """StateError: the next query would see tokens that are gone. A prompt's last page may always be taken back."""
    model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=4, window=20)
    cache = pikv.PiKVCache(model, pikv.RuntimeConfig(page_size=16, tail_tokens=16))
    cache.update(0, 0, torch.ones(1, 1, 50, 4), torch.ones(1, 1, 50, 4))
    cache.attend(0, torch.ones(1, 1, 50, 4))
    before = cache.retrieve(0).positions
    with pytest.raises(pikv.StateError) as raised:
        cache.crop(33)
    for part in ["layer 0: its window of 20 has dropped tokens up to positions [14]", "at [33]", "crop less"]:
        assert part in str(raised.value)
    assert torch.equal(cache.retrieve(0).positions, before)
    cache.crop(34)
    assert cache.retrieve(0).positions.max() == 33


def test_crop_within_a_window_that_has_dropped_nothing():
    """A sequence shorter than its window may be cropped to any length."""
    model = pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=4, window=8)
    cache = pikv.PiKVCache(model)
    cache.update(0, 0, torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, 4))
    cache.attend(0, torch.ones(1, 1, 5, 4))
    cache.crop(3)
    assert cache.retrieve(0).positions.tolist() == [[[0, 1, 2]]]


def test_numbers_are_looked_at_on_the_cpu_only():
    """Elsewhere it would stop the device; tensors that are on the CPU are refused there."""
    model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8, device="meta")
    runtime = pikv.RuntimeConfig()
    cache = pikv.PiKVCache(model, runtime, pool=pikv.PagePool(model, runtime, capacity_bytes=2**20))
    with pytest.raises(pikv.InputError, match="k must be on meta like the model, got cpu"):
        cache.update(0, 0, NEW, NEW)
    cache.update(0, 0, NEW.to("meta"), NEW.to("meta"))
    assert cache.sequences == BATCH


def test_routing_needs_a_router_and_the_right_shape():
    """Each missing thing is named; tokens are those of the last update."""
    model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8, experts=4, experts_per_token=2)
    probabilities = torch.rand(2, 3, 4)
    with pytest.raises(pikv.ConfigError, match="needs a router"):
        pikv.PiKVCache(model).route(0, probabilities)
    cache = pikv.compose(model, router=TopK())
    with pytest.raises(pikv.StateError, match="layer 0 is empty"):
        cache.route(0, probabilities)
    cache.update(0, 0, torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8))
    with pytest.raises(pikv.InputError, match=r"= \[2, 3, 4\], got \[2, 1, 4\]"):
        cache.route(0, probabilities[:, :1])
    routing = cache.route(0, probabilities)
    assert torch.equal(routing.home, probabilities.flatten(0, 1).argmax(-1))


def test_numbers_whose_sum_overflows_are_no_bad_input():
    """Finite keys and values are taken however large they are together."""
    cache = pikv.PiKVCache(MODEL)
    cache.update(0, 0, 3e38 * states(BATCH, 3), -3e38 * states(BATCH, 3))
    assert bool((cache.retrieve(0).keys == 3e38).all())
