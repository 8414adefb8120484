"""Processes that share a prompt by a folder and by a bucket: races, kills, and a reader that comes too early."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import share_prefixes as program
from s3_server import make_bucket, serving

import pikv
from pikv.adapters.zarr_store import StoredPrefixes

PAGES = program.COVERED // 16 * len(program.MODEL.layers)


@pytest.fixture(scope="module")
def endpoint():
    with serving() as endpoint:
        yield endpoint


@pytest.fixture(params=["folder", "bucket"])
def where(request, tmp_path):
    """The arguments that name an empty store."""
    if request.param == "folder":
        return (str(tmp_path),)
    endpoint, name = request.getfixturevalue("endpoint"), f"test-{random.randrange(10**9)}"
    make_bucket(endpoint, name)
    return (endpoint, name)


@contextlib.contextmanager
def process(role, *where):
    """A process that is ready, and waits to be told to begin."""
    started = subprocess.Popen(
        [sys.executable, program.__file__, role, *where], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout.readline() == "ready\n"
    yield started
    started.kill()
    started.communicate()


def go(*processes):
    for each in processes:
        each.stdin.write("\n")
        each.stdin.flush()


def outcome(started):
    """What it covered and answered; it has let go of every page."""
    covered, answer, leaked = started.stdout.read().split()[-3:]
    assert started.wait() == 0
    assert leaked == "0"
    return int(covered), float(answer)


def expected():
    """What a process alone answers."""
    return program.feed(pikv.PiKVCache(program.MODEL, pikv.RuntimeConfig(page_size=16, tail_tokens=16)), 0)


def check_store(where, pages=PAGES):
    """It holds each page once, whole."""
    with StoredPrefixes(program.place(*where)) as store:
        names = [name for name in store._objects.list("prefixes") if not name.endswith(".partial")]
        assert len(names) == pages
        cache = program.cache_on(store)
        covered = int(cache.begin(program.TOKENS, weights="any"))
        assert program.feed(cache, covered) == pytest.approx(expected(), abs=1e-3)
    return covered


def test_two_processes_that_race_leave_one_copy(where):
    """Both compute the prompt at the same time, and say the same."""
    with process("compute", *where) as one, process("compute", *where) as other:
        go(one, other)
        for each in (one, other):
            assert outcome(each)[1] == pytest.approx(expected(), abs=1e-3)
    assert check_store(where) == program.COVERED


def test_a_reader_that_comes_too_early_follows_the_writer(where):
    """It waits for each layer as the other process writes it, and says the same."""
    with process("follow", *where) as reader, process("compute-slowly", *where) as writer:
        go(reader)
        time.sleep(0.1)  # the reader finds nothing at all
        go(writer)
        assert outcome(reader) == (program.COVERED, pytest.approx(expected(), abs=1e-3))
        outcome(writer)
    assert check_store(where) == program.COVERED


def killed(where, after_s):
    """A writer that is killed so long after its first layer was written."""
    with process("compute-slowly", *where) as writer:
        go(writer)
        assert writer.stdout.readline() == "layer 0\n"
        time.sleep(after_s)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL


def test_a_writer_that_is_killed_leaves_nothing_that_is_adopted(where):
    """SIGKILL in the middle of a prompt: a follower is told which page does not come, and the next process computes."""
    killed(where, 0.02)
    with StoredPrefixes(program.place(*where)) as store:
        cache = program.cache_on(store)
        assert cache.begin(program.TOKENS, weights="any", wait_s=0.05).tolist() == [program.COVERED]
        with pytest.raises(pikv.WaitTimeoutError, match=r"page \d+ of 17 of layer [123]"):
            program.feed(cache, program.COVERED)
        cache.reset()
        assert cache.begin(program.TOKENS, weights="any").tolist() == [0]
        assert program.feed(cache, 0) == pytest.approx(expected(), abs=1e-3)
        store.flush()
        cache.pool.check_integrity()
    assert check_store(where) == program.COVERED


@pytest.mark.slow  # each kill starts an interpreter
def test_twenty_writers_that_are_killed(tmp_path):
    """At random moments, on one store: whatever is adopted is right."""
    generator = random.Random(0)
    for _ in range(20):
        killed((str(tmp_path),), generator.uniform(0, 0.2))
        with StoredPrefixes(tmp_path) as store:
            cache = program.cache_on(store)
            covered = int(cache.begin(program.TOKENS, weights="any"))
            cache.reset()
            lonely = pikv.PiKVCache(program.MODEL, pikv.RuntimeConfig(page_size=16, tail_tokens=16))
            assert covered in range(0, program.COVERED + 1, 16)
            assert program.feed(lonely, 0) == pytest.approx(expected(), abs=1e-3)
            for path in Path(tmp_path).rglob("*.3"):  # so that the next one has something to write
                path.unlink()
