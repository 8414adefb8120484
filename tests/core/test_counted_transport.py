"""What goes over a transport is counted."""

from __future__ import annotations

import pytest
import torch

from pikv.core.counted_transport import Counted
from pikv.core.ports.transport import Solo, Transport, as_bytes
from pikv.testing.transport import run_ranks
from pikv.testing.transport_checks import TRANSPORT_CHECKS


@pytest.mark.parametrize("check", TRANSPORT_CHECKS)
def test_it_does_what_every_transport_must(check) -> None:
    """The shipped suite."""
    run_ranks(3, lambda transport: check(Counted(transport)))


def test_bytes_count_once_for_each_other_rank() -> None:
    """What stays at home is not sent."""

    def send(transport: Transport) -> list[int]:
        counted, sent = Counted(transport), []
        numbers = torch.zeros(10)  # 40 bytes
        for operation in (
            lambda: counted.broadcast(numbers, root=1),
            lambda: counted.all_gather(numbers),
            lambda: counted.all_reduce(numbers),
            lambda: counted.all_to_all([numbers[:rank] for rank in range(3)]),
            counted.barrier,
        ):
            counted.sent_bytes = 0
            operation()
            sent.append(counted.sent_bytes)
        assert counted.calls == 5
        return sent

    assert run_ranks(3, send) == [[0, 80, 80, 12, 0], [80, 80, 80, 8, 0], [0, 80, 80, 4, 0]]


def test_a_rank_that_is_alone_sends_nothing() -> None:
    """It has nobody to send to; and closing leaves the transport below open."""
    with Counted(Solo()) as counted:
        counted.all_gather(torch.zeros(3))
    assert counted.sent_bytes == 0
    assert repr(counted) == "Counted(rank=0, size=1)"


def test_any_tensor_travels_as_bytes() -> None:
    """One that is not contiguous too: the bytes are those of its numbers in order."""
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3).T
    assert torch.equal(as_bytes(tensor).view(torch.bfloat16), torch.tensor([0, 3, 1, 4, 2, 5], dtype=torch.bfloat16))
