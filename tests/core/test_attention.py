"""What a cache answers is attention over all that was put in, whatever the shapes and however the tokens came."""

from __future__ import annotations

from unittest.mock import patch

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.core import attention, reading, torch_attend
from pikv.testing import strategies as some
from pikv.testing.plain import PlainCache, check_holds, rounding

pytestmark = pytest.mark.property


def assert_near(output, expected):
    assert output.shape == expected.shape
    torch.testing.assert_close(output.double(), expected, **rounding(output.dtype))


def new_tokens(generator, model, layer, batch, tokens):
    """Random k, v and q [batch, heads, tokens, dim] of a layer."""
    heads = [(layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim), (layer.query_heads, layer.key_dim)]
    return [torch.randn(batch, n, tokens, dim, generator=generator).to(model.dtype) for n, dim in heads]


@attrs.frozen
class Case:
    """A composition, and all tokens that it is given: positions [batch, tokens] and the k, v, q of each layer."""

    model: pikv.ModelConfig
    runtime: pikv.RuntimeConfig
    positions: torch.Tensor
    states: list = attrs.field(repr=False)

    @property
    def tokens(self):
        return self.positions.shape[1]

    def cache(self):
        return pikv.PiKVCache(self.model, self.runtime)

    def chunks(self, sizes):
        """The tokens in chunks: layer, positions, k, v, q."""
        for chunk in torch.arange(self.tokens).split(sizes):
            for layer_id, states in enumerate(self.states):
                yield layer_id, self.positions[:, chunk], *(tensor[:, :, chunk] for tensor in states)

    def sequence(self, number):
        """The same with one sequence alone."""
        one = slice(number, number + 1)
        states = [[tensor[one] for tensor in layer] for layer in self.states]
        return attrs.evolve(self, positions=self.positions[one], states=states)


@st.composite
def cases(draw, *, max_batch=3, max_tokens=180, **settings):
    model = draw(some.model_configs(**settings))
    batch, tokens = draw(st.integers(1, max_batch)), draw(st.integers(0, max_tokens))
    positions, generator = draw(some.positions(batch, tokens)), draw(some.generators())
    states = [new_tokens(generator, model, layer, batch, tokens) for layer in model.layers]
    return Case(model, draw(some.runtime_configs()), positions, states)


def outputs(case, sizes):
    """What attend gives in each layer for tokens that come in chunks of these sizes, joined."""
    cache, given_back = case.cache(), [[] for _ in case.states]
    for layer_id, positions, k, v, q in case.chunks(sizes):
        cache.update(layer_id, positions, k, v)
        given_back[layer_id].append(cache.attend(layer_id, q))
    return [torch.cat(chunks, dim=2) for chunks in given_back]


def check(case, sizes):
    """Compare with attention in float64 after every chunk."""
    cache, plain = case.cache(), PlainCache(case.model)
    for layer_id, positions, k, v, q in case.chunks(sizes):
        cache.update(layer_id, positions, k, v)
        plain.update(layer_id, positions, k, v)
        assert_near(cache.attend(layer_id, q), plain.attend(layer_id, q, positions))


@given(case=cases(), data=st.data())
def test_attend_equals_float64_attention(case, data):
    """After each chunk, over shapes, dtypes, windows, softcaps, sink logits, scales, padding and jumps."""
    check(case, data.draw(some.chunkings(case.tokens)))


@given(case=cases(max_batch=2, max_tokens=100), data=st.data())
def test_decoding_equals_float64_attention(case, data):
    """A prompt, then one token at a time past several seals."""
    prompt = data.draw(st.integers(0, case.tokens))
    check(case, [prompt, *[1] * (case.tokens - prompt)])


@given(case=cases(), data=st.data())
def test_retrieve_gives_back_what_was_put_in(case, data):
    """Bit for bit, whether or not attend was called in between."""
    cache, plain = case.cache(), PlainCache(case.model)
    for layer_id, positions, k, v, q in case.chunks(data.draw(some.chunkings(case.tokens))):
        cache.update(layer_id, positions, k, v)
        plain.update(layer_id, positions, k, v)
        if data.draw(st.booleans()):
            cache.attend(layer_id, q)
        check_holds(cache, plain)


@given(case=cases(max_batch=2, max_tokens=80, dtypes=(torch.float32,)))
def test_one_token_at_a_time_equals_one_chunk(case):
    """The outputs are within 1e-5 of each other."""
    slow, fast = outputs(case, [1] * case.tokens or [0]), outputs(case, [case.tokens])
    for output, expected in zip(slow, fast, strict=True):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@given(case=cases(max_tokens=120), data=st.data())
def test_the_block_sizes_do_not_matter(case, data):
    """Pages and queries that take several blocks are attended to as in one."""
    with patch.object(torch_attend, "BLOCK_TOKENS", 40), patch.object(reading, "SCORES_AT_ONCE", 300):
        check(case, data.draw(some.chunkings(case.tokens)))


@given(case=cases(max_batch=4, max_tokens=100), data=st.data())
def test_a_batch_answers_as_its_sequences_alone(case, data):
    """Whatever the neighbours' lengths and padding."""
    sizes = data.draw(some.chunkings(case.tokens))
    together = outputs(case, sizes)
    for number in range(len(case.positions)):
        for output, expected in zip(together, outputs(case.sequence(number), sizes), strict=True):
            torch.testing.assert_close(output[number : number + 1], expected, **rounding(output.dtype))


@given(case=cases(max_batch=1, max_tokens=40))
def test_a_token_may_come_without_batch_and_length(case):
    """Keys and values [kv_heads, dim] are one token of one sequence, at a position given as a number."""
    cache, plain = case.cache(), PlainCache(case.model)
    for layer_id, positions, k, v, q in case.chunks([1] * case.tokens or [0]):
        if positions.numel() and positions.item() >= 0:
            cache.update(layer_id, positions.item(), k[0, :, 0], v[0, :, 0])
            plain.update(layer_id, positions, k, v)
            assert_near(cache.attend(layer_id, q), plain.attend(layer_id, q, positions))


@given(
    layer=some.layer_configs(), generator=some.generators(), parts=st.lists(st.integers(0, 9), min_size=1, max_size=4)
)
def test_merged_parts_equal_the_whole(layer, generator, parts):
    """Attention over disjoint parts, empty ones among them, merged by log-sum-exp, is attention over all tokens."""
    keys, values, query = (
        torch.randn(2, n, dim, generator=generator)
        for n, dim in [(sum(parts), layer.key_dim), (sum(parts), layer.value_dim), (3, layer.key_dim)]
    )
    settings = {"scale": layer.scale, "softcap": layer.softcap}
    whole = attention.attend(query.double(), keys.double(), values.double(), **settings)
    split = zip(keys.split(parts, dim=1), values.split(parts, dim=1), strict=True)
    merged = attention.merge([attention.attend(query, *part, **settings) for part in split])
    torch.testing.assert_close(merged.output.double(), whole.output, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged.log_sum_exp.double(), whole.log_sum_exp, atol=1e-5, rtol=0)
