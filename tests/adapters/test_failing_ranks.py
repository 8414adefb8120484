"""Ranks that die, hang or disagree: the others end, and say why. With real processes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = str(Path(__file__).with_name("failing_ranks.py"))
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
ENDED_S = 60.0  # the deadline is 3 s; the rest is for a busy machine, on which two interpreters import torch

needs_mpi = [
    pytest.mark.mpi,
    pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="no mpi4py: pip install pikv[mpi]"),
    pytest.mark.skipif(MPIRUN is None, reason="no mpirun next to python or on PATH: pip install pikv[mpi]"),
]


def processes(ranks: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Processes that join each other by gloo, without a launcher that would end them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, PROGRAM, "torch", *arguments],
            env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def ended(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """The exit codes and what was said, rank 1's after it has been killed: it may hang."""
    failed = started[1]
    others = [each for each in started if each is not failed]
    said = {id(each): each.communicate(timeout=ENDED_S)[1] for each in others}
    failed.kill()
    said[id(failed)] = failed.communicate(timeout=ENDED_S)[1]
    return [(each.returncode, said[id(each)]) for each in started]


def check_finished(started: list[subprocess.Popen[str]]) -> None:
    """All end well."""
    said = [each.communicate(timeout=ENDED_S)[1] for each in started]
    assert [each.returncode for each in started] == [0] * len(started), said


@pytest.mark.parametrize("failure", ["killed", "hangs"])
def test_processes_of_torch_end_when_one_fails(failure):
    """By an error that names the operation, the rank and the time."""
    code, said = ended(processes(2, failure))[0]
    assert code == os.EX_TEMPFAIL, said
    assert re.search(r"TransportError: (all_gather|barrier) failed on rank 0 of 2 after \d+\.\d s", said), said


def test_gloo_ends_a_process_that_is_sent_another_length():
    """At once, and says so itself: not by an error that could be caught."""
    code, said = ended(processes(2, "truncated"))[0]
    assert code != 0
    assert "Received data size doesn't match expected size" in said


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=needs_mpi)])
def test_processes_of_mpi_end_when_one_hangs(ranks):
    """When the deadline is over, by an error that names the operation, the rank and the time."""
    command = [str(MPIRUN), "-n", str(ranks), sys.executable, PROGRAM, "mpi", "hangs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ENDED_S, check=False)
    assert done.returncode != 0
    said = r"TransportError: all_gather on rank 0 of 2 is not done after 3\.\d s"
    assert re.search(said, done.stderr), done.stderr


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=needs_mpi)])
def test_mpich_ends_a_process_that_is_sent_another_length(ranks):
    """At once, and says so itself: not by an error that could be caught."""
    command = [str(MPIRUN), "-n", str(ranks), sys.executable, PROGRAM, "mpi", "truncated"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ENDED_S, check=False)
    assert done.returncode != 0
    assert re.search(r"rank \d in comm .*Allgather.*truncated", done.stderr), done.stderr


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=needs_mpi)])
def test_mpirun_ends_the_job_of_a_killed_rank(ranks):
    """At once."""
    command = [str(MPIRUN), "-n", str(ranks), sys.executable, PROGRAM, "mpi", "killed"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=ENDED_S, check=False).returncode != 0


@pytest.mark.skipif(importlib.util.find_spec("obstore") is None, reason="no obstore: pip install pikv[zarr]")
def test_a_restart_goes_on_from_the_last_commit(tmp_path):
    """With the answers of ranks that nothing has happened to, bit for bit."""
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder in (undisturbed, disturbed):
        folder.mkdir()
    check_finished(processes(2, "none", str(undisturbed)))
    code, said = ended(processes(2, "killed", str(disturbed)))[0]
    assert code == os.EX_TEMPFAIL, said
    assert "all_gather failed on rank 0 of 2" in said
    check_finished(processes(2, "none", str(disturbed)))
    for rank in range(2):
        expected, got = (torch.load(folder / f"answers-{rank}.pt") for folder in (undisturbed, disturbed))
        assert torch.equal(got, expected[-len(got) :])
        assert len(got) == 40
