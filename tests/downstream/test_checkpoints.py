"""Checkpoints that a run cannot go on from, and what is said of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="peft is missing: pikv[tasks]")
transformers = pytest.importorskip("transformers", reason="transformers is missing: pikv[tasks]")

from downstream_tasks.shared.errors import TaskError  # noqa: E402  # after the skips
from downstream_tasks.text_classification import train  # noqa: E402

Line = Callable[..., list[str]]


@pytest.fixture
def kept(trained: Path, tmp_path: Path) -> Path:
    """An output folder with the checkpoints of a run."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def test_a_checkpoint_of_another_run_is_refused(kept: Path, line: Line) -> None:
    """The message names what differs, with both values."""
    with pytest.raises(TaskError, match=r"seed was 0 and is 1; give the same flags, or start without --resume"):
        train.main(line(kept, "--resume", "--seed", 1))
    with pytest.raises(TaskError, match=r"is of another model or run: model was 'MixtralForCausalLM'"):
        train.main(line(kept, "--resume", "--use_lora"))


def test_resume_needs_a_checkpoint(line: Line, tmp_path: Path) -> None:
    """A folder without one is an error that says so."""
    with pytest.raises(TaskError, match=r"--resume found no checkpoint in .*; start without it"):
        train.main(line(tmp_path, "--resume"))


def test_a_checkpoint_of_another_model_is_refused(kept: Path, line: Line, small_model: Path, tmp_path: Path) -> None:
    """A model of the same family and another size is told apart, by its parameters."""
    config = transformers.AutoConfig.from_pretrained(small_model)
    config.update({"intermediate_size": 16})
    other = tmp_path / "other"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(other)
    transformers.AutoTokenizer.from_pretrained(small_model).save_pretrained(other)
    with pytest.raises(TaskError, match=r"another model or run: parameters was \d+ and is \d+; .* without --resume"):
        train.main(line(kept, "--resume", "--model", other))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_refused(kept: Path, line: Line, name: str) -> None:
    """A file that is cut short, or gone, is named, with how to go on."""
    file = kept / "checkpoints" / "checkpoint-6" / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TaskError, match=rf"checkpoint-6 is damaged: {name} cannot be read; delete it to go on from"):
        train.main(line(kept, "--resume"))
    file.unlink()
    with pytest.raises(TaskError, match="checkpoint-6 is damaged"):
        train.main(line(kept, "--resume"))
