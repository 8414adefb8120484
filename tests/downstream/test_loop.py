"""The training loop that the tasks share: in one process and in several, before and after a resume, with LoRA."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is missing: pikv[tasks]")
transformers = pytest.importorskip("transformers", reason="transformers is missing: pikv[tasks]")

from downstream_tasks.text_classification import train  # noqa: E402  # after the skips

SCRIPT = Path(train.__file__)
Line = Callable[..., list[str]]


def logged(output: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv."""
    with (output / "metrics.csv").open(newline="") as file:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]


def column(output: Path, name: str) -> Sequence[float]:
    return [row[name] for row in logged(output)]


def test_a_run_leaves_a_model_logs_and_results(trained: Path) -> None:
    """What was trained loads in transformers; losses are in CSV and TensorBoard; caches are compared in a table."""
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "model")
    assert model.config.model_type == "mixtral"
    assert column(trained, "step") == [1, 2, 3, 4, 5, 6]
    assert list((trained / "tensorboard").iterdir())
    written: dict[str, Any] = json.loads((trained / "results.json").read_text())
    full, int8 = written["caches"]
    assert (full["composition"], int8["composition"]) == ("exact", "int8")
    assert int8["bytes_a_prompt"] < full["bytes_a_prompt"]
    assert set(written["compared"]) == {
        "model, full fine-tuning",
        "majority class",
        "bag of words, logistic regression",
    }
    assert "| `int8` |" in (trained / "results.md").read_text()
    assert (trained / "results.svg").read_text().startswith("<?xml")


def test_the_load_is_balanced_over_all_tokens(trained: Path) -> None:
    """The logged balance is at least that of an even load, the experts that a token goes to."""
    assert all(2 <= balance < 4 for balance in column(trained, "load_balance"))


def test_a_resumed_run_has_the_same_losses(trained: Path, line: Line, tmp_path: Path) -> None:
    """Steps 4 to 6 from the checkpoint of step 3, in a folder where later rows were written, are the very same."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(trained / "metrics.csv", tmp_path / "metrics.csv")
    train.main(line(tmp_path, "--resume", tmp_path / "checkpoints" / "checkpoint-3"))
    assert logged(tmp_path) == logged(trained)


def test_a_resumed_run_of_adapters_has_the_same_losses(line: Line, tmp_path: Path) -> None:
    """So do adapters, which are read in peft's format."""
    train.main(line(tmp_path, "--use_lora"))
    whole = logged(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6")
    train.main(line(tmp_path, "--use_lora", "--resume"))
    assert logged(tmp_path) == whole


def test_parts_of_a_step_are_the_step(trained: Path, line: Line, tmp_path: Path) -> None:
    """Gradients summed over two halves of a batch give the losses of the whole; the balance is of each half."""
    train.main(line(tmp_path, "--gradient_accumulation", 2, "--load_balance", 0))
    whole = tmp_path / "whole"
    train.main(line(whole, "--load_balance", 0))
    assert column(tmp_path, "loss") == pytest.approx(column(whole, "loss"), abs=1e-4)


def test_adapters_are_a_tenth_and_merge(trained: Path, line: Line, tmp_path: Path, small_model: Path) -> None:
    """LoRA trains attention and experts, is saved in peft's format, and the merged model is base and adapters."""
    peft = pytest.importorskip("peft", reason="peft is missing: pikv[tasks]")
    train.main(line(tmp_path, "--use_lora", "--rank", 1, "--alpha", 2))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["trained"] < written["parameters"] / 10
    base = transformers.AutoModelForCausalLM.from_pretrained(small_model)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=ids).logits
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert not torch.allclose(adapted, before, atol=1e-3)
    names = set(peft.load_peft_weights(str(tmp_path / "adapter")))
    assert any("experts" in name for name in names)
    assert any("q_proj" in name for name in names)


def test_two_processes_are_one(trained: Path, line: Line, tmp_path: Path, start: Any) -> None:
    """Under torchrun the same global batch has the same losses and balance within 1e-4."""
    done = start(SCRIPT, *line(tmp_path, "--model_type", "distributed"), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("loss", "load_balance"):
        assert column(tmp_path, name) == pytest.approx(column(trained, name), abs=1e-4)


@pytest.mark.slow
def test_four_processes_are_one(trained: Path, line: Line, tmp_path: Path, start: Any) -> None:
    """So it is with four, and with adapters in four."""
    done = start(SCRIPT, *line(tmp_path, "--model_type", "distributed"), processes=4)
    assert done.returncode == 0, done.stderr[-2000:]
    assert column(tmp_path, "loss") == pytest.approx(column(trained, "loss"), abs=1e-4)
    alone, together = tmp_path / "alone", tmp_path / "together"
    train.main(line(alone, "--use_lora"))
    done = start(SCRIPT, *line(together, "--use_lora", "--model_type", "distributed"), processes=4)
    assert done.returncode == 0, done.stderr[-2000:]
    assert column(together, "loss") == pytest.approx(column(alone, "loss"), abs=1e-4)


def started(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that goes on by itself. What it says goes to a file: a pipe that nobody reads would fill up."""
    with log.open("w") as file:
        return subprocess.Popen(
            command, text=True, stdout=subprocess.DEVNULL, stderr=file, env={**os.environ, **environment}
        )


def await_checkpoint(output: Path, run: subprocess.Popen[str]) -> None:
    """Wait for any: the oldest are deleted as others come."""
    while not list(output.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert run.poll() is None, run.args
        time.sleep(0.01)


def killed(output: Path, others: list[subprocess.Popen[str]]) -> None:
    """Kill the newest of the processes once a checkpoint is written."""
    await_checkpoint(output, others[-1])
    others[-1].send_signal(signal.SIGKILL)
    others[-1].wait()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(line: Line, tmp_path: Path) -> None:
    """SIGKILL after a checkpoint, then --resume: all losses are those of a run that went through."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.main(line(whole, "--num_epochs", 60))
    command = [sys.executable, str(SCRIPT), *line(cut, "--num_epochs", 60)]
    killed(cut, [started(command, tmp_path / "log")])
    train.main(line(cut, "--num_epochs", 60, "--resume"))
    assert logged(cut) == logged(whole)


@pytest.mark.slow
def test_a_worker_that_dies_is_named(line: Line, tmp_path: Path) -> None:
    """The other one, started by the four variables, ends with what to do, not with a traceback alone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, str(SCRIPT), *line(tmp_path, "--model_type", "distributed", "--num_epochs", 400)]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [started(command, tmp_path / f"{rank}.log", **meeting, RANK=str(rank)) for rank in range(2)]
    killed(tmp_path, workers)
    assert workers[0].wait(timeout=300) == 2
    assert "rank 0: another of the 2 processes died or hangs" in (tmp_path / "0.log").read_text()


@pytest.mark.slow
def test_torchrun_names_a_worker_that_dies_and_goes_on(line: Line, tmp_path: Path, start: Any) -> None:
    """A killed worker ends torchrun, which says which one it was; with --resume the losses are those of one process."""
    longer = ("--num_epochs", 60)
    together, whole = tmp_path / "together", tmp_path / "whole"
    command = [str(SCRIPT), *line(together, "--model_type", "distributed", *longer)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = started([*torchrun, *command], tmp_path / "log")
    await_checkpoint(together, run)
    os.kill(int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[-1]), signal.SIGKILL)
    assert run.wait(timeout=300) != 0
    assert "Signal 9 (SIGKILL)" in (tmp_path / "log").read_text()
    done = start(*command, "--resume", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    train.main(line(whole, *longer))
    assert column(together, "loss") == pytest.approx(column(whole, "loss"), abs=1e-4)
