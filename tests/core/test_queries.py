"""What a selector that looks at queries is shown, and that the queries go where their sequences go."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.core import views
from pikv.core.ports import QueryTokenSelector, TokenSelector
from pikv.core.views import TokenView
from pikv.policies import Importance, Recent, Uniform

MODEL = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8)
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randn(4, 8, 90, 8, generator=GENERATOR)  # of four sequences: k, v and q by heads


def compose(*, pool=None, model=MODEL, selector=None):
    runtime = pikv.RuntimeConfig(
        token_selector=Importance(window=4, sinks=2, recent=8) if selector is None else selector,
        allocator=Uniform(),
        budget_tokens=48,
        page_size=16,
        tail_tokens=16,
    )
    return pikv.PiKVCache(model, runtime, pool=pool)


def give(cache, sequences, start, stop):
    """Tokens start to stop of these of the four sequences."""
    k, v, q = TOKENS[sequences, :, start:stop].split([2, 2, 4], dim=1)
    cache.update(0, start, k, v)
    cache.attend(0, q)
    return cache


def decode(cache, sequences, stop=90):
    """From token 40 on, one at a time."""
    for position in range(40, stop):
        give(cache, sequences, position, position + 1)
    return cache


def check_as_alone(cache, sequences):
    """Each sequence has kept what it keeps in a cache of its own."""
    for row, number in enumerate(sequences):
        alone = decode(give(compose(), [number], 0, 40), [number]).retrieve(0)
        assert torch.equal(cache.retrieve(0).positions[row], alone.positions[0])


def test_a_fork_has_queries_of_its_own():
    """Both go on as one cache would have."""
    cache = give(compose(), [0, 1], 0, 40)
    fork = cache.fork()
    check_as_alone(decode(cache, [0, 1]), [0, 1])
    check_as_alone(decode(fork, [0, 1]), [0, 1])


def test_queries_are_reordered_with_their_sequences():
    """And dropped with them."""
    cache = give(compose(), [0, 1, 2], 0, 40)
    cache.reorder([2, 0, 2, 1])
    cache.drop([0])
    check_as_alone(decode(cache, [0, 2, 1]), [0, 2, 1])


def test_queries_join_with_their_sequences():
    """In the order of the sequences."""
    cache = give(compose(), [0, 1], 0, 40)
    cache.join(give(compose(pool=cache.pool), [2], 0, 40))
    check_as_alone(decode(cache, [0, 1, 2]), [0, 1, 2])


def test_a_cache_that_was_not_asked_may_join():
    """Its sequences have no queries yet; those of the others stay."""
    cache = give(compose(), [0], 0, 40)
    other = compose(pool=cache.pool)
    k, v, _ = TOKENS[[1, 2], :, :40].split([2, 2, 4], dim=1)
    other.update(0, 0, k, v)
    cache.join(other)
    decode(cache, [0, 1, 2])
    alone = decode(give(compose(), [0], 0, 40), [0]).retrieve(0)
    assert torch.equal(cache.retrieve(0).positions[0], alone.positions[0])


def test_queries_are_cropped_with_their_tokens():
    """A sequence that goes back asks again, and keeps what it would have kept."""
    cache = give(compose(), [0, 1], 0, 40)
    for position in (40, 41):
        cache.update(0, position, *torch.ones(2, 2, 2, 1, 8))
        cache.attend(0, torch.ones(2, 4, 1, 8))
    cache.crop(40)
    decode(cache, [0, 1], stop=44)
    straight = decode(give(compose(), [0, 1], 0, 40), [0, 1], stop=44)
    assert torch.equal(cache.retrieve(0).positions, straight.retrieve(0).positions)
    check_as_alone(decode_from(cache, 44), [0, 1])


def decode_from(cache, start):
    for position in range(start, 90):
        give(cache, [0, 1], position, position + 1)
    return cache


def test_padding_asks_nothing():
    """A sequence that is padded on the left keeps what it keeps without the padding."""
    cache = compose()
    padded = torch.cat([torch.zeros(1, 8, 5, 8), TOKENS[:1, :, :40]], dim=2)
    for each in padded.split([3, 42], dim=2):
        k, v, q = each.split([2, 2, 4], dim=1)
        positions = torch.arange(-5, 40)[None, :3] if each.shape[2] == 3 else torch.arange(-5, 40)[None, 3:]
        cache.update(0, positions.clamp(min=-1), k, v)
        cache.attend(0, q)
    check_as_alone(decode(cache, [0]), [0])


def test_queries_are_stored_bytes():
    """They count as part of the tail."""
    cache, without = compose(), compose(selector=Recent())
    for each in (cache, without):
        give(each, [0], 0, 5)
    assert cache.stored_bytes().tail - without.stored_bytes().tail == 4 * (4 * 8 * 4 + 8)  # window, heads, dim, bytes


@attrs.frozen(kw_only=True)
class Curious(QueryTokenSelector):
    """Keeps the newest, and looks at everything that it is shown."""

    window: int = 3
    sinks: int = 0
    recent: int = 0
    seen: list = attrs.field(factory=list)

    def score(self, view):
        shown = view.attention(), view.queries, view.asked, view.keys, view.values, view.positions.long()
        self.seen.append([tensor.clone() for tensor in shown])  # the cache goes on to change its tail
        return view.positions


@pytest.mark.parametrize("window", [None, 10])
def test_a_selector_is_shown_the_newest_queries_and_their_attention(window):
    """The queries and positions of the last `window` tokens, and their softmax over what is stored, causal."""
    model = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8, window=window)
    selector = Curious()
    cache = give(compose(model=model, selector=selector), [0, 1], 0, 60)
    give(cache, [0, 1], 60, 64)
    cache.update(0, 64, *TOKENS[:2, :4, 64:65].split(2, dim=1))
    cache.attend(0, TOKENS[:2, 4:, 64:65])
    weights, queries, asked, keys, values, positions = selector.seen[-1]
    newest = asked[0].tolist()
    assert asked.tolist() == [list(range(newest[0], newest[0] + 3))] * 2
    assert newest[-1] == 64 or window is not None
    assert torch.equal(queries, TOKENS[:2, 4:, newest])
    there = positions[0, 0] >= 0
    assert torch.equal(keys[..., there, :], TOKENS[:2, :2, positions[0, 0, there]])
    assert torch.equal(values[..., there, :], TOKENS[:2, 2:4, positions[0, 0, there]])
    scores = queries.double().unflatten(1, (2, 2)) @ keys.double()[:, :, None].mT * 8**-0.5
    held, at = positions[:, :, None, None], asked[:, None, None, :, None]
    visible = (held >= 0) & (held <= at) & (held > at - (window or 1000))
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=0)


@attrs.frozen(kw_only=True)
class Greedy(TokenSelector):
    """Asks for an attention that it did not say it needs."""

    sinks: int = 0
    recent: int = 0

    def score(self, view):
        return view.attention().sum((2, 3))


def test_a_selector_that_asked_for_no_queries_is_shown_none():
    """StateError says what to derive from."""
    cache = compose(selector=Greedy())
    with pytest.raises(pikv.StateError, match="derive from it and give it a window"):
        give(cache, [0], 0, 60)


def test_a_selector_that_looks_at_queries_needs_attend():
    """StateError where a host only stores; nothing is evicted, and the cache is as before."""
    cache = compose()
    cache.update(0, 0, *TOKENS[:1, :4, :60].split(2, dim=1))
    before = cache.stored_bytes()
    with pytest.raises(pikv.StateError, match="the last update was not followed by attend; call attend, or compose"):
        cache.update(0, 60, *TOKENS[:1, :4, 60:61].split(2, dim=1))
    assert cache.stored_bytes() == before
    assert cache.retrieve(0).positions[0, 0].tolist() == list(range(60))


@pytest.mark.property
@given(st.data())
def test_the_mass_of_tokens_is_the_sum_of_attention(data):
    """Whatever the blocks that it is summed up in: causal, in windows, softcapped, over rows of any length."""
    sequences, kv_heads, group, window, tokens = (data.draw(st.integers(1, most)) for most in (2, 2, 3, 4, 40))
    layer = pikv.LayerConfig(
        query_heads=kv_heads * group,
        kv_heads=kv_heads,
        key_dim=8,
        value_dim=8,
        window=data.draw(st.none() | st.integers(1, 30)),
        softcap=data.draw(st.none() | st.just(2.0)),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    states = torch.randn(2, sequences, kv_heads, tokens, 8, generator=generator)
    lengths = torch.randint(0, tokens + 1, (sequences, kv_heads, 1), generator=generator)
    positions = torch.arange(tokens, dtype=torch.int32).expand(sequences, kv_heads, -1)
    view = TokenView(
        layer_id=0,
        layer=layer,
        positions=positions.masked_fill(positions >= lengths, -1),
        queries=3 * torch.randn(sequences, kv_heads * group, window, 8, generator=generator),
        asked=torch.randint(-1, tokens + 3, (sequences, window), generator=generator),
        decode=lambda: (states[0], states[1]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "SCORES_AT_ONCE", data.draw(st.sampled_from([1, 50, 1000])))
        torch.testing.assert_close(view.mass(), view.attention().sum((2, 3)), atol=1e-5, rtol=1e-5)


def test_the_mass_of_no_tokens_is_empty():
    """A view may have no tokens at all."""
    layer = pikv.LayerConfig(query_heads=2, kv_heads=1, key_dim=8, value_dim=8)
    nothing = torch.empty(1, 1, 0, 8)
    view = TokenView(
        layer_id=0,
        layer=layer,
        positions=torch.empty(1, 1, 0, dtype=torch.int32),
        queries=torch.randn(1, 2, 3, 8),
        asked=torch.arange(3)[None],
        decode=lambda: (nothing, nothing),
    )
    assert view.mass().shape == (1, 1, 0)


def test_a_position_may_be_counted_up_in_place():
    """What the caller does with its tensor of positions afterwards is not seen."""
    cache = pikv.PiKVCache(pikv.ModelConfig(layers=1, query_heads=1, kv_heads=1, head_dim=8))
    position, states = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, 8)
    for _ in range(3):
        cache.update(0, position, states, states)
        position += 1
    assert cache.retrieve(0).positions.flatten().tolist() == [0, 1, 2]
