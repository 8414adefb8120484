"""The facts that every Streamer must hold to, as tests to inherit.

class TestMine(StreamerConformance):
    def open(self) -> Streamer:
        return Mine(self.place)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pikv.core.errors import DamagedError, InputError, PageLostError, PiKVError, StateError, VersionError
from pikv.core.ports import Manifest, Streamer, Version
from pikv.testing.memory_tier import PAGE_BYTES, assert_raises, numbers, pages_of
from pikv.testing.policy import assert_equal, inherited

FACTS = {"text": "ä", "number": 7, "none": None, "list": [1.5, True, {"deep": "er"}]}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


def some_states() -> dict[str, Tensor]:
    """Tensors of all types that a cache has, of many shapes, NaN among the numbers."""
    states = {f"{dtype}": torch.arange(5).reshape(1, 5).to(dtype) for dtype in _DTYPES}
    states |= {"none": torch.empty(3, 0, 2), "one": torch.tensor(-0.0), "nan": torch.tensor([torch.nan, torch.inf])}
    states["strided"] = torch.arange(12).reshape(3, 4).t()[::2]
    return states


def manifest_of(*keys: int, page_bytes: int = PAGE_BYTES, states: Mapping[str, Tensor] | None = None) -> Manifest:
    """A manifest that names pages of one length."""
    return Manifest(facts=FACTS, states=some_states() if states is None else states, pages={page_bytes: numbers(*keys)})


def check_pages(streamer: Streamer, version: Version, *keys: int) -> None:
    """Raise AssertionError unless the pages of these keys are as they were appended."""
    out = torch.zeros(len(keys), PAGE_BYTES, dtype=torch.uint8)
    streamer.read(version, numbers(*keys), out).wait()
    assert_equal(out, pages_of(numbers(*keys)), f"pages {keys} of version {version}")


def check_manifest(got: Manifest, expected: Manifest) -> None:
    """Raise AssertionError unless both say the same, bit by bit."""
    assert got.facts == expected.facts, f"facts {got.facts}, expected {expected.facts}"
    assert list(got.states) == list(expected.states), f"states {list(got.states)}, expected {list(expected.states)}"
    for name, state in expected.states.items():
        assert_equal(got.states[name], state, f"state {name!r}")
    wanted = {length: keys.tolist() for length, keys in expected.pages.items()}
    assert {length: keys.tolist() for length, keys in got.pages.items()} == wanted


class StreamerConformance:
    """Inherit, and say what `open` opens: each time another streamer, on a store that a test has to itself.

    Say also, for the tests of damage, how to look at what is stored without the streamer: `objects` returns all of it
    by name, `put` replaces an object, or deletes it by None.
    """

    def open(self) -> Streamer:
        """Open the store of this test, which is empty at first."""
        raise NotImplementedError("open: return a streamer on the test's own store")

    def objects(self) -> dict[str, bytes]:
        """All that is stored, by name."""
        raise NotImplementedError("objects: return what is stored, by name")

    def put(self, name: str, states: bytes | None) -> None:
        """Replace what is stored under a name, or delete it."""
        raise NotImplementedError("put: replace or delete what is stored under a name")

    def clear(self) -> None:
        """Delete everything, between the examples of one test."""
        for name in self.objects():
            self.put(name, None)

    @contextlib.contextmanager
    def committed(self, *batches: tuple[int, ...]) -> Iterator[tuple[Streamer, list[Version]]]:
        """A streamer, and a version for each batch of new pages, which also has all pages before."""
        with self.open() as streamer:
            versions, keys = [], []
            for batch in batches:
                streamer.append(numbers(*batch), pages_of(numbers(*batch))).wait()
                keys += batch
                versions.append(streamer.commit(manifest_of(*keys)))
            yield streamer, versions

    @inherited
    @given(data=st.data())
    def test_it_equals_a_list_of_versions(self, data: st.DataObject) -> None:
        """Whatever is appended and committed, by streamers that come and go."""
        self.clear()
        plain: dict[Version, list[int]] = {}
        streamer = self.open()
        for _ in range(data.draw(st.integers(1, 6))):
            drawn = numbers(*data.draw(st.lists(st.integers(0, 40), unique=True, max_size=6)))
            new = drawn[~streamer.holds(drawn)]
            streamer.append(new, pages_of(new)).wait()
            held = torch.arange(41)[streamer.holds(torch.arange(41))].tolist()
            assert set(drawn.tolist()) <= set(held), f"{drawn.tolist()} were appended, {held} are held"
            keys = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
            plain[streamer.commit(manifest_of(*keys, states={"n": torch.tensor(len(keys))}))] = keys
            if data.draw(st.booleans()):
                streamer.close()
                streamer = self.open()
            assert streamer.versions() == sorted(plain), f"{streamer.versions()}, expected {sorted(plain)}"
            for version, keys in plain.items():
                assert streamer.manifest(version).pages[PAGE_BYTES].tolist() == keys
                check_pages(streamer, version, *data.draw(st.permutations(keys)))
                streamer.check(version)
        streamer.close()

    def test_a_manifest_comes_back(self) -> None:
        """Facts, and states of all types and shapes, bit by bit; in another streamer too, which may have no pages."""
        with self.open() as streamer:
            version = streamer.commit(manifest_of())
            check_manifest(streamer.manifest(version), manifest_of())
        with self.open() as streamer:
            check_manifest(streamer.manifest(), manifest_of())

    def test_older_versions_stay_as_they_are(self) -> None:
        """With their own pages and no others; the newest is what one gets unasked."""
        with self.committed((1, 2), (3,), (4, 5)) as (streamer, versions):
            assert versions == sorted(set(versions)), f"versions {versions} are not in order"
            assert streamer.versions() == versions
            for version, keys in zip(versions, ((1, 2), (1, 2, 3), (1, 2, 3, 4, 5)), strict=True):
                check_manifest(streamer.manifest(version), manifest_of(*keys))
                check_pages(streamer, version, *reversed(keys))
            assert streamer.manifest().pages[PAGE_BYTES].tolist() == [1, 2, 3, 4, 5]
            out = torch.zeros(1, PAGE_BYTES, dtype=torch.uint8)
            assert_raises(PageLostError, lambda: streamer.read(versions[0], numbers(3), out).wait(), "a later page")

    def test_pages_are_appended_once(self) -> None:
        """InputError for a key that is held, comes twice or is negative; after it the store is as it was."""
        with self.committed((1, 2)) as (streamer, (version,)):
            assert streamer.holds(numbers(2, 3, 1)).tolist() == [True, False, True]
            for keys in (numbers(3, 1), numbers(4, 4), numbers(-1)):
                other = torch.zeros(len(keys), PAGE_BYTES, dtype=torch.uint8)
                assert_raises(InputError, lambda: streamer.append(keys, other).wait(), f"keys {keys.tolist()}")  # noqa: B023  # called at once
            assert streamer.holds(numbers(3, 4)).tolist() == [False, False]
            check_pages(streamer, version, 2, 1)

    def test_pages_may_change_once_the_ticket_is_done(self) -> None:
        """The streamer then has its own."""
        with self.open() as streamer:
            pages = pages_of(numbers(1, 2))
            streamer.append(numbers(1, 2), pages).wait()
            pages.zero_()
            check_pages(streamer, streamer.commit(manifest_of(1, 2)), 1, 2)

    def test_a_page_that_was_not_appended_is_named(self) -> None:
        """PageLostError with the key, from commit and from read; no version is made."""
        with self.committed((1, 2)) as (streamer, versions):
            error = assert_raises(PageLostError, lambda: streamer.commit(manifest_of(1, 777)), "commit")
            assert "777" in str(error), f"the error does not name key 777: {error}"
            out = torch.zeros(1, 64, dtype=torch.uint8)
            assert_raises(PageLostError, lambda: streamer.commit(manifest_of(1, page_bytes=64)), "another length")
            assert_raises(PageLostError, lambda: streamer.read(versions[0], numbers(1), out).wait(), "another length")
            assert streamer.versions() == versions

    def test_what_was_not_committed_is_in_no_version(self) -> None:
        """Pages that were appended are gone with the streamer, and can be appended again."""
        with self.committed((1,)) as (streamer, versions):
            streamer.append(numbers(2), pages_of(numbers(2)))
        with self.open() as streamer:
            assert streamer.versions() == versions
            streamer.manifest()
            assert streamer.holds(numbers(1, 2)).tolist() == [True, False]
            streamer.append(numbers(2), pages_of(numbers(2)))
            check_pages(streamer, streamer.commit(manifest_of(1, 2)), 1, 2)

    def test_two_streamers_on_a_store_lose_nothing(self) -> None:
        """Both commit; all versions are there, and each is as it was committed."""
        with self.open() as one, self.open() as other:
            made = {}
            for first, streamer in enumerate((one, other, other, one)):
                streamer.append(numbers(first), pages_of(numbers(first)))
                made[streamer.commit(manifest_of(first))] = first
            assert len(made) == 4, f"versions {sorted(made)} for four commits"
            for streamer in (one, other):
                assert streamer.versions() == sorted(made)
                for version, key in made.items():
                    check_pages(streamer, version, key)

    def test_a_version_that_is_not_there_is_refused(self) -> None:
        """VersionError; also for the newest of none."""
        with self.open() as streamer:
            assert_raises(VersionError, streamer.manifest, "the newest of none")
            assert streamer.newest_good() is None
            streamer.commit(manifest_of())
            assert_raises(VersionError, lambda: streamer.manifest(Version(99)), "version 99")
            assert_raises(VersionError, lambda: streamer.check(Version(99)), "version 99")

    def test_no_damage_goes_unnoticed(self) -> None:
        """With any object of the store cut, gone or with a bit changed, all that is read is right, or DamagedError."""
        with self.committed((1, 2), (3,)) as (_, versions):
            pass
        for name, states in self.objects().items():
            for damaged in (None, states[: len(states) // 2], _flipped(states), states[:-1] + b"?"):
                self.put(name, damaged)
                self._check_noticed(name, versions)
            self.put(name, states)
        with self.open() as streamer:
            for version in versions:
                streamer.check(version)

    def _check_noticed(self, name: str, versions: list[Version]) -> None:
        try:
            streamer = self.open()
        except PiKVError:
            return
        with streamer:
            for version in streamer.versions():
                keys = (1, 2, 3)[: 1 + versions.index(version) + 1]
                good = _survives(lambda: streamer.check(version))  # noqa: B023  # called at once
                reads = _survives(lambda: check_manifest(streamer.manifest(version), manifest_of(*keys)))  # noqa: B023  # called at once
                reads &= _survives(lambda: check_pages(streamer, version, *keys))  # noqa: B023  # called at once
                assert good == reads, f"{name} is damaged: version {version} checks {good}, and reads {reads}"
                if not good:
                    newest = streamer.newest_good()
                    assert newest is None or _survives(lambda: streamer.check(newest))  # noqa: B023  # called at once

    def test_damaged_pages_are_named(self) -> None:
        """All of them, by key, and no others; the others come back right."""
        with self.committed((1,), (2, 3)) as (_, versions):
            pass
        for name, states in self.objects().items():
            at = states.find(bytes(pages_of(numbers(3))[0].tolist()))
            if at >= 0:
                self.put(name, states[:at] + _flipped(states[at:]))
        with self.open() as streamer:
            out = torch.zeros(3, PAGE_BYTES, dtype=torch.uint8)
            error = assert_raises(
                DamagedError, lambda: streamer.read(versions[1], numbers(1, 3, 2), out).wait(), "page 3 is damaged"
            )
            assert getattr(error, "keys", None) == (3,), f"the error names {getattr(error, 'keys', None)}, not page 3"
            assert_equal(out[[0, 2]], pages_of(numbers(1, 2)), "the other pages")
            assert_raises(DamagedError, lambda: streamer.check(versions[1]), "check")
            assert streamer.newest_good() == versions[0]

    def test_a_closed_streamer_does_no_more(self) -> None:
        """StateError from everything but another close."""
        with self.committed((1,)) as (streamer, versions):
            pages = pages_of(numbers(1))
        streamer.close()
        for operation in (
            lambda: streamer.append(numbers(2), pages),
            lambda: streamer.holds(numbers(1)),
            lambda: streamer.commit(manifest_of()),
            streamer.versions,
            streamer.manifest,
            lambda: streamer.read(versions[0], numbers(1), pages),
            lambda: streamer.check(versions[0]),
        ):
            assert_raises(StateError, operation, "after close")


def _flipped(states: bytes) -> bytes:
    """The same with one bit changed in the middle."""
    middle = len(states) // 2
    return states[:middle] + bytes([states[middle] ^ 4]) + states[middle + 1 :] if states else b"?"


def _survives(operation: Callable[[], object]) -> bool:
    """Whether an operation raises no DamagedError."""
    try:
        operation()
    except DamagedError:
        return False
    return True
