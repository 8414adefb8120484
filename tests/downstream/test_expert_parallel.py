"""Experts that are split over processes: what they compute, what is saved, and how training goes on."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is missing: pikv[tasks]")
transformers = pytest.importorskip("transformers", reason="transformers is missing: pikv[tasks]")

from downstream_tasks.shared.errors import TaskError  # noqa: E402  # after the skips
from downstream_tasks.shared.expert_parallel import ExpertShards  # noqa: E402
from downstream_tasks.shared.processes import Ranks  # noqa: E402
from downstream_tasks.text_classification import train  # noqa: E402

SCRIPT = Path(train.__file__)
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
Line = Callable[..., list[str]]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Ranks]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield Ranks()
    torch.distributed.destroy_process_group()


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def losses(output: Path, *names: str) -> list[list[float]]:
    with (output / "metrics.csv").open(newline="") as file:
        return [[float(row[name]) for name in names] for row in csv.DictReader(file)]


def test_tokens_that_go_and_come_are_answered_alike(small_model: Path, alone: Ranks) -> None:
    """Logits and all gradients are those of the model as it was, and `join` leaves it so."""
    plain, split = loaded(small_model), loaded(small_model)
    shards = ExpertShards(split, alone)
    ids = torch.arange(4, 44).view(2, 20)
    for model in (plain, split):
        model(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in split.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)
    whole = torch.nn.utils.get_total_norm(wanted.values())
    torch.testing.assert_close(shards.norm(), whole)
    assert shards.state_dict().keys() == plain.state_dict().keys()
    shards.join()
    torch.testing.assert_close(split(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_share_is_taken_of_a_whole_model(small_model: Path, alone: Ranks) -> None:
    """What another model has is loaded, experts too."""
    split, other = loaded(small_model), loaded(small_model)
    shards = ExpertShards(split, alone)
    with torch.no_grad():
        other.get_parameter(EXPERTS).add_(1)
    shards.load_state_dict(other.state_dict())
    assert torch.equal(split.get_parameter(EXPERTS), other.get_parameter(EXPERTS))


def test_experts_that_cannot_be_shared_out(small_model: Path) -> None:
    """A model without stacked experts, and four experts for three processes, are refused."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(TaskError, match="LlamaForCausalLM has none; leave it out"):
        ExpertShards(transformers.LlamaForCausalLM(config), Ranks(0, 2))
    with pytest.raises(TaskError, match="shares out 4 experts a layer, which 3 processes cannot do evenly"):
        ExpertShards(loaded(small_model), Ranks(0, 3))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_split_experts_are_one_process(processes: int, trained: Path, line: Line, tmp_path: Path, start: Any) -> None:
    """Losses, load balance and norms are those of one process within 1e-4, and so is the saved model."""
    done = start(SCRIPT, *line(tmp_path, "--model_type", "distributed", "--expert_parallel"), processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]
    both = (losses(each, "loss", "load_balance", "grad_norm") for each in (tmp_path, trained))
    for mine, wanted in zip(*both, strict=True):
        assert mine == pytest.approx(wanted, abs=1e-4)
    for name in ("model", "checkpoints/checkpoint-3"):
        wanted_state = loaded(trained / name).state_dict()
        for key, value in loaded(tmp_path / name).state_dict().items():
            torch.testing.assert_close(value, wanted_state[key], atol=1e-5, rtol=0, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--expert_parallel",), ()])
def test_processes_go_on_with_the_same_losses(more: tuple[str, ...], line: Line, tmp_path: Path, start: Any) -> None:
    """A resumed run of two processes has the losses of one that went through, with split experts and without."""
    command = (SCRIPT, *line(tmp_path, "--model_type", "distributed", *more))
    done = start(*command, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = losses(tmp_path, "step", "loss", "grad_norm")
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6")
    done = start(*command, "--resume", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path, "step", "loss", "grad_norm") == whole
