"""The training loop: transformers' Trainer, with the loss of a task and the experts' load balance."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from downstream_tasks.shared import models
from downstream_tasks.shared.balance import load_balance
from downstream_tasks.shared.callbacks import CsvLog, Progress
from downstream_tasks.shared.errors import TaskError
from downstream_tasks.shared.examples import IGNORED, Example, Rows
from downstream_tasks.shared.flags import NEWEST
from downstream_tasks.shared.processes import Ranks, lost

CHECKPOINTS, RUN = "checkpoints", "run.json"
_SAME = ("batch_size", "gradient_accumulation", "learning_rate", "num_epochs", "seed", "dtype", "load_balance")


class TaskTrainer(Trainer):
    """A Trainer whose loss is the mean over all tokens of a step, of all processes, plus the load balance."""

    def __init__(self, model: nn.Module, *, balance_weight: float, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.model_accepts_loss_kwargs = True  # so that num_items_in_batch counts the tokens of all processes
        self._weight = balance_weight if getattr(model.config, "output_router_logits", None) is not None else 0.0
        self._balances: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a part of a step, such that the mean over processes of their sums is the step's."""
        labels = inputs["labels"][:, 1:]
        asked = {"output_router_logits": True} if self._weight else {}
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **asked
        )
        logits = outputs.logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        loss = loss / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        if self._weight:
            per_token: int = self.model.config.num_experts_per_tok
            balance = load_balance(outputs.router_logits, inputs["attention_mask"], per_token=per_token)
            balance = balance / self.current_gradient_accumulation_steps
            self._balances.append(balance.detach())
            loss = loss + self._weight * balance
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint as it is written: transformers 5 writes a layer's experts one by one.

        The Trainer of 5.2 reads the file without putting them together again, warns, and goes on with other weights.
        """
        held = self.model if model is None else model
        if isinstance(held, PreTrainedModel):
            held.load_state_dict(type(held).from_pretrained(resume_from_checkpoint, dtype=held.dtype).state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean load balance since the last log; an even load has that of the experts of a token."""
        if self._balances and "loss" in logs:
            summed = self.accelerator.reduce(torch.stack(self._balances).sum(), reduction="sum").item()
            steps = len(self._balances) / self.current_gradient_accumulation_steps
            logs = {**logs, "load_balance": summed / steps}
            self._balances.clear()
        super().log(logs, start_time)


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    flags: argparse.Namespace,
    ranks: Ranks,
    *,
    task: str,
) -> None:
    """Train a model in place on what examples should be answered; checkpoints and logs go to --output."""
    if len(examples) < flags.batch_size:
        raise TaskError(
            f"--batch_size must be at most the {len(examples)} samples to train on, got {flags.batch_size}: steps are "
            "whole batches; lower it or give more data"
        )
    folder = flags.output / CHECKPOINTS
    described = describe(model, examples, flags, task=task)
    checkpoint = resumed(folder, flags.resume, described)
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN).write_text(json.dumps(described, indent=2) + "\n")
    trainer = TaskTrainer(
        model,
        balance_weight=flags.load_balance,
        args=settings(flags, ranks, folder),
        train_dataset=Rows(examples),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
        callbacks=[CsvLog(flags.output / "metrics.csv"), Progress()] if ranks.first else [],
    )
    trainer.remove_callback(PrinterCallback)
    if ranks.first:
        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(flags.output / "tensorboard"))))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        raise (lost(error, ranks) or error) from error


def settings(flags: argparse.Namespace, ranks: Ranks, folder: Path) -> TrainingArguments:
    """The flags as transformers names them."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=flags.batch_size // (ranks.world_size * flags.gradient_accumulation),
        gradient_accumulation_steps=flags.gradient_accumulation,
        learning_rate=flags.learning_rate,
        num_train_epochs=flags.num_epochs,
        lr_scheduler_type="cosine",
        warmup_steps=flags.warmup_steps,
        max_grad_norm=flags.max_grad_norm,
        bf16=flags.dtype == "bfloat16",
        fp16=flags.dtype == "float16",
        logging_steps=flags.logging_steps,
        save_strategy="steps" if flags.save_steps else "epoch",
        save_steps=flags.save_steps or 500,
        save_total_limit=2,
        seed=flags.seed,
        use_cpu=flags.device == "cpu",
        ddp_find_unused_parameters=False,
        ddp_timeout=flags.timeout_s,
        dataloader_drop_last=True,  # or several processes would fill the last step of an epoch up with other samples
        dataloader_pin_memory=flags.device != "cpu",
        report_to="none",
        disable_tqdm=True,  # Progress draws the bar
    )


def describe(model: nn.Module, examples: Sequence[Example], flags: argparse.Namespace, *, task: str) -> dict[str, Any]:
    """What must be the same for a resumed run to have the same losses."""
    return {
        "task": task,
        "model": type(model).__name__,
        "shape": models.fingerprint(model),
        "lora": [flags.rank, flags.alpha] if flags.use_lora else None,
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
            f"{checkpoint} has no {RUN} beside it, so it is not of these tasks; give one of --output/{CHECKPOINTS}"
        )
    before = json.loads(written.read_text())
    differs = {name: (before.get(name), value) for name, value in described.items() if before.get(name) != value}
    if differs:
        said = "; ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in differs.items())
        raise TaskError(
            f"{checkpoint} is of another model or run: {said}; give the same flags, or start without --resume"
        )
    return str(checkpoint)


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, which trainer_state.json marks; None if there is none."""
    complete = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda checkpoint: int(checkpoint.name.split("-")[1]), default=None)
