"""The facts that every PrefixStore must hold to, as tests to inherit.

class TestMine(PrefixStoreConformance):
    def open(self) -> PrefixStore:
        return Mine(self.place)
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv.core.errors import StateError
from pikv.core.ports import PrefixStore
from pikv.testing.memory_tier import PAGE_BYTES, assert_raises, numbers, page_of, pages_of
from pikv.testing.policy import assert_equal, inherited


def names_of(keys: Sequence[int]) -> list[str]:
    """The names that tests give to pages."""
    return [f"{key:064x}.{key % 3}" for key in keys]


def write(store: PrefixStore, *keys: int) -> None:
    """Write the pages of these keys."""
    store.write(names_of(keys), pages_of(numbers(*keys)))
    store.flush()


def check_read(store: PrefixStore, keys: Sequence[int], there: set[int]) -> None:
    """Raise AssertionError unless just these are there, and as they were written."""
    out = torch.zeros(len(keys), PAGE_BYTES, dtype=torch.uint8)
    found = store.read(names_of(keys), out).tolist()
    assert found == [key in there for key in keys], f"keys {list(keys)}: found {found}, there are {sorted(there)}"
    for row, key, is_there in zip(out, keys, found, strict=True):
        if is_there:
            assert_equal(row, page_of(key), f"page {key}")


class PrefixStoreConformance:
    """Inherit, and say what `open` opens: each time another one, on a store that a test has to itself.

    Say also, for the tests of damage, how to look at what is stored without it: `objects` returns all of it by name,
    `put` replaces an object, or deletes it by None.
    """

    def open(self) -> PrefixStore:
        """Open the store of this test, which is empty at first."""
        raise NotImplementedError("open: return a prefix store on the test's own store")

    def objects(self) -> dict[str, bytes]:
        """All that is stored, by name."""
        raise NotImplementedError("objects: return what is stored, by name")

    def put(self, name: str, states: bytes | None) -> None:
        """Replace what is stored under a name, or delete it."""
        raise NotImplementedError("put: replace or delete what is stored under a name")

    @inherited
    @given(data=st.data())
    def test_it_equals_a_set_of_pages(self, data: st.DataObject) -> None:
        """Whatever is written, once or again, by whoever; each is found by all."""
        for name in self.objects():
            self.put(name, None)
        plain: set[int] = set()
        with self.open() as one, self.open() as other:
            for _ in range(data.draw(st.integers(1, 4))):
                keys = data.draw(st.lists(st.integers(0, 9), unique=True, max_size=5))
                write(data.draw(st.sampled_from([one, other])), *keys)
                plain |= set(keys)
                for store in (one, other):
                    asked = data.draw(st.permutations(range(10)))
                    assert store.contains(names_of(asked)).tolist() == [key in plain for key in asked]
                    check_read(store, asked, plain)

    def test_nothing_is_asked_of_no_names(self) -> None:
        """Empty batches are answered, and write nothing."""
        with self.open() as store:
            write(store)
            assert store.contains([]).tolist() == []
            check_read(store, [], set())
            assert self.objects() == {}

    def test_of_several_that_write_a_page_one_wins(self) -> None:
        """However they race, there is one object a page, and what has a name stays as it is."""
        with self.open() as one, self.open() as other, ThreadPoolExecutor(2) as threads:
            for store in (one, other):
                threads.submit(store.write, names_of(range(8)), pages_of(numbers(*range(8))))
            threads.shutdown()
            one.flush()
            other.flush()
            before = self.objects()
            assert len(before) == 8, f"{len(before)} objects for 8 pages: {sorted(before)}"
            other.write(names_of([3]), torch.zeros(1, PAGE_BYTES, dtype=torch.uint8))
            other.flush()
            assert self.objects() == before
            check_read(one, range(8), set(range(8)))

    def test_damage_is_no_page(self) -> None:
        """With an object cut, gone, replaced by another's or with a bit changed its page is not there.

        What is damaged is deleted, so that the page can be written again; the others are as they were.
        """
        with self.open() as store:
            write(store, 1, 2, 3)
            name = next(name for name, states in self.objects().items() if bytes(page_of(2).tolist()) in states)
            others = next(states for other, states in self.objects().items() if other != name)
            states = self.objects()[name]
            middle = len(states) // 2
            flipped = states[:middle] + bytes([states[middle] ^ 4]) + states[middle + 1 :]
            for damaged in (None, b"", states[:-1], states + b"?", flipped, states[:-1] + b"?", others):
                self.put(name, damaged)
                check_read(store, [1, 2, 3], {1, 3})
                assert store.contains(names_of([1, 2, 3])).tolist() == [True, False, True]
                write(store, 2)
                check_read(store, [1, 2, 3], {1, 2, 3})

    def test_a_page_of_another_length_is_damaged(self) -> None:
        """Longer or shorter than what is asked for."""
        for asked in (PAGE_BYTES // 2, 2 * PAGE_BYTES):
            with self.open() as store:
                write(store, 1)
                out = torch.zeros(1, asked, dtype=torch.uint8)
                assert store.read(names_of([1]), out).tolist() == [False]
                assert store.contains(names_of([1])).tolist() == [False]

    def test_what_was_taken_is_written_when_it_closes(self) -> None:
        """Without a flush."""
        with self.open() as store:
            store.write(names_of(range(20)), pages_of(numbers(*range(20))))
        with self.open() as store:
            check_read(store, range(20), set(range(20)))

    def test_a_closed_store_does_no_more(self) -> None:
        """StateError from everything but another close."""
        with self.open() as store:
            write(store, 1)
        store.close()
        pages = pages_of(numbers(1))
        for operation in (
            lambda: store.write(names_of([2]), pages),
            store.flush,
            lambda: store.contains(names_of([1])),
            lambda: store.read(names_of([1]), pages),
        ):
            assert_raises(StateError, operation, "after close")
