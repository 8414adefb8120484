"""A process that is killed while it commits, and writes that a power cut loses: a version is there, whole, or not."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import commit_until_killed as program
import pytest
import torch

import pikv
from pikv.adapters.zarr_store import ZarrStreamer

SCRIPT = Path(program.__file__)
BOUNDARIES = ("pwrite", "fsync", "link", "unlink", "mkdir")


def check_versions(folder, *, at_least):
    """Every version that there is, is whole, and what it must be; none that was reported is missing."""
    runtime = program.runtime_of(folder)
    versions = runtime.streamer.versions()
    assert len(versions) >= at_least
    assert [version.number for version in versions] == list(range(1, len(versions) + 1))
    for version in versions[-2:]:
        restored, expected = pikv.PiKVCache.restore(program.MODEL, runtime, version), program.at(version.number)
        for one, other in zip(
            program.extend(restored, version.number + 1), program.extend(expected, version.number + 1), strict=True
        ):
            assert torch.equal(one, other)
    for version in versions:
        runtime.streamer.check(version)
    runtime.streamer.close()
    return len(versions)


def kill_while_committing(folder, generator):
    """Let a process commit, and kill it at a random moment; returns the last version that it said it had made."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(generator.uniform(0.0, 0.15))  # the random moment: anywhere in the first few commits
    process.send_signal(signal.SIGKILL)
    said = process.stdout.read().split()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    whole = [line for line in said if line.isdigit()]
    return int(whole[-1]) if whole else 0


def kills(folder, times):
    generator, made = random.Random(0), 0
    for _ in range(times):
        made = max(made, kill_while_committing(folder, generator))
        made = check_versions(folder, at_least=made)
    assert made > 0


def test_a_process_that_is_killed_loses_no_version(tmp_path):
    """SIGKILL at two random moments; the next process goes on from the newest version."""
    kills(tmp_path, 2)


@pytest.mark.slow  # each kill starts an interpreter
def test_forty_processes_that_are_killed_lose_no_version(tmp_path):
    """The same, forty times on one store."""
    kills(tmp_path, 40)


class StopHere(BaseException):  # no error: what a kill is to the code that it stops
    pass


def boundaries(folder, monkeypatch, stop_at):
    """Make version 2 and stop before system call number `stop_at`; returns how many there were if none was stopped."""
    runtime = program.runtime_of(folder)
    cache = pikv.PiKVCache(program.MODEL, runtime)
    program.extend(cache, 1)
    cache.commit()
    calls = 0
    with monkeypatch.context() as patch:
        for name in BOUNDARIES:
            real = getattr(os, name)

            def stopping(*args, real=real, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= stop_at:  # and all after it: a killed process does nothing more
                    raise StopHere
                return real(*args, **kwargs)

            patch.setattr(os, name, stopping)
        program.extend(cache, 2)
        with contextlib.suppress(StopHere):
            cache.commit()
    runtime.streamer.close()
    return calls


def test_stopped_before_every_system_call_of_a_commit(tmp_path, monkeypatch):
    """What is restored is the old version or the new one, whole, wherever the commit ends."""
    total = boundaries(tmp_path / "whole", monkeypatch, stop_at=10**9)
    assert total > 20
    seen = set()
    for stop_at in range(1, total + 1):
        folder = tmp_path / str(stop_at)
        boundaries(folder, monkeypatch, stop_at)
        seen.add(check_versions(folder, at_least=1))
        shutil.rmtree(folder)
    assert seen == {1, 2}


@attrs.define
class Disk:
    """What a folder's disk would hold after a power cut: files' bytes and folders' names as of their last sync."""

    root: Path
    synced: dict[str, bytes] = attrs.field(factory=dict)
    names: set[str] = attrs.field(factory=set)

    def sync(self, path: Path) -> None:
        name = os.path.relpath(path, self.root)
        if path.is_dir():
            inside = {os.path.relpath(each, self.root) for each in path.iterdir()}
            self.names = {each for each in self.names if str(Path(each).parent) != name} | inside
        else:
            self.synced[str(path.stat().st_ino)] = path.read_bytes()

    def after_a_power_cut(self, folder: Path, inodes: dict[str, str]) -> None:
        """Write to a folder what is left: names that were synced, of bytes that were; unsynced bytes are none."""
        for name in sorted(self.names):
            if name in inodes and all(str(parent) in self.names | {"."} for parent in Path(name).parents):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.synced.get(inodes[name], b""))


def test_a_power_cut_after_every_sync(tmp_path, monkeypatch):
    """With all that was not synced lost, the newest version is the old one or the new one, whole."""
    root = tmp_path / "store"
    disk, cuts = Disk(root), []
    real = os.fsync

    def synced(file):
        real(file)
        disk.sync(Path(f"/proc/self/fd/{file}").readlink())
        inodes = {os.path.relpath(each, root): str(each.stat().st_ino) for each in root.rglob("*") if each.is_file()}
        cut = tmp_path / f"cut{len(cuts)}"
        cut.mkdir()
        disk.after_a_power_cut(cut, inodes)
        cuts.append((cut, committed))

    committed = 0
    monkeypatch.setattr(os, "fsync", synced)
    runtime = program.runtime_of(root)
    cache = pikv.PiKVCache(program.MODEL, runtime)
    for number in (1, 2):
        program.extend(cache, number)
        cache.commit()
        committed = number
    runtime.streamer.close()
    monkeypatch.setattr(os, "fsync", real)
    assert len(cuts) > 20
    seen = {check_versions(cut, at_least=at_least) for cut, at_least in cuts}
    assert seen == {0, 1, 2}


def test_two_processes_on_one_store(tmp_path):
    """Numbers are not taken twice, and both processes' versions are whole."""
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # both commit as fast as they can meanwhile; what they made is read from what they said
    made = []
    for process in processes:
        process.kill()
        made += [int(line) for line in process.stdout.read().split() if line.isdigit()]
        process.stdout.close()
        process.wait()
    assert len(set(made)) == len(made) > 1
    with ZarrStreamer(tmp_path) as streamer:
        assert {version.number for version in streamer.versions()} >= set(made)
        for version in streamer.versions():
            streamer.check(version)
