"""The checks that every Transport passes: yours too.

Every rank runs each check with a transport that nobody has used yet; one that fails raises AssertionError. Ranks that
are threads run them by `run_ranks(size, check)`, ranks that are processes by a script that their launcher starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from pikv.core.errors import InputError
from pikv.core.ports.transport import Transport

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
_SHAPES = ((), (0,), (5,), (2, 0, 3), (2, 3, 4))


def _sample(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values that tell ranks and places apart, the same wherever they are made."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 3 + rank * 7) % 11).reshape(shape).to(dtype)


def _assert_equal(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype, f"dtype {got.dtype}, expected {expected.dtype}"
    assert torch.equal(got, expected), f"got {got}, expected {expected}"


def _assert_raises(kind: type[Exception], operation: Callable[[], object]) -> None:
    try:
        operation()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def check_rank_and_size(transport: Transport) -> None:
    """Ranks are numbered from 0 in the order of all_gather."""
    ranks = transport.all_gather(torch.tensor(transport.rank))
    _assert_equal(ranks, torch.arange(transport.size))


def check_broadcast(transport: Transport) -> None:
    """Every rank gets the root's values, whichever the root, the dtype and the shape."""
    for root in range(transport.size):
        for dtype in _DTYPES:
            for shape in _SHAPES:
                got = transport.broadcast(_sample(transport.rank, shape, dtype), root=root)
                _assert_equal(got, _sample(root, shape, dtype))


def check_all_gather(transport: Transport) -> None:
    """Every rank gets all tensors in the order of ranks."""
    for dtype in _DTYPES:
        for shape in _SHAPES:
            got = transport.all_gather(_sample(transport.rank, shape, dtype))
            _assert_equal(got, torch.stack([_sample(rank, shape, dtype) for rank in range(transport.size)]))


def check_all_reduce(transport: Transport) -> None:
    """Every rank gets the sum, in the dtype that came."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
        for shape in _SHAPES:
            got = transport.all_reduce(_sample(transport.rank, shape, dtype))
            terms = torch.stack([_sample(rank, shape, dtype) for rank in range(transport.size)])
            _assert_equal(got, terms.sum(0, dtype=dtype))


def check_all_reduce_gives_the_same_bits(transport: Transport) -> None:
    """Sums that rounding makes depend on their order are equal on all ranks, bit by bit."""
    terms = torch.randn(1000, generator=torch.Generator().manual_seed(transport.rank))
    everywhere = transport.all_gather(transport.all_reduce(terms))
    _assert_equal(everywhere, everywhere[:1].expand_as(everywhere))


def check_all_to_all(transport: Transport) -> None:
    """Rank r gets part r of every rank, though rows differ from part to part and some are none."""
    rank, size = transport.rank, transport.size
    for dtype in _DTYPES:
        for shape in ((), (3,), (2, 0), (2, 3)):
            parts = [_sample(rank, ((rank + peer) % 3, *shape), dtype) for peer in range(size)]
            got = transport.all_to_all(parts)
            assert len(got) == size, f"{len(got)} parts for {size} ranks"
            for peer, part in enumerate(got):
                _assert_equal(part, _sample(peer, ((peer + rank) % 3, *shape), dtype))


def check_all_to_all_of_nothing(transport: Transport) -> None:
    """Ranks may have nothing for one another."""
    for part in transport.all_to_all([torch.empty(0, 4)] * transport.size):
        assert part.shape == (0, 4), f"got {list(part.shape)}"


def check_strided_tensors(transport: Transport) -> None:
    """The layout in memory of an input does not matter."""
    rank, size = transport.rank, transport.size
    mine = _sample(rank, (4, 6), torch.float32).t()[::2]
    all_of_it = torch.stack([_sample(peer, (4, 6), torch.float32).t()[::2] for peer in range(size)])
    _assert_equal(transport.broadcast(mine, root=size - 1), all_of_it[-1])
    _assert_equal(transport.all_gather(mine), all_of_it)
    _assert_equal(torch.stack(transport.all_to_all([mine] * size)), all_of_it)


def check_inputs_are_left_alone(transport: Transport) -> None:
    """No operation changes its input, and writing into a result does not either."""
    rank, size = transport.rank, transport.size
    mine = _sample(rank, (3, 2), torch.float32)
    results = [
        transport.broadcast(mine, root=0),
        transport.all_gather(mine),
        transport.all_reduce(mine),
        *transport.all_to_all([mine] * size),
    ]
    for result in results:
        result.fill_(-1)
    transport.barrier()
    _assert_equal(mine, _sample(rank, (3, 2), torch.float32))


def check_wrong_arguments(transport: Transport) -> None:
    """A root that is no rank and parts that do not fit raise InputError, and the transport can still be used."""
    part, size = torch.zeros(1, 2), transport.size
    _assert_raises(InputError, lambda: transport.broadcast(part, root=size))
    _assert_raises(InputError, lambda: transport.broadcast(part, root=-1))
    _assert_raises(InputError, lambda: transport.all_to_all([part] * (size + 1)))
    _assert_raises(InputError, lambda: transport.all_to_all([torch.tensor(0.0)] * size))
    if size > 1:
        _assert_raises(InputError, lambda: transport.all_to_all([part.long(), *[part] * (size - 1)]))
        _assert_raises(InputError, lambda: transport.all_to_all([part[:, :1], *[part] * (size - 1)]))
    transport.barrier()


def check_barrier(transport: Transport) -> None:
    """No rank leaves before the last has come. By the clock of one machine: ranks must share it."""
    time.sleep(0.02 * transport.rank)
    came = time.monotonic_ns()
    transport.barrier()
    left = time.monotonic_ns()
    times = transport.all_gather(torch.tensor([came, left]))
    assert times[:, 1].min() >= times[:, 0].max(), f"came and left at {times.tolist()} ns"


def check_close(transport: Transport) -> None:
    """A second close does nothing."""
    transport.barrier()
    transport.close()
    transport.close()


TRANSPORT_CHECKS: tuple[Callable[[Transport], None], ...] = (
    check_rank_and_size,
    check_broadcast,
    check_all_gather,
    check_all_reduce,
    check_all_reduce_gives_the_same_bits,
    check_all_to_all,
    check_all_to_all_of_nothing,
    check_strided_tensors,
    check_inputs_are_left_alone,
    check_wrong_arguments,
    check_barrier,
    check_close,
)
"""All checks; each takes a transport that nobody has used, since the last one closes it."""
