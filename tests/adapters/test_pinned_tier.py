"""PinnedTier: a tier as any other, and pages that go between it and a slab on the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pikv
from pikv.adapters.cupy_gpu import PinnedTier
from pikv.core.errors import PageLostError, StateError, TierFullError
from pikv.core.ports import MemoryTier
from pikv.testing.cuda_on_host import HostRunner, compiler
from pikv.testing.memory_tier import AddressableTierConformance, numbers

pytestmark = pytest.mark.skipif(compiler() is None, reason="a C++ compiler is missing: g++ or clang++")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def a_tier(capacity_bytes: int) -> PinnedTier:
    """On a GPU if this machine has one."""
    return PinnedTier(capacity_bytes=capacity_bytes, device=DEVICE, runner=None if ON_GPU else HostRunner())


class TestPinnedTier(AddressableTierConformance):
    """The shipped suite."""

    def make(self, capacity_bytes: int) -> MemoryTier:
        return a_tier(capacity_bytes)


@pytest.mark.property
@given(st.data())
def test_pages_come_back_to_any_rows(data):
    """Of any size, sent from some rows in any order and fetched into others; all other rows stay as they are."""
    page_bytes = data.draw(st.sampled_from([64, 48 << 10]))  # gathered by a kernel, and copied
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    slab = torch.randint(0, 256, (12, page_bytes), dtype=torch.uint8, generator=generator)
    sent = torch.tensor(data.draw(st.lists(st.integers(0, 11), unique=True)), dtype=torch.int64)
    keys = torch.randperm(100, generator=generator)[: len(sent)]
    back = torch.tensor(data.draw(st.permutations(range(12)))[: len(sent)], dtype=torch.int64)
    with a_tier(12 * page_bytes) as tier:
        tier.send(keys, slab.to(DEVICE), sent).wait()
        out = torch.zeros_like(slab).to(DEVICE)
        ticket = tier.fetch(keys, out, back)
        ticket.before_what_follows()
        wanted = torch.zeros_like(slab)
        wanted[back] = slab[sent]
        assert torch.equal(out.cpu(), wanted)
        ticket.wait()
        assert ticket.done()
        assert not ticket.cancel()
        tier.check_integrity()
        read = torch.empty(len(keys), page_bytes, dtype=torch.uint8)
        tier.read(keys, read).wait()
        assert torch.equal(read, slab[sent])


def test_what_cannot_be_moved_is_refused():
    """A full tier, a page that is not there, rows beyond the slab, keys that come twice, a closed tier."""
    slab = torch.zeros(4, 64, dtype=torch.uint8, device=DEVICE)
    with a_tier(128) as tier:
        with pytest.raises(TierFullError):
            tier.send(numbers(1, 2, 3), slab, numbers(0, 1, 2))
        with pytest.raises(PageLostError):
            tier.fetch(numbers(1), slab, numbers(0))
        with pytest.raises(pikv.InputError, match="rows must lie in a slab of 4"):
            tier.send(numbers(1), slab, numbers(4))
        with pytest.raises(pikv.InputError, match="distinct"):
            tier.send(numbers(1, 1), slab, numbers(0, 1))
        with pytest.raises(pikv.InputError, match="int64"):
            tier.send(numbers(1), slab, numbers(0, 1))
        with pytest.raises(pikv.InputError, match="multiple of 16"):
            tier.send(numbers(1), slab[:, :40], numbers(0))
        assert tier.used_bytes == 0
    with pytest.raises(StateError):
        tier.fetch(numbers(1), slab, numbers(0))
