"""Checks of what a caller passes to a cache. Each message names the thing, what was expected, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pikv.core.config import LayerConfig, ModelConfig
from pikv.core.errors import InputError, LayerError, StateError
from pikv.core.layer import LayerCache

_LARGEST_POSITION = torch.iinfo(torch.int32).max


def layer(model: ModelConfig, layer_id: int) -> LayerConfig:
    """The layer's config; LayerError if the model has no such layer."""
    if not isinstance(layer_id, int) or not 0 <= layer_id < len(model.layers):
        raise LayerError(f"layer_id must be between 0 and {len(model.layers) - 1}, got {layer_id!r}")
    return model.layers[layer_id]


def tensor(model: ModelConfig, name: str, states: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """Raise unless the tensor has the shape (None: any size), and the model's dtype and device."""
    if not _fits(states.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} must be [{meaning}] = [{wanted}], got {list(states.shape)}")
    if states.dtype != model.dtype:
        raise InputError(f"{name} must be {model.dtype} like the model, got {states.dtype}; convert it or the model")
    if states.device != model.device:
        raise InputError(f"{name} must be on {model.device} like the model, got {states.device}; move it")


def _fits(shape: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    if len(shape) != len(wanted):
        return False
    # A loop, for what is called several times a token: a generator takes longer to make than to run here.
    for got, want in zip(shape, wanted, strict=True):  # noqa: SIM110
        if want is not None and got != want:
            return False
    return True


def new_tokens(model: ModelConfig, layer_id: int, keys: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check keys and values, and return them as [batch, kv_heads, tokens, dim]."""
    config = layer(model, layer_id)
    if (values is None) != (config.values == "key_prefix"):
        rule = "None, since its values are a key_prefix" if values is not None else "a tensor, since they are stored"
        raise InputError(f"v of layer {layer_id} must be {rule}, got {type(values).__name__}; see LayerConfig.values")
    if keys.dim() == 2 and (values is None or values.dim() == 2):
        keys, values = keys[None, :, None], None if values is None else values[None, :, None]
    meaning = "batch, kv_heads, tokens, head_dim"
    tensor(model, "k", keys, (None, config.kv_heads, None, config.key_dim), meaning)
    batch, tokens = keys.shape[0], keys.shape[2]
    values = keys[..., : config.value_dim] if values is None else values
    tensor(model, "v", values, (batch, config.kv_heads, tokens, config.value_dim), meaning)
    if batch == 0:
        raise InputError("k must have at least one sequence, got a batch of 0")
    if model.device.type == "cpu":  # elsewhere the check would stop the device
        for name, states in (("k", keys), ("v", values)):
            # A sum is finite only if all its terms are, and quicker to look at; it may overflow by itself.
            if not math.isfinite(states.sum()):
                _finite(name, states, layer_id)
    return keys, values


def _finite(name: str, states: Tensor, layer_id: int) -> None:
    if not bool(states.isfinite().all()):
        where = torch.nonzero(~states.isfinite())[0].tolist()
        raise InputError(
            f"{name} must be finite, got {states[tuple(where)].item()} at [batch, kv_head, token, channel] = "
            f"{where} of layer {layer_id}; look for an overflow in the layers before"
        )


def queries(model: ModelConfig, held: LayerCache, q: Tensor) -> None:
    """Raise unless q is of the last update's tokens, and these may still be asked about."""
    config, tokens = model.layers[held.layer_id], held.queried.shape[1]
    if q.dim() == 4 and q.shape[2] and not tokens:
        raise StateError(f"layer {held.layer_id}: its last update brought no tokens, or was cropped; call update first")
    shape = (held.sequences, config.query_heads, tokens, config.key_dim)
    tensor(model, "q", q, shape, "batch, query_heads, tokens of the last update, head_dim")
    if held.settled and tokens > 1:
        raise StateError(
            f"layer {held.layer_id} has been settled since its last update of {tokens} tokens, by attend or by "
            "finish_prefill, so they may be sealed; call attend once after each update, or retrieve for an attention "
            "of your own"
        )


def positions(token_id: int | Tensor, batch: int, tokens: int) -> Tensor:
    """Positions int64 [batch, tokens] on the CPU, increasing along a sequence; below 0 for padding."""
    if isinstance(token_id, int):
        if token_id < 0:
            raise InputError(f"token_id must not be negative, got {token_id}; it is the position of the first token")
        if token_id + tokens - 1 > _LARGEST_POSITION:
            raise InputError(
                f"token_id must be at most {_LARGEST_POSITION} for the last token, got {token_id} for the first"
            )
        return torch.arange(token_id, token_id + tokens).expand(batch, tokens)
    if not isinstance(token_id, Tensor):
        raise InputError(f"token_id must be a whole number or a tensor of them, got {type(token_id).__name__}")
    if token_id.is_floating_point() or token_id.is_complex() or token_id.dtype == torch.bool:
        raise InputError(f"token_id must be a whole number or a tensor of them, got {token_id.dtype}")
    if token_id.shape != (batch, tokens):
        raise InputError(f"token_id must be [batch, tokens] = [{batch}, {tokens}], got {list(token_id.shape)}")
    placed = token_id.detach().to("cpu", torch.int64, copy=True)
    if placed.numel() and int(placed.max()) > _LARGEST_POSITION:
        raise InputError(f"token_id must be at most {_LARGEST_POSITION}, got {int(placed.max())}")
    if bool((placed < -2 - _LARGEST_POSITION).any()):
        raise InputError(
            f"token_id must be a position, -1 for padding, or -2 - p for padding at position p, got {int(placed.min())}"
        )
    return placed


def increasing(held: LayerCache, placed: Tensor) -> None:
    """Raise if a position is not newer than all before it in its sequence."""
    if placed.shape[1] == 1 and all(new > old for (new,), old in zip(placed.tolist(), held.last.tolist(), strict=True)):
        return  # a decoded token: numbers are compared sooner than tensors are made
    before = torch.cat([held.last[:, None], placed], dim=1).cummax(dim=1).values[:, :-1]
    back = (placed >= 0) & (placed <= before)
    if bool(back.any()):
        sequence, token = torch.nonzero(back)[0].tolist()
        raise InputError(
            f"token_id must increase along a sequence: layer {held.layer_id}, sequence {sequence} has seen position "
            f"{int(before[sequence, token])}, got {int(placed[sequence, token])}; mark padding by -1, or crop the "
            "cache first to go back"
        )


def same_batch(held: LayerCache, batch: int, name: str) -> None:
    """Raise if a tensor is for another number of sequences than the layer holds."""
    if batch != held.sequences:
        raise InputError(
            f"{name} must have batch = {held.sequences}, the sequences of this cache, got {batch}; "
            "use join and drop to change the batch"
        )


def begun(sequences: int, batch: int) -> None:
    """Raise if a tensor is for another number of sequences than begin was told of."""
    if batch != sequences:
        raise InputError(f"k must have batch = {sequences}, the prompts that begin was given, got {batch}; begin again")


def same_layers(held: Mapping[int, LayerCache], other: Mapping[int, LayerCache]) -> None:
    """Raise if two caches to be joined have tokens in different layers."""
    if held and held.keys() != other.keys():
        raise StateError(
            f"join: this cache has tokens in layers {sorted(held)}, the other in {sorted(other)}; join between steps, "
            "when every layer has been updated"
        )


def ends(tokens: int | Tensor, sequences: int) -> Tensor:
    """The first position to forget of each sequence: int64 [sequences] on the CPU."""
    end = torch.as_tensor(tokens).detach().cpu()
    if end.is_floating_point() or end.is_complex() or end.dtype == torch.bool:
        raise InputError(f"tokens must be a whole number or a tensor of them, got {end.dtype}")
    if end.shape not in ((), (sequences,)):
        raise InputError(f"tokens must be one number or one a sequence, [{sequences}], got {list(end.shape)}")
    if bool((end < 0).any()):
        raise InputError(f"tokens must not be negative, got {end.tolist()}; it is the first position to forget")
    return end.long().expand(sequences)


def seen_from(held: LayerCache, end: Tensor) -> None:
    """Raise if a window has dropped what a query at `end`, int64 [sequences], would see after a crop."""
    window = held.config.window
    if window is None:
        return
    missed = torch.minimum(held.forgotten, end - 1) > (end - window).clamp(min=-1)
    if bool((missed & (end <= held.last)).any()):
        raise StateError(
            f"layer {held.layer_id}: its window of {window} has dropped tokens up to positions "
            f"{held.forgotten.tolist()}, which a query at {end.tolist()} would see; crop less, or fork before"
        )


def index(ids: Tensor | list[int], sequences: int, name: str) -> Tensor:
    """Sequence numbers int64 [n] on the CPU, each below `sequences`."""
    chosen = torch.as_tensor(ids).detach().cpu()
    if chosen.shape == (0,):
        return chosen.long()  # an empty list has no type
    if chosen.dim() != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise InputError(f"{name} must be a list of sequence numbers, got {chosen.dtype} {list(chosen.shape)}")
    if not (int(chosen.min()) >= 0 and int(chosen.max()) < sequences):
        raise InputError(f"{name} must be between 0 and {sequences - 1}, got {chosen.tolist()}")
    return chosen.long()
