"""Several ranks that store tokens together answer as one cache that stores all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.core.ports.transport import Solo
from pikv.policies import TokenRange
from pikv.testing import strategies as some
from pikv.testing.plain import PlainCache, rounding
from pikv.testing.transport import run_ranks


@pytest.mark.property
@given(
    model=some.model_configs(max_layers=1),
    ranks=st.integers(2, 3),
    tokens=st.integers(1, 7),
    total=st.integers(1, 50),
    generator=some.generators(),
    data=st.data(),
)
def test_every_rank_answers_as_if_it_held_everything(model, ranks, tokens, total, generator, data):
    """Also with sink logits, which weigh once, and where a rank holds nothing; each token is stored exactly once."""
    layer, runtime = model.layers[0], data.draw(some.runtime_configs())
    positions, sizes = data.draw(some.positions(2, total)), data.draw(some.chunkings(total, max_chunks=3))
    heads = [(layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim), (layer.query_heads, layer.key_dim)]
    k, v, q = (torch.randn(2, n, total, dim, generator=generator).to(model.dtype) for n, dim in heads)
    plain, expected = PlainCache(model), []
    for chunk in torch.arange(total).split(sizes):
        plain.update(0, positions[:, chunk], k[:, :, chunk], v[:, :, chunk])
        expected.append(plain.attend(0, q[:, :, chunk], positions[:, chunk]))

    def rank(transport):
        cache = pikv.compose(
            model,
            transport=transport,
            sharding=TokenRange(tokens=tokens),
            page_size=runtime.page_size,
            tail_tokens=runtime.tail_tokens,
        )
        outputs = []
        for chunk in torch.arange(total).split(sizes):
            cache.update(0, positions[:, chunk], k[:, :, chunk], v[:, :, chunk])
            stored = cache.retrieve(0).positions
            outputs.append(cache.attend(0, q[:, :, chunk]))
        return torch.cat(outputs, dim=2), stored

    results = run_ranks(ranks, rank)
    for output, stored in results:
        torch.testing.assert_close(output.double(), torch.cat(expected, dim=2), **rounding(model.dtype))
        assert torch.equal(output, results[0][0])
        owner = (stored[stored >= 0] // tokens) % ranks
        assert owner.unique().numel() <= 1
    if layer.window is None:
        assert sum(int((stored >= 0).sum()) for _, stored in results) == int((positions >= 0).sum()) * layer.kv_heads


def test_a_rank_that_is_alone_asks_nobody():
    """A group of one answers as a cache without a transport, bit for bit."""
    model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8)
    k, v = torch.randn(2, 2, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    q = torch.cat([k, v], dim=1)
    outputs = []
    for settings in ({}, {"transport": Solo(), "sharding": TokenRange()}):
        cache = pikv.compose(model, **settings)
        cache.update(0, 0, k, v)
        outputs.append(cache.attend(0, q))
    assert torch.equal(*outputs)
