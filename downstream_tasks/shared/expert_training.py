"""The training loop for experts that are split over processes: clipped together, saved whole, resumed each its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from transformers import PreTrainedModel, TrainerCallback

from downstream_tasks.shared.expert_parallel import ExpertShards
from downstream_tasks.shared.trainer import TaskTrainer


class ClipTogether(TrainerCallback):
    """Scales gradients by their norm over all processes; the Trainer would take each process's own."""

    def __init__(self, shards: ExpertShards, *, max_norm: float) -> None:
        self._shards, self._max_norm = shards, max_norm
        self.norm = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Between the gradients and the step."""
        self.norm = self._shards.norm().item()
        scale = min(1.0, self._max_norm / (self.norm + 1e-6))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)


class ExpertTrainer(TaskTrainer):
    """A TaskTrainer of which each process optimizes its own experts, and all the rest together."""

    def __init__(self, model: nn.Module, *, shards: ExpertShards, max_norm: float, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._shards, self._clip = shards, ClipTogether(shards, max_norm=max_norm)
        self.add_callback(self._clip)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, as any other is saved."""
        state = self._shards.state_dict()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the norm that gradients were clipped by."""
        super().log({**logs, "grad_norm": self._clip.norm} if "loss" in logs else logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        whole = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self._shards.load_state_dict(whole.state_dict())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.process_index:
            file = self._optimizer_file(output_dir)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.optimizer.state_dict(), file)
        distributed.barrier()  # a checkpoint counts as complete once the first process has gone on from here

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.process_index:
            self.optimizer.load_state_dict(
                torch.load(self._optimizer_file(checkpoint), map_location="cpu", weights_only=True)
            )

    def _optimizer_file(self, folder: str) -> Path:
        return Path(folder) / f"optimizer_{self.args.process_index}.pt"
