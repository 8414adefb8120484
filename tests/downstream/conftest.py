"""A model of a few thousand parameters and a classification that it can learn, for the tasks' tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "downstream_tasks" / "models" / "tiny_moe"
CLASSIFICATION = ROOT / "downstream_tasks" / "text_classification" / "train.py"
Run = Callable[..., subprocess.CompletedProcess[str]]
Line = Callable[..., list[str]]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of two layers with random weights, and the shipped tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pikv[tasks]")
    pytest.importorskip("peft", reason="peft is missing: pikv[tasks]")
    folder = tmp_path_factory.mktemp("small_model")
    config = transformers.AutoConfig.from_pretrained(SHIPPED)
    config.update({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "dtype": "float32"})
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of texts of different lengths, whose class is the letter that they mostly have."""
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = []
    for _ in range(60):
        letters = str(rng.choice(["abc", "xyz"]))
        text = "".join(rng.choice(list(letters), int(rng.integers(24, 48))))
        rows.append(json.dumps({"text": text, "label": letters}))
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.fixture(scope="session")
def line(small_model: Path, texts: Path) -> Line:
    """The flags of a run of 6 steps, in the order of a command line."""

    def flags(output: Path, *more: object) -> list[str]:
        small: tuple[object, ...] = ("--model", small_model, "--data", texts, "--batch_size", 16, "--num_epochs", 2)
        steps = ("--save_steps", 3, "--logging_steps", 1, "--warmup_steps", 2, "--learning_rate", 3e-3)
        return [*map(str, (*small, *steps, "--max_tokens", 64, "--cache", "int8", "--output", output, *more))]

    return flags


@pytest.fixture(scope="session")
def trained(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run in one process."""
    from downstream_tasks.text_classification import train  # here: it needs what small_model skips without

    output = tmp_path_factory.mktemp("trained")
    train.main(line(output))
    return output


@pytest.fixture
def start() -> Run:
    """Run a script as a user does, in a process of its own or under torchrun."""

    def run(*line: object, processes: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        python = [
            sys.executable,
            *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []),
        ]
        return subprocess.run(
            [*python, *map(str, line)], capture_output=True, text=True, check=False, env={**os.environ, **environment}
        )

    return run
