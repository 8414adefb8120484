"""What the Trainer lacks: losses as CSV that survive a resume, and a bar without a line a log."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

COLUMNS = ("step", "epoch", "loss", "load_balance", "grad_norm", "learning_rate")


class CsvLog(TrainerCallback):
    """Writes a row a log. A resumed run drops the rows after its checkpoint, which it will write again."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the rows of the steps that a checkpoint has, or begin a new file."""
        rows: list[list[str]] = []
        if state.global_step and self._file.is_file():
            with self._file.open(newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= state.global_step]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([list(COLUMNS), *rows])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a row; the summary at the end has no loss of a step."""
        if logs and "loss" in logs:
            values = {**logs, "step": state.global_step, "epoch": state.epoch}
            with self._file.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow([values.get(name, "") for name in COLUMNS])


class Progress(TrainerCallback):
    """A bar over the steps, with the newest loss beside it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the step that a checkpoint has."""
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step more."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar where it is."""
        self._bar.close()
