"""`pikv plan`, as a user types it, and the arithmetic behind its columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pikv.cli.main import main
from pikv.compositions import full_bytes, parse
from pikv.planning.known import known
from pikv.planning.rows import Machines, Workload, plan, prompt_operations, wire

MODEL = str(Path(__file__).parents[2] / "downstream_tasks" / "models" / "tiny_moe")
STATED = Machines(ranks=2, memory_bytes=80 * 10**9, memory_bandwidth=1e12, link=1e10, flops=1e14)


def workload(
    name: str = "mixtral-8x7b", *, machines: Machines = STATED, tokens: int = 8192, batch: int = 4
) -> Workload:
    shape = known(name)
    return Workload(shape=shape, model=shape.model, machines=machines, tokens=tokens, batch=batch)


def test_a_row_follows_from_bytes_and_rates() -> None:
    """Of one rank: half of weights and cache; 4 times 8192 tokens are 4 GiB in Mixtral, beside positions."""
    work = workload()
    row = plan(work, parse("exact"))
    assert full_bytes(work.model, 8192) == 2**30
    assert row.share == pytest.approx(1, abs=0.03)
    assert row.cache_bytes == pytest.approx(2 * 2**30, rel=0.03)
    weights = STATED.weight_bytes(work.shape.read_parameters(4))
    assert row.cache_ms == pytest.approx(2 * 2**30 / 1e12 * 1e3, rel=0.03)
    assert row.token_ms == pytest.approx(row.cache_ms + weights / 1e12 * 1e3)
    assert row.fetch_ms == pytest.approx(2**30 / 1e10 * 1e3, rel=0.03)
    assert row.recompute_ms == pytest.approx(prompt_operations(work.shape, 8192) / 2 / 1e14 * 1e3)


def test_what_fits_fits_and_no_more() -> None:
    """Beside all weights, on all ranks together."""
    work = workload()
    row, free = plan(work, parse("int8")), 2 * 80e9 - 2 * work.shape.parameters
    assert row.most_sequences is not None
    assert row.longest_context is not None
    per_sequence = work.cache(parse("int8"), batch=1).total
    assert row.most_sequences * per_sequence <= free < (row.most_sequences + 1) * per_sequence
    assert work.cache(parse("int8"), tokens=row.longest_context).total <= free
    assert work.cache(parse("int8"), tokens=int(1.01 * row.longest_context)).total > free


def test_weights_that_do_not_fit_leave_nothing() -> None:
    """No sequence and no context."""
    row = plan(workload(machines=Machines(memory_bytes=10**9)), parse("exact"))
    assert (row.most_sequences, row.longest_context, row.token_ms) == (0, 0, None)


def test_operations_of_a_prompt() -> None:
    """Two a parameter and token; causal attention, within a window where there is one."""
    shape = known("gpt-oss-20b")
    pairs = sum(
        sum(min(position + 1, layer.window or 1000) for position in range(1000)) for layer in shape.model.layers
    )
    expected = 2 * shape.active_parameters * 1000 + 2 * 64 * (64 + 64) * pairs
    assert prompt_operations(shape, 1000) == expected


def test_bytes_on_the_wire() -> None:
    """Experts, queries and pages of one step, over two ranks."""
    work = workload(batch=1)
    across = wire(work, parse("exact"))
    assert across.experts == 2 * 4096 * 2 * 2 * 32 / 2  # there and back, bfloat16, two experts, layers, half remote
    assert across.queries == 32 * 32 * (256 * 2 + 4)
    assert across.pages == pytest.approx(2**30 / 2, rel=0.03)


def test_a_table_with_what_was_stated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Latents and expanded heads, each its own table; a plot."""
    figure = tmp_path / "plan.svg"
    arguments = ["--context", "4096", "--memory", "80GB", "--ranks", "16", "--layers", "--plot", str(figure)]
    assert main(["plan", "deepseek-v3", "--cache", "int4", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "latents in bfloat16" in printed
    assert "expanded heads in bfloat16" in printed
    assert "longest context" in printed
    assert "ms a token" not in printed
    assert "MiB to experts" in printed
    assert printed.count("| 60 |") == 2
    assert figure.read_text().startswith("<?xml")


def test_json_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """A model of one's own, read by transformers."""
    assert main(["plan", MODEL, "--cache", "int8", "--link", "1", "--tflops", "0.1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert row["composition"] == "int8"
    assert len(row["layer_bytes"]) == 4
    assert 0.4 < row["share"] < 0.7
    assert row["fetch_ms"] < row["recompute_ms"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mixtral-8x7b", "--context", "0"], "tokens must be a positive"),
        (["mixtral-8x7b", "--dtype", "int9"], "--dtype must be"),
        (["mixtral-8x7b", "--cache", "int5"], "no part is called 'int5'"),
        (["./nowhere"], "neither a model whose numbers are built in"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_size_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    """Is refused with the units there are."""
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "mixtral-8x7b", "--memory", "80XB"])
    assert "GIB" in capsys.readouterr().err


def test_the_models_that_are_built_in(capsys: pytest.CaptureFixture[str]) -> None:
    """By name."""
    assert main(["plan", "list"]) == 0
    assert "qwen3-235b-a22b" in capsys.readouterr().out
