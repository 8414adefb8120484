"""The training loop: the flags of a task given to the Trainer."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from downstream_tasks.shared import checkpoints
from downstream_tasks.shared.callbacks import CsvLog, Progress
from downstream_tasks.shared.errors import TaskError
from downstream_tasks.shared.examples import IGNORED, Example, Rows
from downstream_tasks.shared.expert_parallel import ExpertShards
from downstream_tasks.shared.expert_training import ExpertTrainer
from downstream_tasks.shared.processes import Ranks, lost
from downstream_tasks.shared.trainer import TaskTrainer


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
    described = checkpoints.describe(model, examples, flags, ranks, task=task)
    checkpoint = checkpoints.resumed(folder, flags.resume, described)
    if ranks.first:
        checkpoints.begin(folder, described)
    shards = ExpertShards(model, ranks) if flags.expert_parallel else None
    trainer = _trainer(shards, flags)(
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
    if shards is not None:
        shards.join()


def _trainer(shards: ExpertShards | None, flags: argparse.Namespace) -> Callable[..., TaskTrainer]:
    if shards is None:
        return TaskTrainer
    return functools.partial(ExpertTrainer, shards=shards, max_norm=flags.max_grad_norm)


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
        max_grad_norm=0.0 if flags.expert_parallel else flags.max_grad_norm,  # ExpertTrainer clips
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
