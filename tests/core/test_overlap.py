"""Work beside collectives: done once, at the right moment, and measured."""

from __future__ import annotations

import json
import time

import attrs
import pytest
import torch
from torch import Tensor

import pikv
from pikv.core.host_tier import HostTier
from pikv.core.modelled_tier import ModelledTier
from pikv.core.overlap import PREFETCH, STREAM, Overlap, Schedule
from pikv.core.ports.transport import Solo, Transport
from pikv.core.timeline import Timeline
from pikv.policies import AsThisLayer, FurthestLayer, TokenRange
from pikv.testing.transport import FakeTransport, run_ranks
from pikv.testing.transport_checks import TRANSPORT_CHECKS

SPAN_S = 0.05


class Slow(Transport):
    """Solo, with a gather that takes a while, as an exchange does that waits for others. A model."""

    rank, size = 0, 1
    span_s = SPAN_S
    closed = False

    def all_gather(self, tensor: Tensor) -> Tensor:
        time.sleep(self.span_s)
        return Solo().all_gather(tensor)

    def broadcast(self, tensor: Tensor, *, root: int) -> Tensor:
        return Solo().broadcast(tensor, root=root)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return Solo().all_reduce(tensor)

    def all_to_all(self, parts):
        return Solo().all_to_all(parts)

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def measured(**settings) -> Overlap:
    """An overlap that has seen how long a gather takes."""
    overlap = Overlap(Slow(), **settings)
    overlap.all_gather(torch.zeros(1))
    return overlap


@pytest.mark.parametrize("shortest_s", [0.0, 60.0])
@pytest.mark.parametrize("check", TRANSPORT_CHECKS)
def test_it_does_what_every_transport_must(check, shortest_s) -> None:
    """The shipped suite, with work beside each collective, and turned off."""

    def rank(transport: Transport) -> None:
        with Overlap(transport, shortest_s=shortest_s) as overlap:
            overlap.all_gather(torch.zeros(1))
            overlap.offer(PREFETCH, lambda: None)
            check(overlap)

    run_ranks(2, rank)


def test_work_is_hidden_behind_a_collective() -> None:
    """Both together take about as long as the longer, and the report says so."""
    with measured() as overlap:
        overlap.offer(PREFETCH, lambda: time.sleep(SPAN_S))
        started = time.perf_counter()
        assert torch.equal(overlap.all_gather(torch.arange(3)), torch.arange(3)[None])
        assert SPAN_S <= time.perf_counter() - started < 1.8 * SPAN_S
        use = overlap.use["all_gather"]
        assert (use.calls, use.threaded) == (2, 1)
        assert use.exposed_s < use.seconds - 0.5 * SPAN_S  # the first was exposed, of the second little
        assert "all_gather: 2 in 0.1" in overlap.report()
        assert "prefetch: 0.0" in overlap.report()
    assert overlap.transport.closed


def test_only_what_the_schedule_permits_runs_beside() -> None:
    """Other work is done at once, and what was offered last counts."""
    done: list[str] = []
    with measured(schedule=Schedule({"all_gather": frozenset({STREAM})})) as overlap:
        overlap.offer(PREFETCH, lambda: done.append("prefetch"))
        assert done == ["prefetch"]
        overlap.offer(STREAM, lambda: done.append("an old one"))
        overlap.offer(STREAM, lambda: done.append("stream"))
        overlap.barrier()
        assert done == ["prefetch"]
        overlap.all_gather(torch.zeros(1))
        assert done == ["prefetch", "stream"]
        overlap.offer(STREAM, lambda: done.append("late"))
        overlap.finish(STREAM)
        overlap.finish(STREAM)
        assert done[2:] == ["late"]


def test_it_turns_itself_off_where_a_collective_is_short() -> None:
    """And on again when it has become long; the report says so."""
    done: list[int] = []
    with measured(shortest_s=0.03) as overlap:
        overlap.transport.span_s = 0.0
        for _ in range(8):
            overlap.all_gather(torch.zeros(1))
        overlap.offer(PREFETCH, lambda: done.append(1))
        assert done == [1]
        assert "off: shorter than 30.0 ms" in overlap.report()
        overlap.transport.span_s = 2 * SPAN_S
        for _ in range(4):
            overlap.all_gather(torch.zeros(1))
        overlap.offer(PREFETCH, lambda: done.append(2))
        assert done == [1]
        assert "off" not in overlap.report()


def test_an_error_of_the_work_leaves_the_ranks_in_step() -> None:
    """It is raised when the collective is over."""

    def fail() -> None:
        raise LookupError("lost")

    with measured() as overlap:
        overlap.offer(PREFETCH, fail)
        with pytest.raises(LookupError, match="lost"):
            overlap.all_gather(torch.zeros(1))
        assert overlap.use["all_gather"].calls == 2


def test_a_timeline_shows_what_ran_when() -> None:
    """A Chrome trace of all ranks: a process a rank, a lane for collectives and one for work, which overlap in time."""

    def rank(transport: Transport) -> str:
        with Overlap(transport, shortest_s=0.0, timeline=Timeline(most=2)) as overlap:
            for _ in range(3):
                overlap.all_gather(torch.zeros(1))
            overlap.offer(PREFETCH, lambda: time.sleep(SPAN_S))
            overlap.all_gather(torch.zeros(1))
            return overlap.timeline.trace(transport)

    whole, nothing = (json.loads(text)["traceEvents"] for text in run_ranks(2, rank))
    assert nothing == []
    assert [event["args"]["name"] for event in whole if event["name"] == "process_name"] == ["rank 0", "rank 1"]
    for number in range(2):
        spans = [event for event in whole if event["pid"] == number and event["ph"] == "X"]
        gather, work = sorted(spans, key=lambda event: event["name"])
        assert (gather["name"], work["name"]) == ("all_gather", "prefetch")
        assert gather["tid"] != work["tid"]
        assert work["dur"] >= 1e6 * SPAN_S
        assert gather["ts"] < work["ts"] + work["dur"]


def test_settings_are_checked() -> None:
    """ConfigError."""
    with pytest.raises(pikv.ConfigError, match="shortest_s must not be negative"):
        Overlap(Solo(), shortest_s=-1.0)
    with pytest.raises(pikv.ConfigError, match=r"a schedule is for broadcast.*got \['gather'\]"):
        Schedule({"gather": frozenset()})


MODEL = pikv.ModelConfig(layers=4, query_heads=4, kv_heads=2, head_dim=16)


@pytest.mark.parametrize("shortest_s", [0.0, 60.0])
def test_pages_are_prefetched_beside_the_collective(shortest_s) -> None:
    """A cache that reads everything, half of it far, answers as one that is near; all but a few pages are foreseen."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 220, 16, generator=generator)
    q = torch.randn(1, 4, 220, 16, generator=generator)
    near = pikv.RuntimeConfig(page_size=16, tail_tokens=16)
    stride = near.form(MODEL, 0).stride

    def decode(cache: pikv.PiKVCache) -> Tensor:
        outputs = []
        for chunk in torch.arange(220).split([200, *[1] * 20]):
            for layer_id in range(4):
                cache.update(layer_id, int(chunk[0]), k[:, :, chunk], v[:, :, chunk])
                outputs.append(cache.attend(layer_id, q[:, :, chunk]))
        return torch.cat(outputs, dim=2)

    def rank(transport: Transport) -> tuple[Tensor, float]:
        tier = ModelledTier(HostTier(capacity_bytes=400 * stride), latency_s=1e-3, bytes_per_s=1e9)
        with Overlap(transport, shortest_s=shortest_s) as overlap:
            runtime = attrs.evolve(
                near, transport=overlap, sharding=TokenRange(tokens=32), tiers=[tier], demotion=FurthestLayer(),
                predictor=AsThisLayer(), overlap=overlap,
            )  # fmt: skip
            pool = pikv.PagePool(MODEL, runtime, capacity_bytes=32 * stride)
            cache = pikv.PiKVCache(MODEL, runtime, pool=pool)
            output = decode(cache)
            cache.pool.check_integrity()
            assert PREFETCH in overlap.work_s
            assert bool(overlap.use["all_gather"].threaded) == (shortest_s == 0)
            return output, cache._prefetcher.foresight.hit_rate

    expected = decode(pikv.PiKVCache(MODEL, near))
    for output, hit_rate in run_ranks(2, rank):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
        assert hit_rate > 0.9


def test_a_rank_that_fails_leaves_no_work_behind() -> None:
    """What was offered is done, though the collective raises."""
    transport = FakeTransport.group(2, timeout_s=0.2)[0]
    done: list[int] = []
    with Overlap(transport, shortest_s=0.0) as overlap:
        with pytest.raises(pikv.TransportError):
            overlap.barrier()
        overlap.offer(PREFETCH, lambda: done.append(1))
    assert done == [1]
