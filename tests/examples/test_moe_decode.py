from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "examples" / "moe_decode.py"
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
PROMPT = [*"the quick brown fox jumps over the lazy dog; " * 14]  # 630 characters

needs_mpi = [
    pytest.mark.mpi,
    pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="no mpi4py: pip install pikv[mpi]"),
    pytest.mark.skipif(MPIRUN is None, reason="no mpirun next to python or on PATH: pip install pikv[mpi]"),
]
every_count_of_ranks = pytest.mark.parametrize(
    "ranks", [1, *(pytest.param(ranks, marks=needs_mpi) for ranks in (2, 4))]
)


def moe_decode(ranks, *arguments):
    launcher = [str(MPIRUN), "-n", str(ranks)] if ranks > 1 else []
    command = [*launcher, sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("".join(PROMPT), "utf-8")
    return file


def check_decoding(model_folder, prompt_file, ranks, *more):
    sizes = ["--page-size", 16, "--tail-tokens", 16, "--tokens", 40, "--chunk", 100]
    done = moe_decode(ranks, "--model", model_folder, "--prompt-file", prompt_file, "--verify", *sizes, *more)
    assert done.returncode == 0, done.stderr
    assert "40 of 40 tokens agree" in done.stdout
    assert f"ranks: {ranks}\n" in done.stdout
    rows = re.findall(r"^ +\d+ +([\d,]+) +([\d,]+) ", done.stdout, re.MULTILINE)
    pages = [int(pages.replace(",", "")) for pages, _ in rows]
    assert len(pages) == ranks
    assert all(pages), "every rank seals pages"
    return done.stdout


@every_count_of_ranks
def test_decoding_agrees_with_the_dense_decoder(model_folder, prompt_file, ranks):
    """All tokens, on one rank and on several, and each rank stores its share only: its heads, and its tokens."""
    assert "KvHeads(tokens=64)" in check_decoding(model_folder, prompt_file, ranks)


SHARDINGS = {"token_range": "TokenRange(tokens=64)", "experts": "ExpertGroups(tokens=64)"}


@pytest.mark.parametrize("ranks", [pytest.param(ranks, marks=needs_mpi) for ranks in (2, 4)])
@pytest.mark.parametrize(("name", "sharding"), SHARDINGS.items(), ids=SHARDINGS)
def test_decoding_by_other_shardings_agrees(model_folder, prompt_file, ranks, name, sharding):
    """As by KV head; what is sent is counted, and far less than the pages that stay where they are."""
    said = check_decoding(model_folder, prompt_file, ranks, "--shard-by", name)
    assert sharding in said
    counted = re.search(r"attention ([\d,]+), experts ([\d,]+); pages moved to the queries would be ([\d,]+)", said)
    attention, experts, pages = (int(number.replace(",", "")) for number in counted.groups())
    assert 0 < attention < pages / 20
    assert experts > 0


def test_a_rank_that_is_alone_routes_its_tokens(model_folder, prompt_file):
    """And sends nothing."""
    assert "attention 0, experts 0;" in check_decoding(model_folder, prompt_file, 1, "--shard-by", "experts")


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=needs_mpi)])
def test_a_router_avoids_a_slow_rank(model_folder, prompt_file, ranks):
    """By the time that it measures: the slow rank's experts get fewer tokens than without it."""
    common = [
        "--model",
        model_folder,
        "--prompt-file",
        prompt_file,
        "--tokens",
        20,
        "--chunk",
        100,
        "--slow-rank",
        "1:2",
    ]
    shares = []
    for router in ("top_k", "latency_aware"):
        done = moe_decode(ranks, *common, "--router", router)
        assert done.returncode == 0, done.stderr
        tokens = [int(count.replace(",", "")) for count in re.findall(r"rank \d ([\d,]+) in", done.stdout)]
        shares.append(tokens[1] / sum(tokens))
    assert shares[1] < shares[0] / 2


def test_a_timeline_is_written(model_folder, prompt_file, tmp_path):
    """A trace that says what ran when."""
    file = tmp_path / "trace.json"
    check_decoding(model_folder, prompt_file, 1, "--timeline", file, "--far-tier", "1:1")
    names = {event["name"] for event in json.loads(file.read_text())["traceEvents"]}
    assert {"all_gather", "all_to_all", "prefetch"} <= names


def test_torchrun_starts_it_too(model_folder, prompt_file):
    """Without MPI."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PROGRAM)]
    command += ["--model", model_folder, "--prompt-file", prompt_file, "--verify", "--tokens", "20"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "20 of 20 tokens agree" in done.stdout
    assert "ranks: 2\n" in done.stdout


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpi)])
@pytest.mark.parametrize("overlap", ["--overlap", "--no-overlap"])
def test_decoding_from_far_memory_agrees(model_folder, prompt_file, ranks, overlap):
    """Pages that are fetched, ahead or when needed, are the pages that were stored; what was hidden is said."""
    said = check_decoding(model_folder, prompt_file, ranks, "--far-tier", "1:1", overlap, "--tokens", 40)
    assert re.search(r"far tier, a model: 0\.[0-9]+ s of reads, [0-9.]+ s exposed, [0-9]+% hidden", said)
    assert ("Overlap: none" in said) == (overlap == "--no-overlap")
    assert ("prefetch: " in said) == (overlap == "--overlap")


def test_the_default_prompt_asks_for_a_pair_that_it_hides(model_folder):
    """It is deterministic, and the question is the last line."""
    done = moe_decode(1, "--model", model_folder, "--tokens", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("@Q")


def test_lossy_parts_are_reported(model_folder, prompt_file):
    """With a budget far below the prompt the same numbers come, and the exit code says that they differ."""
    budget = [
        "--budget-tokens",
        64,
        "--token-selector",
        "recent",
        "--page-size",
        16,
        "--tail-tokens",
        16,
        "--tokens",
        10,
    ]
    done = moe_decode(1, "--model", model_folder, "--prompt-file", prompt_file, "--verify", *budget)
    assert done.returncode == 1
    assert "of 10 tokens agree" in done.stdout


MISTAKES = {
    "no such model": (["--model", "/nonexistent"], "/nonexistent"),
    "no such prompt": (["--prompt-file", "/nonexistent"], "/nonexistent"),
    "an empty prompt": (["--prompt", ""], "at least one token"),
    "a count that is none": (["--tokens", "0"], "--tokens"),
    "an unknown flag": (["--page-sise", "16"], "--page-sise"),
    "a far tier without a speed": (["--far-tier", "2"], "MS:GB"),
    "a slow rank without a time": (["--slow-rank", "1"], "RANK:MS"),
    "an unknown name": (["--compressor", "nonesuch"], "nonesuch"),
}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpi)])
@pytest.mark.parametrize(("arguments", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(model_folder, ranks, arguments, named):
    """Said once, whatever the number of ranks, with exit code 2 and what is wrong."""
    done = moe_decode(ranks, "--model", model_folder, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert named in done.stderr


def test_help_shows_examples():
    """One can copy them."""
    done = moe_decode(1, "--help")
    assert done.returncode == 0
    assert "mpirun -n 4 python examples/moe_decode.py --verify" in done.stdout
