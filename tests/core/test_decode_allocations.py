"""A decode step copies no keys and no values: what it allocates does not grow with them."""

from __future__ import annotations

import attrs
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pikv

LAYER = pikv.LayerConfig(query_heads=8, kv_heads=2, key_dim=64, value_dim=32)
PAGE = 64


@attrs.define(eq=False)
class NewStorages(TorchDispatchMode):
    """Adds up the bytes of every storage that an operation creates: outputs that share none of its inputs'."""

    nbytes: int = 0

    def __attrs_pre_init__(self):
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage(tensor).data_ptr() for tensor in tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        self.nbytes += sum(storage(out).nbytes() for out in tensors(result) if storage(out).data_ptr() not in given)
        return result


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(tensor):
    return tensor.untyped_storage()


def tokens(count):
    heads = [(LAYER.kv_heads, LAYER.key_dim), (LAYER.kv_heads, LAYER.value_dim), (LAYER.query_heads, LAYER.key_dim)]
    return [torch.randn(1, n, count, dim) for n, dim in heads]


def allocated_by_a_step(*, context, layers=1):
    """Bytes allocated by update and attend of one token in layer 0, no page being sealed."""
    cache = pikv.PiKVCache(pikv.ModelConfig.of([LAYER] * layers))
    chunk = context // layers
    for start in range(0, context, chunk):  # with several layers their pages lie mixed
        for layer_id in range(layers):
            k, v, _ = tokens(chunk)
            cache.update(layer_id, start, k, v)
    for position in range(context, context + 3):  # two steps, in which a workspace is made, and the one measured
        k, v, q = tokens(1)
        with NewStorages() as new:
            cache.update(0, position, k, v)
            cache.attend(0, q)
    return new.nbytes


def allowed_for(more):
    """What `more` tokens of context may add: no key or value, but what is computed from each page.

    Three numbers a token and query head: the score, its distance to the highest, its weight. And for each page and
    query head the query twice, as it is and scaled, and the page's part of the output.
    """
    numbers = 3 * more + more // PAGE * (2 * LAYER.key_dim + LAYER.value_dim)
    return numbers * LAYER.query_heads * 4


def test_a_decode_step_copies_neither_keys_nor_values():
    """From 1k to 8k tokens it allocates scores and a few rows a page more: a quarter of what the tokens take."""
    short, long = (allocated_by_a_step(context=context) for context in (1024, 8192))
    keys_and_values = 7168 * LAYER.kv_heads * (LAYER.key_dim + LAYER.value_dim) * 4
    assert long - short <= allowed_for(7168) < 0.25 * keys_and_values


def test_pages_that_lie_apart_are_read_by_way_of_one_workspace():
    """It is made once: later steps allocate no more than where pages lie side by side, and a mask."""
    short, long = (allocated_by_a_step(context=context, layers=2) for context in (1024, 8192))
    assert long - short <= allowed_for(7168) + 7168 * LAYER.kv_heads
