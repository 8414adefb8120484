"""Checkpoints: what run they are of, which is the newest, and whether one may be gone on from."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from downstream_tasks.shared import models
from downstream_tasks.shared.errors import TaskError
from downstream_tasks.shared.examples import Example
from downstream_tasks.shared.flags import NEWEST
from downstream_tasks.shared.processes import Ranks

FOLDER, RUN = "checkpoints", "run.json"
_SAME = ("batch_size", "gradient_accumulation", "learning_rate", "num_epochs", "seed", "dtype", "load_balance")


def begin(folder: Path, described: Mapping[str, Any]) -> None:
    """Write beside the checkpoints to come what run they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN).write_text(json.dumps(described, indent=2) + "\n")


def describe(
    model: nn.Module, examples: Sequence[Example], flags: argparse.Namespace, ranks: Ranks, *, task: str
) -> dict[str, Any]:
    """What must be the same for a resumed run to have the same losses."""
    return {
        "task": task,
        "model": type(model).__name__,
        "parameters": models.counts(model)["parameters"],
        "shape": models.fingerprint(model),
        "lora": [flags.rank, flags.alpha] if flags.use_lora else None,
        "expert_parallel": ranks.world_size if flags.expert_parallel else None,
        "samples": len(examples),
        "tokens": sum(len(example.prompt) + len(example.answer) for example in examples),
        **{name: getattr(flags, name) for name in _SAME},
    }


def resumed(folder: Path, asked: str | None, described: Mapping[str, Any]) -> str | None:
    """The checkpoint to go on from, or None. Raises TaskError if there is none, or it is of another model or run."""
    if asked is None:
        return None
    checkpoint = _newest(folder) if asked == NEWEST else Path(asked)
    if checkpoint is None or not (checkpoint / "trainer_state.json").is_file():
        raise TaskError(
            f"--resume found no checkpoint {'in ' + str(folder) if asked == NEWEST else asked}; start without it"
        )
    written = checkpoint.parent / RUN
    if not written.is_file():
        raise TaskError(
            f"{checkpoint} has no {RUN} beside it, so it is not of these tasks; give one of --output/{FOLDER}"
        )
    before = json.loads(written.read_text())
    differs = {name: (before.get(name), value) for name, value in described.items() if before.get(name) != value}
    if differs:
        said = "; ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in differs.items())
        raise TaskError(
            f"{checkpoint} is of another model or run: {said}; give the same flags, or start without --resume"
        )
    _check_files(checkpoint)
    return str(checkpoint)


def _check_files(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are missing or cut short; both formats end or begin with what tells."""
    weights = sorted(checkpoint.glob("*.safetensors"))
    broken = [file.name for file in weights if not _opens(file)]
    broken += [name for name in ("optimizer.pt", "scheduler.pt") if not zipfile.is_zipfile(checkpoint / name)]
    if broken or not weights:
        raise TaskError(
            f"{checkpoint} is damaged: {', '.join(broken) or 'its weights'} cannot be read; delete it to go on from "
            "the one before, or start without --resume"
        )


def _opens(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, which trainer_state.json marks; None if there is none."""
    complete = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda checkpoint: int(checkpoint.name.split("-")[1]), default=None)
