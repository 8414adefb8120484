from __future__ import annotations

import pytest
import torch

from pikv.core.errors import TransportError
from pikv.core.ports.transport import Solo
from pikv.testing.transport import FakeTransport, run_ranks
from pikv.testing.transport_checks import TRANSPORT_CHECKS


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("check", TRANSPORT_CHECKS, ids=lambda check: check.__name__)
def test_fake_transport_passes_the_checks(size, check):
    """The fake does what every transport must."""
    run_ranks(size, check)


@pytest.mark.parametrize("check", TRANSPORT_CHECKS, ids=lambda check: check.__name__)
def test_solo_passes_the_checks(check):
    """So does the rank that is alone."""
    with Solo() as transport:
        check(transport)


def test_run_ranks_returns_in_the_order_of_ranks():
    """Each rank's result is at its place."""
    assert run_ranks(3, lambda transport: transport.rank) == [0, 1, 2]


def test_an_error_on_one_rank_is_raised_and_releases_the_others():
    """The others wait for a rank that never comes; the caller sees why it did not."""

    def fail_on_rank_1(transport):
        if transport.rank == 1:
            raise LookupError("lost")
        transport.barrier()

    with pytest.raises(LookupError, match="lost"):
        run_ranks(3, fail_on_rank_1)


def test_ranks_that_call_different_operations_get_an_error():
    """A barrier does not meet an all_gather."""

    def disagree(transport):
        return transport.barrier() if transport.rank else transport.all_gather(torch.zeros(1))

    with pytest.raises(TransportError, match=r"all_gather.*barrier"):
        run_ranks(2, disagree)


def test_ranks_that_bring_different_shapes_get_an_error():
    """Shapes are the same on all ranks where the port says so."""
    for operation in ("all_gather", "all_reduce"):
        with pytest.raises(TransportError, match="same shape"):
            run_ranks(2, lambda transport, name=operation: getattr(transport, name)(torch.zeros(1 + transport.rank)))


def test_a_rank_that_does_not_come_is_waited_for_only_so_long():
    """After the timeout the one that came gets an error that names it and the operation."""
    first, _ = FakeTransport.group(2, timeout_s=0.01)
    with pytest.raises(TransportError, match="barrier on rank 0"):
        first.barrier()


def test_a_closed_transport_does_no_more():
    """After close every operation raises."""
    (only,) = FakeTransport.group(1)
    only.close()
    with pytest.raises(TransportError, match="closed"):
        only.barrier()
