"""Tiers that need nothing but torch, and the suite that all tiers pass."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import attrs
import pytest
import torch
from torch import Tensor

import pikv
from pikv.core import worker
from pikv.core.directory import Directory
from pikv.core.errors import PageLostError, TierError, TierFullError, WaitTimeoutError
from pikv.core.host_tier import HostTier
from pikv.core.modelled_tier import ModelledTier
from pikv.core.ports import Done, MemoryTier
from pikv.core.worker import Background, Worker
from pikv.testing.faulty_tier import FaultyTier
from pikv.testing.memory_tier import (
    PAGE_BYTES,
    AddressableTierConformance,
    MemoryTierConformance,
    check_read,
    numbers,
    pages_of,
)

SLOWLY_S = 0.002


class TestHostTier(AddressableTierConformance):
    def make(self, capacity_bytes):
        return HostTier(capacity_bytes=capacity_bytes)


class TestBackground(MemoryTierConformance):
    def make(self, capacity_bytes):
        return Background(HostTier(capacity_bytes=capacity_bytes), at_most=2)


class TestModelledTier(MemoryTierConformance):
    def make(self, capacity_bytes):
        return ModelledTier(HostTier(capacity_bytes=capacity_bytes), latency_s=SLOWLY_S / 4, bytes_per_s=1e9)


class TestFaultyTierWithoutFault(MemoryTierConformance):
    def make(self, capacity_bytes):
        return FaultyTier(HostTier(capacity_bytes=capacity_bytes))


# --- faults, which are to be found by what stands on a tier


def faulty(fault):
    tier = FaultyTier(HostTier(capacity_bytes=8 * PAGE_BYTES))
    tier.write(numbers(1, 2), pages_of(numbers(1, 2)))
    tier.fault = fault
    return tier


@pytest.mark.parametrize("fault", ["lies", "truncates"])
def test_a_faulty_tier_returns_other_bytes(fault):
    """And no error."""
    with faulty(fault) as tier:
        out = torch.empty(2, PAGE_BYTES, dtype=torch.uint8)
        tier.read(numbers(1, 2), out).wait()
        assert not torch.equal(out, pages_of(numbers(1, 2)))
        assert tier.injected == 1


@pytest.mark.parametrize(("fault", "error"), [("loses", PageLostError), ("fails to read", TierError)])
def test_a_faulty_tier_does_not_read(fault, error):
    """What it loses is lost; what it fails to read is there."""
    with faulty(fault) as tier:
        with pytest.raises(error):
            tier.read(numbers(1, 2), torch.empty(2, PAGE_BYTES, dtype=torch.uint8))
        assert tier.contains(numbers(1, 2)).tolist() == [fault != "loses", True]


def test_a_faulty_tier_does_not_write():
    """And then holds nothing new."""
    with faulty("fails to write") as tier:
        with pytest.raises(OSError, match="fails to write"):
            tier.write(numbers(3), pages_of(numbers(3)))
        assert not tier.contains(numbers(3))


# --- the worker


def test_calls_are_made_in_order_by_another_thread():
    """And their results come back by their tickets."""
    worker, seen = Worker(at_most=4), []
    jobs = [worker.submit(lambda i=i: (seen.append(i), threading.get_ident())[1]) for i in range(20)]
    assert {job.result() for job in jobs} != {threading.get_ident()}
    assert seen == list(range(20))
    worker.close()


def wait_for_depth(worker, depth):
    """Until no more calls wait than that: the thread has begun the one before them, which nothing else tells."""
    while worker.depth > depth:
        time.sleep(0.001)  # leaves the processor to that thread


def test_a_backlog_is_bounded():
    """When as many calls wait as may, submit waits too."""
    worker, go, submitted = Worker(at_most=2), threading.Event(), []
    worker.submit(go.wait)
    wait_for_depth(worker, 0)

    def submit_all():
        submitted.extend(worker.submit(lambda: None) for _ in range(4))
        submitted.append("all")

    thread = threading.Thread(target=submit_all)
    thread.start()
    thread.join(timeout=0.05)
    assert worker.depth == 2
    assert thread.is_alive()
    go.set()
    thread.join()
    assert submitted[-1] == "all"
    worker.close()


def test_work_that_has_not_begun_can_be_cancelled():
    """It never happens; asking for it raises StateError, and cancelling it again changes nothing."""
    worker, go, seen = Worker(at_most=4), threading.Event(), []
    first, second = worker.submit(go.wait), worker.submit(lambda: seen.append(1))
    wait_for_depth(worker, 1)
    assert not first.cancel()
    assert second.cancel()
    assert second.cancel()
    assert second.done()
    go.set()
    worker.close()
    assert seen == []
    with pytest.raises(pikv.StateError, match="cancelled"):
        second.wait()


def test_waiting_may_end_before_the_work():
    """WaitTimeoutError, a TimeoutError; the work goes on."""
    worker, go = Worker(at_most=4), threading.Event()
    job = worker.submit(go.wait)
    with pytest.raises(WaitTimeoutError, match=r"not done after 0\.001 s"):
        job.wait(timeout_s=0.001)
    assert not job.done()
    go.set()
    job.wait()
    worker.close()


def test_a_ticket_raises_what_its_work_raised():
    """As often as it is asked; the worker goes on."""
    with Background(faulty("fails to write")) as tier:
        ticket = tier.write(numbers(3), pages_of(numbers(3)))
        for _ in range(2):
            with pytest.raises(TierError, match="fails to write"):
                ticket.wait()
        check_read(tier, numbers(1, 2))
        assert tier.depth == 0


def test_a_worker_that_nobody_holds_ends():
    """Its thread too."""
    worker = Worker(at_most=1)
    thread = worker._thread
    del worker
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_workers_end_with_the_interpreter(monkeypatch):
    """After what they were given: a thread that is cut off in the middle of a call would take the process down."""
    monkeypatch.setattr(worker, "_OPEN", weakref.WeakSet())
    left_open, seen = Worker(at_most=1), []
    left_open.submit(lambda: seen.append(1))
    worker._close_all()
    assert seen == [1]
    with pytest.raises(pikv.StateError, match="closed"):
        left_open.submit(lambda: None)


def test_a_worker_takes_something():
    """At least one call must be able to wait."""
    with pytest.raises(pikv.ConfigError, match="at_most must be at least 1, got 0"):
        Worker(at_most=0)


# --- the model


def test_a_model_takes_its_time():
    """Latency, and bytes by the bandwidth; neither for what happens in memory only."""
    with ModelledTier(HostTier(capacity_bytes=1 << 20), latency_s=SLOWLY_S, bytes_per_s=1e6) as tier:
        keys, started = torch.arange(10), time.perf_counter()
        tier.write(keys, pages_of(keys))
        assert time.perf_counter() - started >= SLOWLY_S + 10 * PAGE_BYTES / 1e6
        check_read(tier, keys)
        assert tier.modelled_s == pytest.approx(2 * (SLOWLY_S + 10 * PAGE_BYTES / 1e6))
        assert tier.shortest_s < SLOWLY_S


def test_a_model_that_is_faster_than_what_it_stands_on_says_so():
    """Its operations are counted as late."""
    slow = ModelledTier(HostTier(capacity_bytes=1 << 20), latency_s=2 * SLOWLY_S, bytes_per_s=1e9)
    with ModelledTier(slow, latency_s=SLOWLY_S, bytes_per_s=1e9) as tier:
        tier.write(numbers(1), pages_of(numbers(1)))
        assert (tier.late, slow.late) == (1, 0)
        assert tier.late_s > 0


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(0, 1e9), (1.0, 0)])
def test_a_time_that_cannot_be_kept_is_refused(latency_s, bytes_per_s):
    """With the shortest that can."""
    with pytest.raises(pikv.ConfigError, match="the shortest time that can be kept here"):
        ModelledTier(HostTier(capacity_bytes=64), latency_s=latency_s, bytes_per_s=bytes_per_s)


# --- the books


def test_books_that_do_not_add_up_are_found():
    """StateError."""
    books = Directory(1024)
    books.add(numbers(1, 2), 64)
    books.used_bytes -= 64
    with pytest.raises(pikv.StateError, match="please report it"):
        books.check_integrity()
    books = Directory(1024)
    books.add(numbers(1, 2), 64)
    books._places[2] = books._places[1]
    with pytest.raises(pikv.StateError, match="please report it"):
        books.check_integrity()


# --- the suite


@attrs.define
class Broken(MemoryTier):
    """A dict with one defect, named by the test of the suite that must find it."""

    capacity_bytes: int
    defect: str
    held: dict[int, Tensor] = attrs.field(factory=dict)
    closed: bool = False

    @property
    def used_bytes(self):
        return sum(page.nbytes for page in self.held.values()) if self.defect != "it_can_be_exactly_full" else 0

    def write(self, keys, pages):
        self.check()
        if self.defect == "batches_are_checked":
            pages = pages.to(torch.uint8)[: len(keys)]
        for key, page in zip(keys.tolist(), pages, strict=True):
            if self.defect != "a_key_is_written_once" and (key < 0 or key in self.held):
                raise pikv.InputError(f"key {key}")
            if self.used_bytes + page.nbytes > self.capacity_bytes:
                if self.defect == "rows_are_used_again":
                    raise PageLostError("full")
                raise TierFullError("full")
            self.held[key] = page if self.defect == "pages_are_copied" else page.clone()
        return Forgetful() if self.defect == "a_ticket_that_is_done_cannot_be_cancelled" else Done()

    def read(self, keys, out):
        self.check()
        for row, key in enumerate(keys.tolist()):
            if key not in self.held or self.held[key].shape != out[0].shape:
                raise PageLostError("one" if self.defect == "a_page_that_is_not_there_is_named" else f"key {key}")
            out[row] = self.held[key]
        if self.defect == "reading_writes_only_out" and out.storage_offset():
            out.untyped_storage()[out.storage_offset() - 1] = 0
        return Done()

    def discard(self, keys):
        self.check()
        for key in [] if self.defect in ("it_equals_a_dict", "rows_are_used_again") else keys.tolist():
            self.held.pop(key, None)
        if self.defect == "an_empty_batch_is_nothing" and not len(keys):
            self.held.clear()

    def contains(self, keys):
        self.check()
        return torch.tensor([key in self.held for key in keys.tolist()], dtype=torch.bool)

    def check_integrity(self):
        self.check()

    def close(self):
        self.closed = True

    def check(self):
        if self.closed and self.defect != "a_closed_tier_does_no_more":
            raise pikv.StateError("closed")


class Forgetful(Done.__base__):
    def done(self):
        return True

    def wait(self, timeout_s=None):
        pass

    def cancel(self):
        return True


@pytest.mark.parametrize("defect", [name[5:] for name in dir(MemoryTierConformance) if name.startswith("test_")])
def test_the_suite_finds_a_defect(defect):
    """Each test of the suite fails for a tier that breaks the fact it states."""

    class Suite(MemoryTierConformance):
        def make(self, capacity_bytes):
            return Broken(capacity_bytes, defect)

    with pytest.raises((AssertionError, ExceptionGroup, PageLostError)):
        getattr(Suite(), f"test_{defect}")()


def test_the_suite_finds_pages_that_have_no_address():
    """A tier that is not addressable, or whose rows hold something else."""

    class Suite(AddressableTierConformance):
        def make(self, capacity_bytes):
            return FaultyTier(HostTier(capacity_bytes=capacity_bytes))

    with pytest.raises(AssertionError, match="is no AddressableTier"):
        Suite().test_pages_are_read_in_place()


def test_workers_are_closed_when_the_interpreter_ends(monkeypatch):
    """What was submitted is done first: a thread that is cut off in the middle of a call would crash the process."""
    open_worker, done = Worker(at_most=4), []
    monkeypatch.setattr(worker, "_OPEN", weakref.WeakSet([open_worker]))
    # Long enough that a close which does not wait for the call would be over before it.
    open_worker.submit(lambda: (time.sleep(0.05), done.append(1)))
    worker._close_all()
    assert done == [1]
    with pytest.raises(pikv.StateError, match="closed"):
        open_worker.submit(print)
