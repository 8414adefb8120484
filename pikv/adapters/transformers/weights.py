"""What tells a model's weights from others of the same shape, while the process lives."""

from __future__ import annotations

import hashlib
import uuid
import weakref

from torch import nn

_NAMES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


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
