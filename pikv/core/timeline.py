"""Timeline: what a rank did when, as a Chrome trace, which Perfetto opens."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import attrs
import torch

from pikv.core.ports.transport import Transport

LANES = ("collectives", "work")


@final
@attrs.define(kw_only=True)
class Timeline:
    """Spans of one rank, of which the newest `most` are kept. Ranks of one machine share the clock."""

    most: int = 100_000
    _spans: deque[tuple[str, str, float, float]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._spans = deque(maxlen=self.most)

    @contextmanager
    def span(self, name: str, lane: str) -> Iterator[None]:
        """Note the time in which this is open, in one of LANES."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append((name, lane, started, time.perf_counter()))

    def trace(self, transport: Transport) -> str:
        """The spans of all ranks as JSON, on rank 0; no events on others. All ranks call it."""
        mine = json.dumps(self._events(transport.rank)).encode()
        parts = [torch.empty(0, dtype=torch.uint8)] * transport.size
        parts[0] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        received = (bytes(part.tolist()) for part in transport.all_to_all(parts))
        events = [event for part in received if part for event in json.loads(part)]
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})

    def _events(self, rank: int) -> list[dict[str, object]]:
        named: list[dict[str, object]] = [
            {"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}},
            *(
                {"name": "thread_name", "ph": "M", "pid": rank, "tid": number, "args": {"name": lane}}
                for number, lane in enumerate(LANES)
            ),
        ]
        return named + [
            {
                "name": name,
                "ph": "X",
                "pid": rank,
                "tid": LANES.index(lane),
                "ts": 1e6 * start,
                "dur": 1e6 * (stop - start),
            }
            for name, lane, start, stop in self._spans
        ]
