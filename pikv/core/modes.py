"""The mode in which a cache changes: it keeps numbers, not graphs, whatever mode its caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def keeps_numbers(operation: Callable[P, R]) -> Callable[P, R]:
    """Run an operation without autograd, and outside of inference mode.

    Tensors made in inference mode cannot be changed outside of it: a cache whose prompt came in inference mode could
    not be decoded from elsewhere.
    """

    @functools.wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return operation(*args, **kwargs)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return operation(*args, **kwargs)
        return operation(*args, **kwargs)  # a mode takes microseconds to enter, and operations call one another

    return run
