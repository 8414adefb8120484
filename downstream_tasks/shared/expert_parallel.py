"""Experts split over processes: each keeps some of every layer, and tokens go to where theirs are and come back.

Source: GShard, arXiv 2006.16668, section 3.2, without a capacity: an expert takes as many tokens as are sent to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from downstream_tasks.shared.errors import TaskError
from downstream_tasks.shared.processes import Ranks


class ExpertShards:
    """The experts of a model, of which each process keeps its share until `join`.

    transformers stacks the experts of a layer: the first dimension of each of their parameters is the expert. All else
    of the model is the same in all processes, which DistributedDataParallel sees to; it leaves the experts alone.

    Raises TaskError for a model without such experts, or whose experts cannot be shared out evenly.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self._layers = {name: part for name, part in model.named_modules() if name.endswith(".experts")}
        self.names = [
            f"{name}.{each}"
            for name, layer in self._layers.items()
            for each, _ in layer.named_parameters(recurse=False)
        ]
        self._check()
        self._group = distributed.new_group()  # of its own, since the sums of DDP come in between
        self._hooks = [hook for layer in self._layers.values() for hook in self._hook(layer)]
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self._replace(name, self._share(parameter.data))
        for parameter in self.parameters:  # a loss is as many times too large as there are processes: DDP takes means
            parameter.register_hook(lambda gradient: gradient / ranks.world_size)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, self.names)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of which each process has its own."""
        return [self._model.get_parameter(name) for name in self.names]

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's. All processes must call this."""
        state: dict[str, Tensor] = self._model.state_dict()
        return {name: self._whole(value) if name in self.names else value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take from a whole model's what this process keeps."""
        self._model.load_state_dict(
            {name: self._share(value) if name in self.names else value for name, value in state.items()}
        )

    def norm(self) -> Tensor:
        """The norm of all gradients, those of other processes' experts too. All processes must call this."""
        own = {id(parameter) for parameter in self.parameters}
        squares = torch.zeros(2, device=self.parameters[0].device)  # of experts, and of all else
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                squares[0 if id(parameter) in own else 1] += parameter.grad.square().sum()
        distributed.all_reduce(squares[:1], group=self._group)
        return squares.sum().sqrt()

    def join(self) -> None:
        """Give every process all experts again, and leave the model as it was. All processes must call this."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers.values():
            layer.num_experts *= self._ranks.world_size
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self._replace(name, self._whole(parameter.data))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._model, [])

    def _check(self) -> None:
        if not self._layers or not all(
            parameter.shape[0] == getattr(layer, "num_experts", None)
            for layer in self._layers.values()
            for _, parameter in layer.named_parameters(recurse=False)
        ):
            raise TaskError(
                f"--expert_parallel needs experts that transformers stacks, and {type(self._model).__name__} has none; "
                "leave it out"
            )
        experts = next(iter(self._layers.values())).num_experts
        if experts % self._ranks.world_size:
            raise TaskError(
                f"--expert_parallel shares out {experts} experts a layer, which {self._ranks.world_size} processes "
                "cannot do evenly; start as many as divide them"
            )

    def _hook(self, layer: Any) -> list[Any]:
        layer.num_experts //= self._ranks.world_size
        dispatch = _Dispatch(self._group, processes=self._ranks.world_size, kept=layer.num_experts)
        return [layer.register_forward_pre_hook(dispatch.send), layer.register_forward_hook(dispatch.bring_back)]

    def _share(self, whole: Tensor) -> Tensor:
        return whole.chunk(self._ranks.world_size)[self._ranks.rank].clone()

    def _whole(self, share: Tensor) -> Tensor:
        parts = [torch.empty_like(share) for _ in range(self._ranks.world_size)]
        distributed.all_gather(parts, share.contiguous(), group=self._group)
        return torch.cat(parts)

    def _replace(self, name: str, value: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(module), leaf, nn.Parameter(value))


class _Dispatch:
    """Sends a layer's tokens to the processes that keep their experts, and brings back what these make of them."""

    def __init__(self, group: Any, *, processes: int, kept: int) -> None:
        self._group, self._processes, self._kept = group, processes, kept

    def send(self, layer: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [tokens, dim], their experts and weights [tokens, experts of a token] -> what arrives, likewise."""
        hidden, chosen, weights = args
        expert = chosen.flatten()
        home = expert // self._kept
        order = home.argsort(stable=True)
        leaving = home.bincount(minlength=self._processes)
        arriving = torch.empty_like(leaving)
        distributed.all_to_all_single(arriving, leaving, group=self._group)
        self._leaving, self._arriving = leaving.tolist(), arriving.tolist()
        self._tokens, self._token, self._weights = len(hidden), order // chosen.shape[1], weights.flatten()[order]
        received = _Exchange.apply(hidden[self._token], self._leaving, self._arriving, self._group)
        asked = _Exchange.apply(expert[order] % self._kept, self._leaving, self._arriving, self._group)
        return received, asked[:, None], weights.new_ones(len(received), 1)

    def bring_back(self, layer: nn.Module, args: tuple[Tensor, Tensor, Tensor], output: Tensor) -> Tensor:
        """What the experts kept here made of the tokens that arrived -> of this process's own, [tokens, dim]."""
        # A process that no token came to has a part in the gradients too: the others wait for it.
        output = output + 0 * sum((each.sum() for each in layer.parameters()), args[0].sum())
        returned = _Exchange.apply(output, self._arriving, self._leaving, self._group) * self._weights[:, None]
        combined = returned.new_zeros(self._tokens, returned.shape[1])
        return combined.index_add(0, self._token, returned).to(output.dtype)


class _Exchange(torch.autograd.Function):
    """Rows to other processes, so many to each, for so many from each; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, leaving: list[int], arriving: list[int], group: Any) -> Tensor:
        ctx.back = (arriving, leaving, group)
        received = rows.new_empty(sum(arriving), *rows.shape[1:])
        distributed.all_to_all_single(received, rows.contiguous(), arriving, leaving, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Exchange.apply(gradients[0], *ctx.back), None, None, None
