"""What tells a model's weights from others of the same shape: while the process lives, or by their numbers."""

from __future__ import annotations

import hashlib
import json
import uuid
import weakref
from typing import Any

import torch
from torch import nn

from pikv.core.files import as_buffer

_NAMES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_FINGERPRINTS: weakref.WeakKeyDictionary[nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()
"""Of each model, and the name that its weights had then."""


def weights_of(hf_model: nn.Module) -> str:
    """A name for a model with the weights that it has now.

    Another model, another set of parameters (an adapter that was added), and parameters that were written to in place
    (a training step, a loaded state) have another one. Nothing is read from the weights, so this costs milliseconds.
    """
    made = _NAMES.setdefault(hf_model, uuid.uuid4().hex)
    digest = hashlib.sha256(made.encode())
    for name, parameter in hf_model.named_parameters():
        digest.update(f"{name} {parameter.data_ptr()} {parameter._version}".encode())
    return digest.hexdigest()


def fingerprint_of(hf_model: Any) -> str:
    """A hash of a model's class, config and weights, the same in every process.

    It reads all weights, once for as long as `weights_of` stays the same: about a second a gigabyte.
    """
    name, fingerprint = _FINGERPRINTS.get(hf_model, ("", ""))
    if name != weights_of(hf_model):
        name, fingerprint = weights_of(hf_model), _hashed(hf_model)
        _FINGERPRINTS[hf_model] = name, fingerprint
    return fingerprint


def _hashed(hf_model: Any) -> str:
    config = {key: value for key, value in hf_model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.sha256(f"{type(hf_model).__qualname__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, states in hf_model.state_dict().items():
        digest.update(f"{name} {states.dtype} {list(states.shape)}".encode())
        digest.update(as_buffer(states.detach().cpu().reshape(-1).view(torch.uint8)))
    return digest.hexdigest()
