"""transformers' Trainer, with the loss of a task and the experts' load balance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from downstream_tasks.shared.balance import load_balance
from downstream_tasks.shared.examples import IGNORED


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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load by way of the CPU; the optimizer puts its states where its parameters are.

        The Trainer of 5.2 asks for "cpu:0" where several processes train on CPUs, which torch refuses.
        """
        if checkpoint is not None:
            for part, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
                part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean load balance since the last log; an even load has that of the experts of a token."""
        if self._balances and "loss" in logs:
            summed = self.accelerator.reduce(torch.stack(self._balances).sum(), reduction="sum").item()
            steps = len(self._balances) / self.current_gradient_accumulation_steps
            logs = {**logs, "load_balance": summed / steps}
            self._balances.clear()
        super().log(logs, start_time)
