"""The training loop: transformers' Trainer, with the loss of a task and the experts' load balance."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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

from downstream_tasks.shared import checkpoints
from downstream_tasks.shared.balance import load_balance
from downstream_tasks.shared.callbacks import CsvLog, Progress
from downstream_tasks.shared.errors import TaskError
from downstream_tasks.shared.examples import IGNORED, Example, Rows
from downstream_tasks.shared.processes import Ranks, lost


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
    folder = flags.output / checkpoints.FOLDER
    described = checkpoints.describe(model, examples, flags, task=task)
    checkpoint = checkpoints.resumed(folder, flags.resume, described)
    if ranks.first:
        checkpoints.begin(folder, described)
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
