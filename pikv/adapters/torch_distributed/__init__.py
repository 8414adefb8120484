"""Ranks that torchrun started: torch.distributed, which comes with torch."""

from pikv.adapters.torch_distributed.transport import TorchTransport

__all__ = ["TorchTransport"]
