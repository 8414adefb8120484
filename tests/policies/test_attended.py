"""Selectors that remember attention: sums while decoding, and the second pass over a prompt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv import ConfigError, StateError
from pikv.core.attended import Attended
from pikv.policies import AdaKV, HeavyHitters, KeyDiff, KVzip, Recent
from pikv.testing.requests import StoredTokens, stored_tokens
from pikv.testing.token_selector import AttendedTokenSelectorConformance

pytestmark = pytest.mark.property
MODEL = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8)
SETTINGS = {"page_size": 16, "tail_tokens": 16}


def attention(stored: StoredTokens) -> torch.Tensor:
    """[sequences, kv_heads, queries of the group, tokens], one by one."""
    group, scale = stored.layer.group, stored.layer.scale
    out = torch.zeros(*stored.positions.shape[:2], group * stored.queries.shape[2], stored.positions.shape[2])
    for s, h, w in torch.cartesian_prod(*map(torch.arange, (len(out), stored.queries.shape[1], stored.asked.shape[1]))):
        row = stored.positions[s, h // group]
        seen = (row >= 0) & (row <= stored.asked[s, w])
        logits = stored.keys[s, h // group, seen] @ stored.queries[s, h, w] * scale
        out[s, h // group, (h % group) * stored.asked.shape[1] + w, seen] = logits.softmax(-1)
    return out


class TestHeavyHitters(AttendedTokenSelectorConformance):
    def make(self) -> HeavyHitters:
        return HeavyHitters()

    @given(stored=stored_tokens(3))
    def test_it_sums_attention(self, stored: StoredTokens):
        """What was remembered, and a_ij of the new queries i of the group's heads."""
        expected = stored.attended + attention(stored).sum(2)
        got = HeavyHitters().fold(stored.view())
        torch.testing.assert_close(got[stored.present], expected[stored.present])


class TestKVzip(AttendedTokenSelectorConformance):
    def make(self) -> KVzip:
        return KVzip()

    @given(stored=stored_tokens(3))
    def test_it_is_the_greatest_attention(self, stored: StoredTokens):
        """Over the queries of the group's heads and what was remembered."""
        expected = stored.attended.maximum(attention(stored).amax(2))
        got = KVzip().fold(stored.view())
        torch.testing.assert_close(got[stored.present], expected[stored.present])


@given(data=st.data())
def test_what_is_remembered_is_found_by_position(data):
    """A dict of positions and weights says the same, after selections, joins and crops too."""

    def part(rows: int) -> tuple[Attended, list[list[dict[int, float]]]]:
        held = [
            [data.draw(st.dictionaries(st.integers(0, 9), st.integers(1, 5))) for _ in range(2)] for _ in range(rows)
        ]
        width = max(len(row) for rows_ in held for row in rows_)
        positions = torch.full((rows, 2, width), -1)
        weights = torch.zeros(rows, 2, width)
        for i, j in ((i, j) for i in range(rows) for j in range(2)):
            for place, position in enumerate(sorted(held[i][j])):
                positions[i, j, place], weights[i, j, place] = position, held[i][j][position]
        return Attended.of(positions, weights), held

    (one, held_one), (two, held_two) = part(2), part(1)
    joined, held = Attended.joined([one, two]), held_one + held_two
    index = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    end = [data.draw(st.integers(0, 10)) for _ in index]
    got = joined.select(torch.tensor(index)).cropped(torch.tensor(end))
    asked = torch.tensor([0, 3, 4, 9, -1]).expand(len(index), 2, -1)
    expected = [
        [[held[i][j].get(p, 0) if p < last else 0 for p in (0, 3, 4, 9, -1)] for j in range(2)]
        for i, last in zip(index, end, strict=True)
    ]
    assert got.at(asked).tolist() == expected


def step(cache: pikv.PiKVCache, first: int, states: torch.Tensor, queries: torch.Tensor) -> None:
    cache.update(0, first, states, states)
    cache.attend(0, queries)


def positions(cache: pikv.PiKVCache, head: int = 0) -> list[int]:
    held = cache.retrieve(0)
    return held.positions[0, head][held.mask[0, head]].tolist()


def test_heavy_hitters_of_a_prompt_and_of_decoding_stay():
    """Tokens 30 and 70 get attention from early queries, and stay when later ones look elsewhere."""
    cache = pikv.compose(MODEL, token_selector=HeavyHitters(recent=8), budget_tokens=48, **SETTINGS)
    states = torch.zeros(1, 2, 100, 8)
    states[:, :, [30, 70]] = 5
    step(cache, 0, states, torch.ones(1, 4, 100, 8))
    nothing = torch.zeros(1, 2, 1, 8)
    for position in range(100, 160):
        step(cache, position, nothing, torch.ones(1, 4, 1, 8) * (-1 if position > 110 else 1))
    assert {30, 70} <= set(positions(cache))
    assert len(positions(cache)) <= 48
    assert cache.stored_bytes().tail > 0


def test_sums_go_on_through_forks_joins_and_crops():
    """A cache that was forked, joined with itself, reordered and cropped keeps what one that was not keeps."""
    generator = torch.Generator().manual_seed(0)
    prompt, more = torch.randn(1, 2, 90, 8, generator=generator), torch.randn(1, 2, 60, 8, generator=generator)
    queries = torch.randn(1, 4, 150, 8, generator=generator)

    def started() -> pikv.PiKVCache:
        cache = pikv.compose(MODEL, token_selector=HeavyHitters(recent=8), budget_tokens=48, **SETTINGS)
        step(cache, 0, prompt, queries[:, :, :90])
        return cache

    plain, moved = started(), started().fork()
    moved.join(moved)
    moved.reorder([1])
    step(moved, 90, more[:, :, :5], queries[:, :, 140:145])
    moved.crop(90)
    for i in range(60):
        for cache in (plain, moved):
            step(cache, 90 + i, more[:, :, i : i + 1], queries[:, :, 90 + i : 91 + i])
    assert positions(moved) == positions(plain)


def rehearsed(cache: pikv.PiKVCache, wanted: list[int]) -> None:
    """A prompt of 100 tokens, told apart by their keys, of which the second pass looks at some."""
    keys = torch.zeros(1, 2, 100, 8)
    keys[0, :, :, 0], keys[0, :, :, 1] = torch.arange(100).cos(), torch.arange(100).sin()
    cache.update(0, 0, keys, keys)
    cache.attend(0, torch.ones(1, 4, 100, 8))
    with cache.rehearsal():
        for start in range(0, len(wanted), 2):  # tokens of a second pass come in chunks or one by one
            asked = keys[:, :1, wanted[start : start + 2]].expand(-1, 4, -1, -1) * 200
            cache.update(0, 100 + start, torch.zeros(1, 2, asked.shape[2], 8), torch.zeros(1, 2, asked.shape[2], 8))
            cache.attend(0, asked)


def test_a_second_pass_says_what_stays():
    """Nothing leaves before it, its own tokens are forgotten, and what it looked at stays, as sinks do."""
    cache = pikv.compose(MODEL, token_selector=KVzip(recent=8), budget_tokens=36, **SETTINGS)
    wanted = [20, 33, 50, 61, 77]
    rehearsed(cache, wanted)
    assert positions(cache) == list(range(100))
    cache.finish_prefill()
    assert {0, 1, 2, 3, *wanted, *range(92, 100)} <= set(positions(cache))
    assert len(positions(cache)) == 32 + 4
    for position in range(100, 140):
        step(cache, position, torch.zeros(1, 2, 1, 8), torch.zeros(1, 4, 1, 8))
    assert len(positions(cache)) <= 36


def test_without_a_second_pass_the_prompt_is_not_cut():
    """The first decoded token says what is missing, and the prompt is as it was."""
    cache = pikv.compose(MODEL, token_selector=KVzip(), budget_tokens=64, tail_tokens=32, page_size=16)
    states = torch.zeros(1, 2, 100, 8)
    step(cache, 0, states, torch.zeros(1, 4, 100, 8))
    with pytest.raises(StateError, match=r"within cache\.rehearsal"):
        cache.update(0, 100, states[:, :, :1], states[:, :, :1])
    assert positions(cache) == list(range(100))


def test_sums_of_nothing_are_refused():
    """A host that does not attend is told so."""
    cache = pikv.compose(MODEL, token_selector=HeavyHitters(), budget_tokens=96, tail_tokens=64, page_size=16)
    states = torch.zeros(1, 2, 100, 8)
    cache.update(0, 0, states, states)
    with pytest.raises(StateError, match="call attend"):
        cache.update(0, 100, states[:, :, :1], states[:, :, :1])


def test_a_rehearsal_has_its_place():
    """Between a prompt and the answer, and with a selector that wants one."""
    with pytest.raises(StateError, match="KVzip"), pikv.PiKVCache(MODEL).rehearsal():
        pass
    cache = pikv.compose(MODEL, token_selector=KVzip(), budget_tokens=64, tail_tokens=32, page_size=16)
    with pytest.raises(StateError, match="after a prompt"), cache.rehearsal():
        pass


def test_compositions_that_cannot_work_are_refused():
    """Two that remember in different ways; a second pass over what a window has let go."""
    with pytest.raises(ConfigError, match="both remember"):
        pikv.compose(MODEL, allocator=AdaKV(scored_by=KVzip()), token_selector=HeavyHitters(), budget_tokens=256)
    sliding = pikv.ModelConfig(layers=1, query_heads=4, kv_heads=2, head_dim=8, window=64)
    with pytest.raises(ConfigError, match="sliding window"):
        pikv.compose(sliding, token_selector=KVzip(), budget_tokens=256)


@pytest.mark.parametrize("own", [KVzip(recent=8), KeyDiff(recent=8), Recent()])
def test_heads_are_split_by_a_second_pass(own):
    """Whichever tokens stay, as many as attention says: head 0 was looked at, head 1 was not."""
    cache = pikv.compose(
        MODEL, allocator=AdaKV(scored_by=KVzip(recent=8)), token_selector=own, budget_tokens=80, **SETTINGS
    )
    keys = torch.zeros(1, 2, 200, 8)
    keys[0, :, :, 0], keys[0, :, :, 1] = torch.arange(200).cos(), torch.arange(200).sin()
    step(cache, 0, keys, torch.zeros(1, 4, 200, 8))
    with cache.rehearsal():
        asked = torch.zeros(1, 4, 60, 8)
        asked[:, :2] = keys[:, :1, 20:80] * 200
        step(cache, 200, torch.zeros(1, 2, 60, 8), asked)
    cache.finish_prefill()
    assert len(positions(cache, 0)) > len(positions(cache, 1))
    assert len(positions(cache, 0)) + len(positions(cache, 1)) == 160


def test_sums_of_equal_keys_are_harmonic():
    """Token j of three gets 1 / (i + 1) from each later query i, of two heads."""
    cache = pikv.compose(MODEL, token_selector=HeavyHitters(), budget_tokens=256)
    step(cache, 0, torch.zeros(1, 2, 3, 8), torch.zeros(1, 4, 3, 8))
    expected = torch.tensor([2 * (1 + 1 / 2 + 1 / 3), 2 * (1 / 2 + 1 / 3), 2 / 3])
    torch.testing.assert_close(cache.view(0).attended[0, 0], expected)
