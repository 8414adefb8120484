"""What is left of a damaged version, and how what is lost is filled in."""

from __future__ import annotations

import attrs
import pytest
import torch
from damage import flip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pikv
from pikv.adapters.compressors import Int8, LowRank
from pikv.adapters.zarr_store import ZarrStreamer
from pikv.core.host_tier import HostTier
from pikv.policies import EvictOldest, Quest, TokenRange
from pikv.testing.transport import run_ranks

MODEL = pikv.ModelConfig(layers=3, query_heads=4, kv_heads=2, head_dim=16)
TOKENS = 150


def runtime_of(folder, **parts):
    return pikv.RuntimeConfig(page_size=16, tail_tokens=32, streamer=ZarrStreamer(folder, segment_bytes=4096), **parts)


@attrs.frozen
class Texts:
    """Keys, values and queries by layer, [batch, heads, tokens, dim]: what a model would compute of its texts."""

    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, batch, tokens=TOKENS + 40):
        generator = torch.Generator().manual_seed(0)
        heads = (2, 2, 4)
        return cls(
            [
                tuple(torch.randn(batch, n, tokens, 16, generator=generator) for n in heads)
                for _ in range(len(MODEL.layers))
            ]
        )

    def read(self, cache, start, stop, *, sequences=slice(None)):
        """Give a cache the tokens from start up to stop; its answers."""
        answers = []
        for layer_id, states in enumerate(self.layers):
            k, v, q = (each[sequences, :, start:stop] for each in states)
            cache.update(layer_id, start, k, v)
            answers.append(cache.attend(layer_id, q))
        return answers

    def fill(self, salvage):
        """Fill all gaps; how many tokens were read."""
        read = 0
        while (gap := salvage.gap) is not None:
            part = salvage.before(gap)
            self.read(part, gap.first, gap.stop, sequences=[gap.sequence])
            salvage.fill(gap, part)
            read += gap.stop - gap.first
        return read


def committed(folder, texts, **parts):
    cache = pikv.PiKVCache(MODEL, runtime_of(folder, **parts))
    for start, stop in ((0, 70), (70, TOKENS)):
        texts.read(cache, start, stop)
    cache.commit()
    return cache


def check_goes_on_alike(cache, other, texts):
    for position in range(TOKENS, TOKENS + 40):
        for one, two in zip(
            texts.read(cache, position, position + 1), texts.read(other, position, position + 1), strict=True
        ):
            assert torch.equal(one, two)


PARTS = {
    "exact": {},
    "int8": {"compressor": Int8()},
    "quest": {"page_selector": Quest(pages=2, dense_layers=0)},
}


@pytest.mark.property
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.sampled_from(sorted(PARTS)),
    damaged=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1), st.integers(0, 6)), min_size=1),
)
def test_what_was_lost_is_filled_in(tmp_path_factory, parts, damaged):
    """Bit for bit, where keys and values are computed alike; few tokens are read; the next commit is whole."""
    folder, texts = tmp_path_factory.mktemp("store"), Texts.of(2)
    cache = committed(folder, texts, **PARTS[parts])
    for place in damaged:
        flip(folder, cache, *place)
    salvage = pikv.Salvage.of(MODEL, runtime_of(folder, **PARTS[parts]))
    assert {(each.layer_id, each.sequence, each.first // 16) for each in salvage.lost} == {
        (layer, sequence, page) for layer, sequence, _, page in damaged
    }
    assert texts.fill(salvage) <= 17 * len({(sequence, page) for _, sequence, _, page in damaged})
    restored = salvage.cache
    for layer_id in range(3):
        for name in ("keys", "values", "positions", "mask"):
            assert torch.equal(*(getattr(each.retrieve(layer_id), name) for each in (cache, restored)))
    del salvage
    check_goes_on_alike(cache, restored, texts)
    restored.pool.check_integrity()
    version = restored.commit()
    restored.runtime.streamer.check(version)
    assert restored.pool.used_bytes == restored.stored_bytes().pages


def test_pages_that_follow_one_another_are_one_gap(tmp_path):
    """Of all layers and heads; a whole version needs none."""
    texts = Texts.of(2)
    cache = committed(tmp_path, texts)
    assert pikv.Salvage.of(MODEL, runtime_of(tmp_path)).gap is None
    for place in ((0, 1, 0, 2), (2, 1, 1, 3), (1, 1, 0, 3), (0, 1, 0, 5), (0, 0, 0, 6)):
        flip(tmp_path, cache, *place)
    salvage = pikv.Salvage.of(MODEL, runtime_of(tmp_path), pikv.Version(1))
    gap = salvage.gap
    assert (gap.sequence, gap.first, gap.stop) == (0, 96, 113)
    with pytest.raises(pikv.StateError, match="5 pages are still lost"):
        _ = salvage.cache
    part = salvage.before(gap)
    with pytest.raises(pikv.InputError, match="give it all of the gap's"):
        salvage.fill(gap, part)
    texts.read(part, 96, 113, sequences=[0])
    salvage.fill(gap, part)
    assert (salvage.gap.sequence, salvage.gap.first, salvage.gap.stop) == (1, 32, 65)
    texts.fill(salvage)
    del part
    check_goes_on_alike(cache, salvage.cache, texts)


def test_with_tiers_and_another_selector(tmp_path):
    """Pages are filled in near or far, and indexed anew."""
    texts, quest = Texts.of(1), {"page_selector": Quest(pages=2, dense_layers=0)}
    cache = committed(tmp_path, texts)
    flip(tmp_path, cache, 1, 0, 1, 3)
    runtime = runtime_of(tmp_path, tiers=(HostTier(capacity_bytes=1 << 20),), **quest)
    pool = pikv.PagePool(MODEL, runtime, capacity_bytes=30 * runtime.form(MODEL, 0).stride)
    salvage = pikv.Salvage.of(MODEL, runtime, pool=pool, may_differ=["page_selector"])
    texts.fill(salvage)
    undamaged = committed(tmp_path / "other", texts, **quest)
    check_goes_on_alike(undamaged, salvage.cache, texts)
    pool.check_integrity()


def test_where_everything_must_be_read_again(tmp_path):
    """It is said why: tokens that left, a basis, or pages that a crop has cut."""
    texts = Texts.of(1)
    for name, parts in {"leave": {"when_full": EvictOldest()}, "basis": {"compressor": LowRank(rank=4)}}.items():
        cache = committed(tmp_path / name, texts, **parts)
        flip(tmp_path / name, cache, 0, 0, 0, 0)
        salvage = pikv.Salvage.of(MODEL, runtime_of(tmp_path / name, **parts))
        assert name in salvage.why_whole
        assert len(salvage.lost) == 1
        with pytest.raises(pikv.StateError, match="read all tokens again"):
            _ = salvage.gap
    cache = committed(tmp_path / "crop", texts)
    cache.crop(40)
    cache.commit()
    flip(tmp_path / "crop", cache, 0, 0, 0, 2)
    assert "cropped" in pikv.Salvage.of(MODEL, runtime_of(tmp_path / "crop")).why_whole
    cache.crop(32)
    cache.commit()
    flip(tmp_path / "crop", cache, 0, 0, 0, 1)
    assert "cropped" in pikv.Salvage.of(MODEL, runtime_of(tmp_path / "crop")).why_whole


def test_ranks_read_everything_again(tmp_path):
    """Each knows a part of the tokens alone."""
    texts = Texts.of(1)

    def why(transport):
        folder = tmp_path / str(transport.rank)
        parts = {"transport": transport, "sharding": TokenRange()}
        cache = committed(folder, texts, **parts)
        flip(folder, cache, 0, 0, 0, 0)
        return pikv.Salvage.of(MODEL, runtime_of(folder, **parts)).why_whole

    assert all("one of several" in each for each in run_ranks(2, why))


def test_a_damaged_document_leaves_nothing(tmp_path):
    """DamagedError, as of `restore`."""
    committed(tmp_path, Texts.of(1))
    (tmp_path / "manifests/000000000001").write_bytes(b"nothing")
    with pytest.raises(pikv.DamagedError, match="no version is undamaged"):
        pikv.Salvage.of(MODEL, runtime_of(tmp_path))
