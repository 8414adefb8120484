"""The facts that every MemoryTier must hold to, as tests to inherit.

class TestMine(MemoryTierConformance):
    def make(self, capacity_bytes: int) -> MemoryTier:
        return Mine(capacity_bytes=capacity_bytes)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pikv.core.errors import InputError, PageLostError, StateError, TierFullError
from pikv.core.ports import AddressableTier, MemoryTier
from pikv.testing.policy import assert_equal, inherited

PAGE_BYTES = 192


def numbers(*keys: int) -> Tensor:
    """Keys int64 [n]."""
    return torch.tensor(keys, dtype=torch.int64)


def page_of(key: int, page_bytes: int = PAGE_BYTES) -> Tensor:
    """The bytes that tests store under a key: uint8 [page_bytes]."""
    generator = torch.Generator().manual_seed(key)
    return torch.randint(0, 256, (page_bytes,), dtype=torch.uint8, generator=generator)


def pages_of(keys: Tensor, page_bytes: int = PAGE_BYTES) -> Tensor:
    """The bytes that tests store under keys: uint8 [n, page_bytes]."""
    return (
        torch.stack([page_of(key, page_bytes) for key in keys.tolist()] or [torch.empty(0)])
        .to(torch.uint8)
        .view(len(keys), page_bytes)
    )


def check_read(tier: MemoryTier, keys: Tensor, page_bytes: int = PAGE_BYTES) -> None:
    """Raise AssertionError unless the pages of these keys come back as they were written."""
    out = torch.zeros(len(keys), page_bytes, dtype=torch.uint8)
    tier.read(keys, out).wait()
    assert_equal(out, pages_of(keys, page_bytes), f"pages {keys.tolist()}")


def assert_raises(kind: type[Exception], operation: Callable[[], object], what: str) -> Exception:
    """Return the error of this kind that the operation raises; AssertionError if it raises none."""
    try:
        operation()
    except kind as error:
        return error
    raise AssertionError(f"{what}: {kind.__name__} was not raised")


class MemoryTierConformance:
    """Inherit, and say what `make` makes."""

    def make(self, capacity_bytes: int) -> MemoryTier:
        """Make an empty tier to test."""
        raise NotImplementedError("make: return the tier to test")

    def with_pages(self, *keys: int, room_for: int = 8) -> MemoryTier:
        """A tier that has room for so many pages and holds those of these keys."""
        tier = self.make(room_for * PAGE_BYTES)
        tier.write(numbers(*keys), pages_of(numbers(*keys))).wait()
        return tier

    @inherited
    @given(data=st.data())
    def test_it_equals_a_dict(self, data: st.DataObject) -> None:
        """Whatever is written, read and discarded in whatever order, in pages of two lengths."""
        plain: dict[int, int] = {}
        with self.make(20 * PAGE_BYTES) as tier:
            for _ in range(data.draw(st.integers(1, 8))):
                keys = numbers(*data.draw(st.lists(st.integers(0, 40), unique=True, max_size=6)))
                length = data.draw(st.sampled_from([PAGE_BYTES, 64]))
                if data.draw(st.booleans()):
                    fresh = keys[[key not in plain for key in keys.tolist()]]
                    tier.write(fresh, pages_of(fresh, length)).wait()
                    plain.update(dict.fromkeys(fresh.tolist(), length))
                else:
                    tier.discard(keys)
                    plain = {key: length for key, length in plain.items() if key not in keys.tolist()}
                held = tier.contains(torch.arange(41)).tolist()
                assert held == [key in plain for key in range(41)], f"contains says {held}, expected {sorted(plain)}"
                assert tier.used_bytes >= sum(plain.values()), f"{tier.used_bytes} bytes used of {plain}"
                for length in (PAGE_BYTES, 64):
                    some = data.draw(st.permutations([key for key, there in plain.items() if there == length]))
                    check_read(tier, numbers(*some), length)
                tier.check_integrity()

    def test_an_empty_batch_is_nothing(self) -> None:
        """Nothing is written, read or discarded."""
        with self.with_pages(1) as tier:
            tier.write(numbers(), pages_of(numbers())).wait()
            check_read(tier, numbers())
            tier.discard(numbers())
            assert tier.used_bytes == PAGE_BYTES, f"{tier.used_bytes} bytes used by one page"

    def test_it_can_be_exactly_full(self) -> None:
        """As many pages as its capacity holds, and it then uses that many bytes and no more."""
        with self.with_pages(*range(4), room_for=4) as tier:
            assert tier.used_bytes == tier.capacity_bytes == 4 * PAGE_BYTES
            check_read(tier, torch.arange(4))

    def test_a_full_tier_takes_all_of_a_batch_or_nothing(self) -> None:
        """TierFullError; none of the new pages is there, all old ones are, and after discarding there is room."""
        with self.with_pages(1, 2, 3, room_for=4) as tier:
            new = numbers(4, 5)
            assert_raises(TierFullError, lambda: tier.write(new, pages_of(new)).wait(), "two pages, room for one")
            assert tier.contains(numbers(1, 2, 3, 4, 5)).tolist() == [True] * 3 + [False] * 2
            tier.discard(numbers(2))
            tier.write(new, pages_of(new)).wait()
            check_read(tier, numbers(5, 1, 4, 3))

    def test_a_key_is_written_once(self) -> None:
        """InputError for a key that is held, comes twice in a batch or is negative; nothing has happened then."""
        with self.with_pages(1) as tier:
            for keys in (numbers(2, 1), numbers(3, 3), numbers(-1)):
                other = torch.zeros(len(keys), PAGE_BYTES, dtype=torch.uint8)
                assert_raises(InputError, lambda: tier.write(keys, other).wait(), f"keys {keys.tolist()}")  # noqa: B023  # called at once
            assert tier.contains(numbers(1, 2, 3)).tolist() == [True, False, False]
            check_read(tier, numbers(1))

    def test_a_page_that_is_not_there_is_named(self) -> None:
        """PageLostError, with the key in its message; also for a page of another length."""
        with self.with_pages(1, 2) as tier:
            for keys, length, lost in ((numbers(1, 777), PAGE_BYTES, "777"), (numbers(2), 64, "2")):
                out = torch.zeros(len(keys), length, dtype=torch.uint8)
                error = assert_raises(PageLostError, lambda: tier.read(keys, out).wait(), f"key {lost}")  # noqa: B023  # called at once
                assert lost in str(error), f"the error does not name key {lost}: {error}"
            check_read(tier, numbers(1, 2))

    def test_batches_are_checked(self) -> None:
        """InputError for keys or pages of another type or shape, or that are not contiguous."""
        with self.with_pages(1) as tier:
            pages = pages_of(numbers(2, 3))
            for keys, wrong in (
                (numbers(2, 3).int(), pages),
                (numbers(2), pages),
                (numbers(2, 3), pages.float()),
                (numbers(2, 3), pages_of(numbers(2, 3), 2 * PAGE_BYTES)[:, ::2]),
            ):
                assert_raises(InputError, lambda: tier.write(keys, wrong).wait(), "write")  # noqa: B023  # called at once
                assert_raises(InputError, lambda: tier.read(keys, wrong).wait(), "read")  # noqa: B023  # called at once
            assert tier.used_bytes == PAGE_BYTES

    def test_pages_are_copied(self) -> None:
        """Writing changes nothing of what it is given, and what is given may change once the ticket is done."""
        with self.make(8 * PAGE_BYTES) as tier:
            keys, pages = numbers(3, 4), pages_of(numbers(3, 4))
            tier.write(keys, pages).wait()
            assert_equal(pages, pages_of(numbers(3, 4)), "what was written")
            assert_equal(keys, numbers(3, 4), "keys")
            pages.zero_()
            check_read(tier, keys)

    def test_reading_writes_only_out(self) -> None:
        """Not what lies before and after it in memory; and what was read may be overwritten."""
        with self.with_pages(1, 2) as tier:
            around = torch.full((4, PAGE_BYTES), 7, dtype=torch.uint8)
            tier.read(numbers(2, 1), around[1:3]).wait()
            assert bool((around[[0, 3]] == 7).all()), "bytes beside out were written"
            around.zero_()
            check_read(tier, numbers(2, 1))

    def test_rows_are_used_again(self) -> None:
        """Many times its capacity may go through a tier."""
        with self.make(4 * PAGE_BYTES) as tier:
            for first in range(0, 60, 3):
                keys = torch.arange(first, first + 3)
                tier.write(keys, pages_of(keys)).wait()
                check_read(tier, keys)
                tier.discard(keys)
            tier.check_integrity()
            assert not bool(tier.contains(torch.arange(60)).any())

    def test_a_ticket_that_is_done_cannot_be_cancelled(self) -> None:
        """It says so, and the work is not undone."""
        with self.make(8 * PAGE_BYTES) as tier:
            ticket = tier.write(numbers(1), pages_of(numbers(1)))
            ticket.wait(timeout_s=60)
            assert ticket.done(), "waited for and not done"
            assert not ticket.cancel(), "cancelled after it was done"
            check_read(tier, numbers(1))

    def test_a_closed_tier_does_no_more(self) -> None:
        """StateError from everything but another close."""
        tier = self.with_pages(1)
        tier.close()
        tier.close()
        pages = pages_of(numbers(1))
        for operation in (
            lambda: tier.write(numbers(2), pages).wait(),
            lambda: tier.read(numbers(1), pages).wait(),
            lambda: tier.discard(numbers(1)),
            lambda: tier.contains(numbers(1)),
            lambda: tier.check_integrity(),
        ):
            assert_raises(StateError, operation, "after close")


class AddressableTierConformance(MemoryTierConformance):
    """The same for an AddressableTier, whose pages are read in place too."""

    def test_pages_are_read_in_place(self) -> None:
        """The slab's rows hold the pages; a page that is not there has no row."""
        with self.with_pages(5, 6, 7) as tier:
            assert isinstance(tier, AddressableTier), f"{type(tier).__name__} is no AddressableTier"
            keys = numbers(7, 5)
            assert_equal(tier.slab(PAGE_BYTES)[tier.rows(keys, PAGE_BYTES)], pages_of(keys), "rows of the slab")
            assert_raises(PageLostError, lambda: tier.rows(numbers(8), PAGE_BYTES), "the row of no page")
