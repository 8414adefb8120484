"""A task from beginning to end: load, train, save, evaluate."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from downstream_tasks.shared import models, results, training
from downstream_tasks.shared.caches import compositions
from downstream_tasks.shared.examples import Example
from downstream_tasks.shared.processes import joined

T = TypeVar("T")


@attrs.frozen
class Task:
    """What a task is: its data, what it is compared with, and how an answer is scored.

    baselines: scores on held-out data, by name; called after training, in one process. measure: the scores of a model
    through a cache.
    """

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    baselines: Callable[[], Mapping[str, results.Scores]]
    measure: results.Measure


def split(
    flags: argparse.Namespace,
    own: Callable[[Path], tuple[Sequence[T], Sequence[T]]],
    made: Callable[[int, bool], Sequence[T]],
) -> tuple[Sequence[T], Sequence[T]]:
    """What to train on and what is held out, at most as many as the flags ask for.

    own: what --data has of both. made: without it, so many, held out or not.
    """
    if flags.data:
        train, held_out = own(flags.data)
        return train[: flags.train_samples], held_out[: flags.eval_samples]
    return made(flags.train_samples, False), made(flags.eval_samples, True)


def run(task: Callable[[PreTrainedTokenizerBase], Task], flags: argparse.Namespace) -> None:
    """Train unless --eval_only, then let the first process evaluate with each cache and save the results.

    Raises TaskError for what a user can mend.
    """
    transformers.utils.logging.disable_progress_bar()
    compositions(flags.cache)  # a name that does not exist is refused before training
    with joined(flags) as ranks:
        transformers.set_seed(flags.seed)
        model, tokenizer = models.load(flags)
        posed = task(tokenizer)
        sizes = {"train_samples": len(posed.train), "held_out_samples": len(posed.held_out)}
        more: dict[str, Any] = {**sizes, **_machine()}
        if not flags.eval_only:
            started = time.monotonic()
            trained = models.with_adapters(model, flags) if flags.use_lora else model
            more |= models.counts(trained)
            training.train(trained, tokenizer, posed.train, flags, ranks, task=posed.name)
            more["training_minutes"] = round((time.monotonic() - started) / 60, 2)
    if not ranks.first:
        return
    if not flags.eval_only:
        model = _saved(trained, tokenizer, flags)
    model.to(flags.device)
    rows = results.with_each_cache(model, posed.held_out, flags.cache, posed.measure, pad=tokenizer.pad_token_id)
    name = "as it is" if flags.eval_only else "LoRA" if flags.use_lora else "full fine-tuning"
    compared = {f"model, {name}": rows[0].scores, **posed.baselines()}
    started_by = ["torchrun", f"--nproc_per_node={ranks.world_size}"] if ranks.world_size > 1 else ["python"]
    command = shlex.join([*started_by, *sys.argv])
    results.save(flags.output, title=posed.name, command=command, compared=compared, rows=rows, more=more)


def _saved(trained: Any, tokenizer: PreTrainedTokenizerBase, flags: argparse.Namespace) -> Any:
    """Save the adapters, if there are any, in peft's format, and the model that they are merged into."""
    if flags.use_lora:
        trained.save_pretrained(flags.output / "adapter")
        tokenizer.save_pretrained(flags.output / "adapter")
    model = models.merged(trained)
    model.save_pretrained(flags.output / "model")
    tokenizer.save_pretrained(flags.output / "model")
    return model


def _machine() -> dict[str, Any]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
