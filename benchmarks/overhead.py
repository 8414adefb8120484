"""What one decode step costs beside reading the bytes: `update` and `attend` of one token, broken down by part.

    python benchmarks/overhead.py [--tokens 64] [--steps 100] [--rounds 20] [--batch 1] [--budget]

A small context, so that little is left but the overhead. Prints microseconds a step: the median, and the least, which
is what the step costs while everything it touches is in the processor's caches. Each part is timed without the parts
below it; timing adds about half a microsecond to each. "kernel" is compiled code, "launch" what leads to it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import torch

import pikv
from pikv.adapters.numba_cpu.kernel import NumbaAttend
from pikv.adapters.numba_cpu.launch import Launch
from pikv.core import cache as pipeline
from pikv.core import checks, reading
from pikv.core.layer import LayerCache
from pikv.core.tail import Tail
from pikv.policies import Recent

PARTS = {
    "update: checks": [(checks, "new_tokens"), (checks, "positions"), (checks, "increasing"), (checks, "same_batch")],
    "update: bookkeeping": [(LayerCache, "append")],
    "update: copy to the tail": [(Tail, "append_all")],
    "attend: checks": [(checks, "tensor")],
    "attend: settle": [(pipeline.PiKVCache, "_settle")],
    "attend: pages and shapes": [(reading, "attend")],
    "attend: launch": [(NumbaAttend, "_attend")],
    "attend: kernel": [(Launch, "__call__")],
}


@attrs.define
class Clock:
    """Seconds spent in each part, without the parts called from it."""

    spent: dict[str, list[float]] = attrs.field(factory=lambda: defaultdict(list))
    _below: list[float] = attrs.field(factory=list)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._below.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - started
                self.spent[part].append(elapsed - self._below.pop())
                if self._below:
                    self._below[-1] += elapsed

        return run

    @contextmanager
    def watching(self, part: str, owner: Any, name: str) -> Iterator[None]:
        """While this is open, calls of a function are timed."""
        function = getattr(owner, name)
        setattr(owner, name, self.timed(part, function))
        try:
            yield
        finally:
            setattr(owner, name, function)


def decode(cache: pikv.PiKVCache, states: list[torch.Tensor], start: int, steps: int, clock: Clock) -> None:
    """Decode one token a step, timing whole calls."""
    k, v, q = states
    update, attend = clock.timed("update", cache.update), clock.timed("attend", cache.attend)
    for position in range(start, start + steps):
        update(0, position, k, v)
        attend(0, q)


def report(clock: Clock, steps: int) -> None:
    """Print a line for each part: its median, its least, and its calls a step."""
    for part, seconds in clock.spent.items():
        calls = len(seconds) / steps
        median, least = statistics.median(seconds) * 1e6 * calls, min(seconds) * 1e6 * calls
        print(f"{part:26} {median:7.1f} median {least:7.1f} least {calls:5.1f} calls")


def main() -> None:
    """Measure whole calls without, then parts with timers inside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="of context to begin with")
    parser.add_argument("--steps", type=int, default=100, help="decoded after it")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", action="store_true", help="compose a budget that is not reached")
    arguments = parser.parse_args()

    model = pikv.ModelConfig(layers=1, query_heads=32, kv_heads=8, head_dim=128)
    parts = {"token_selector": Recent(sinks=4, recent=64), "budget_tokens": 1 << 20} if arguments.budget else {}
    cache = pikv.compose(model, **parts)
    print(cache.describe(), f"\n\n{arguments.tokens} tokens and up, batch {arguments.batch}, microseconds a step\n")
    heads = (8, 8, 32)
    prompt = [torch.randn(arguments.batch, n, arguments.tokens, 128) for n in heads]
    token = [torch.randn(arguments.batch, n, 1, 128) for n in heads]
    whole, broken_down = Clock(), Clock()
    for clock in (Clock(), whole, broken_down):  # the first compiles and warms up
        for _ in range(arguments.rounds):
            cache.reset()
            cache.update(0, 0, *prompt[:2])
            cache.attend(0, prompt[2])
            with ExitStack() as watched:
                if clock is broken_down:
                    for part, functions in PARTS.items():
                        for owner, name in functions:
                            watched.enter_context(clock.watching(part, owner, name))
                decode(cache, token, arguments.tokens, arguments.steps, clock)
    for clock in (whole, broken_down):
        report(clock, arguments.rounds * arguments.steps)
        print()


if __name__ == "__main__":
    main()
