"""The model of a task: loaded, given adapters, saved."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from downstream_tasks.shared.errors import TaskError

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_DENSE = ("gate_proj", "up_proj", "down_proj")


def load(flags: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that --model names, float32 on the CPU, and its tokenizer. A folder of adapters is merged.

    Raises TaskError for a name that cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(flags.model)
        if (Path(flags.model) / "adapter_config.json").is_file():
            model = AutoPeftModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).merge_and_unload()
        else:
            model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise TaskError(
            f"--model {flags.model} must be a folder that transformers saved, or a hub name within reach: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def with_adapters(model: PreTrainedModel, flags: argparse.Namespace) -> PeftModel:
    """The model with LoRA on attention and on the MLPs or experts; all else is frozen. Source: LoRA, arXiv 2106.09685.

    transformers keeps the experts of a layer as one parameter of three dimensions, which peft adapts by its
    `target_parameters`: a matrix of rank --rank for each expert.
    """
    experts = sorted(
        f"{module}.{name}"
        for module in {".".join(name.split(".")[-2:]) for name, _ in model.named_modules() if name.endswith(".experts")}
        for name in ("gate_up_proj", "down_proj")
    )
    leaves = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    modules = [name for name in (*_ATTENTION, *_DENSE) if name in leaves]
    if not modules:
        raise TaskError(f"--use_lora knows {', '.join(_ATTENTION)}, and {type(model).__name__} has none; train in full")
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=flags.rank,
        lora_alpha=flags.alpha,
        target_modules=modules,
        target_parameters=experts or None,
    )
    return get_peft_model(model, adapters)


def merged(model: nn.Module) -> PreTrainedModel:
    """The model with its adapters added into its weights; the model itself if it has none."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def counts(model: nn.Module) -> dict[str, int]:
    """How many parameters there are, and how many are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"parameters": sum(size for size, _ in sizes), "trained": sum(size for size, trained in sizes if trained)}


def fingerprint(model: nn.Module) -> str:
    """What tells a model's shape from another's: a hash of its parameters' names and sizes."""
    shapes = [(name, list(parameter.shape), parameter.requires_grad) for name, parameter in model.named_parameters()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without gradients and dropout."""
    was = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was)
