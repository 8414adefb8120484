"""The flags that all tasks have, and what their scripts say when a run cannot begin."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="peft is missing: pikv[tasks]")

from downstream_tasks.shared import flags  # after the skip
from downstream_tasks.shared.errors import TaskError
from downstream_tasks.text_classification import train

SCRIPT = Path(train.__file__)


def parse(*line: object) -> Any:
    made = flags.parser(None, train_samples=8, eval_samples=4, max_tokens=64)
    return flags.parse(made, ["--output", "out", *map(str, line)])


def test_the_defaults_are_those_of_the_documentation() -> None:
    """Rank 4, alpha 1, batches of 32, a rate of 1e-4, 10 epochs, the shipped model."""
    asked = parse()
    assert (asked.rank, asked.alpha, asked.batch_size, asked.learning_rate, asked.num_epochs) == (4, 1.0, 32, 1e-4, 10)
    assert asked.model.endswith("tiny_moe")
    assert (asked.model_type, asked.use_lora, asked.eval_only, asked.resume) == ("single", False, False, None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.toml", 'rank = 8\nuse_lora = true\neval_only = false\ncache = ["int8", "int4"]\n'),
        ("run.json", '{"rank": 8, "use_lora": true, "eval_only": false, "cache": ["int8", "int4"]}'),
    ],
)
def test_a_file_has_flags_and_the_command_line_wins(tmp_path: Path, name: str, text: str) -> None:
    """A value of the file stands unless the command line gives another."""
    (tmp_path / name).write_text(text)
    asked = parse("--config", tmp_path / name)
    assert (asked.rank, asked.use_lora, asked.eval_only, asked.cache) == (8, True, False, ["int8", "int4"])
    assert parse("--config", tmp_path / name, "--rank", 2).rank == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate = 1e-3", "has 'lerning_rate', which is no flag; did you mean 'learning_rate'?"),
        ("rank = = 3", "must be a TOML or JSON file of flags"),
        ("rank = 0", "argument --rank: must be above 0, got 0"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the file and what is wrong in it."""
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(SystemExit):
        parse("--config", tmp_path / "run.toml")
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--dtype", "float16", "--device", "cpu"), "--dtype float16 trains on a GPU only; use --dtype bfloat16"),
        (("--eval_only", "--resume"), "there is nothing to --resume"),
        (("--output", __file__), "test_flags.py is a file; name a folder"),
        (("--validation", "--data", "rows.jsonl"), "give --data the split to choose flags by"),
        (("--expert_parallel",), "--expert_parallel splits experts over processes; add --model_type distributed"),
        (("--expert_parallel", "--model_type", "distributed", "--use_lora"), "adapters are small"),
    ],
)
def test_flags_that_do_not_go_together(line: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused with what to do instead."""
    with pytest.raises(SystemExit):
        parse(*line)
    assert message in capsys.readouterr().err


def distributed(tmp_path: Path, *line: object) -> None:
    train.main(["--output", str(tmp_path), "--model_type", "distributed", *map(str, line)])


def environment(monkeypatch: pytest.MonkeyPatch, port: int, **more: str) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")


def test_distributed_needs_others(tmp_path: Path) -> None:
    """Without torchrun or the four variables the message gives the command."""
    with pytest.raises(TaskError, match=r"needs RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the .* `torchrun"):
        distributed(tmp_path)


def test_several_processes_are_not_single(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun without --model_type distributed is a mistake that is named."""
    environment(monkeypatch, 1)
    with pytest.raises(TaskError, match="2 processes were started for --model_type single; add"):
        train.main(["--output", str(tmp_path)])


def test_a_port_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the port and how to get a free one."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment(monkeypatch, taken.getsockname()[1])
        with pytest.raises(TaskError, match=r"port 127.0.0.1:\d+ is in use by another program; set MASTER_PORT"):
            distributed(tmp_path)


def test_others_that_do_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits in vain says for whom, and where."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment(monkeypatch, port)
    with pytest.raises(TaskError, match=r"rank 0 could not meet the other 1 processes at 127.0.0.1:\d+ within 1 s"):
        distributed(tmp_path, "--timeout_s", 1)


def test_a_batch_is_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A global batch that the processes cannot share is refused."""
    environment(monkeypatch, 1)
    with pytest.raises(TaskError, match=r"--batch_size must be a multiple of .* = 2 \* 1, got 33"):
        distributed(tmp_path, "--batch_size", 33)


def test_weights_that_are_cut_short(tmp_path: Path, small_model: Path) -> None:
    """A model's folder whose weights cannot be read is an error of --model."""
    shutil.copytree(small_model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TaskError, match=r"--model .* must be a folder that transformers saved"):
        train.main(["--output", str(tmp_path / "out"), "--model", str(tmp_path / "model")])


@pytest.mark.slow
def test_bad_data_ends_all_processes(tmp_path: Path, start: Any) -> None:
    """Under torchrun each says what is wrong with the data, and none waits for another."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    line = (SCRIPT, "--output", tmp_path / "out", "--data", tmp_path / "rows.jsonl", "--model_type", "distributed")
    done = start(*line, processes=2)
    assert done.returncode != 0
    assert "error: --data" in done.stderr
    assert "train row 1 lacks label and has text; rename its columns to text, label" in done.stderr


def test_a_script_ends_with_one_line(tmp_path: Path, start: Any) -> None:
    """What a user can mend is said without a traceback, with exit code 2."""
    done = start(SCRIPT, "--output", tmp_path, "--model", tmp_path / "nothing")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --model ")
    assert "Traceback" not in done.stderr
