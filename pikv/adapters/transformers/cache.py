"""A transformers Cache whose layers are PiKV's."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pikv.adapters.transformers.latent import LatentKV
from pikv.adapters.transformers.padding import Seen
from pikv.adapters.transformers.step import Step
from pikv.adapters.transformers.text import Text
from pikv.core.cache import PiKVCache
from pikv.core.errors import InputError, StateError
from pikv.core.ports import Routing, Version

Announce = Callable[[PiKVCache, Tensor], Tensor]
"""Announces tokens [batch, tokens] to an empty cache, and returns how many need no computing: int64 [batch]."""


class HostCache(Cache):
    """Pass it as `past_key_values` to the model that it was made for. One batch, as PiKVCache is.

    pikv: the PiKVCache behind it, for `stored_bytes()`, `describe()` and the rest. Positions are places in the padded
    sequence, as transformers counts them in masks and windows. routed: with a router, its choice for the tokens of the
    last call in each layer that has experts, from the model's own gates. announce: tells of the first call's tokens, as
    PiKVCache.begin does, where they may adopt what is known of them. seen: what it goes on from.
    """

    def __init__(
        self,
        pikv: PiKVCache,
        latent: LatentKV | None = None,
        announce: Announce | None = None,
        seen: Seen | None = None,
    ) -> None:
        self.pikv = pikv
        self.routed: dict[int, Routing] = {}
        self._latent, self._announce = latent, announce
        self._covered: Tensor | None = None  # what the first call adopted, while it runs
        self._seen = Seen.nothing() if seen is None else seen
        self._step: Step | None = None
        self._broken = False
        super().__init__(layers=[HostLayer(self, layer_id) for layer_id in range(len(pikv.model.layers))])

    # --- a forward call

    def adopt(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a model's call without the tokens that the first one need not compute.

        Those are what `begin` covers in every sequence; a batch with padding is computed whole.
        """
        if self._step is not None:
            self.take_back(self._step)  # an interrupt ended the call before, and no hook was told
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if self._announce is None or self._seen.length or ids is None:
            return given
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape and bool(mask.all())):
            return given
        self._covered = self._announce(self.pikv, ids)
        skipped, text = int(self._covered.min()), Text.of(given, 0)
        self._seen = Seen(skipped, None, text and text.part(0, skipped))
        along = {name: given[name] for name in _ALONG_TOKENS if given.get(name) is not None}
        return given | {name: tokens[..., skipped:] for name, tokens in along.items()}

    def begin(self, batch: int, tokens: int, given: dict[str, Any]) -> Step:
        """Start a forward call over new tokens. given: to the model; attention_mask [batch, tokens seen and new]."""
        mask = given.get("attention_mask")
        self._check_whole()
        held = self.pikv.sequences
        if held and batch != held:
            raise InputError(
                f"this cache holds {held} sequences, got a batch of {batch}; use batch_repeat_interleave or "
                "batch_select_indices, or a new cache"
            )
        positions = self._seen.positions(batch, tokens, mask)
        if self._covered is not None:  # computed beside the others of the batch, and stored already
            positions = positions.masked_fill((positions >= 0) & (positions < self._covered[:, None]), -1)
        self._step = Step(self.pikv, positions, mask, self._latent, Text.of(given, self._seen.length))
        return self._step

    def finish(self, step: Step) -> None:
        """End a forward call that went through all layers."""
        self._step = self._covered = None
        self._seen, self.routed = self._seen.followed_by(step.positions, step.mask, step.text), step.routed

    def take_back(self, step: Step) -> None:
        """End a forward call that failed: forget its tokens.

        Where layers evicted for it that cannot be done, and the cache says so when it is used next.
        """
        self._step = None
        if not self._seen.length or self._covered is not None:
            self.reset()
        elif step.attended and self.pikv.evicts:
            self._broken = True
        else:
            self.pikv.crop(self._seen.length)

    def take(self, layer_id: int, keys: Tensor, values: Tensor) -> None:
        """Store a layer's new tokens."""
        if self._step is None:
            raise StateError(
                "this cache was passed to a model that PiKV is not attached to (any more); call "
                "pikv.adapters.transformers.attach(model, runtime), and use the caches that its host makes"
            )
        self._step.take(layer_id, keys, values)

    # --- what transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The tokens seen, padding and evicted ones included."""
        return self._seen.length

    def reset(self) -> None:
        """Forget everything; the next call may bring another batch."""
        self.pikv.reset()
        self._seen, self._step, self._broken = Seen.nothing(), None, False
        self._covered = None
        self.routed = {}

    def crop(self, max_length: int) -> None:
        """Keep the first max_length tokens; a negative number says how many to forget, and 0 forgets none."""
        length = max_length if max_length > 0 else max(0, self._seen.length + max_length)
        if length < self._seen.length:
            self.pikv.crop(length)
            self._seen = self._seen.cropped(length)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """What the model is given within it is forgotten again when it ends; see PiKVCache.rehearsal."""
        seen = self._seen
        with self.pikv.rehearsal():
            yield
        self._seen = seen

    def fork(self) -> HostCache:
        """A second cache that goes on from here: sealed pages are shared. `copy.deepcopy` does the same."""
        other = HostCache(self.pikv.fork(), self._latent, self._announce, self._seen)
        other._broken = self._broken
        return other

    # --- away and back

    def commit(self) -> Version:
        """Make a version that Host.restore goes on from, with what has been read; see PiKVCache.commit.

        Raises StateError where a call that failed has left layers of different texts.
        """
        if self._step is not None:
            self.take_back(self._step)  # as `adopt` does
        self._check_whole()
        return self.pikv.commit(beside=self._seen.states())

    def _check_whole(self) -> None:
        if self._broken:
            raise StateError(
                "a call before this one failed after some layers had evicted tokens for it, so the layers of this "
                "cache no longer hold the same text; reset() it, or make a new one, and read the text again"
            )

    @property
    def token_ids(self) -> Tensor | None:
        """The tokens seen, padding included: int64 [batch, length] on the CPU. None where some came as embeddings."""
        return self._seen.text and self._seen.text.ids.long()

    def __deepcopy__(self, memo: dict[int, Any]) -> HostCache:
        return self.fork()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence beam_idx[i] is now."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, copies side by side; sealed pages are shared."""
        self._select(torch.arange(self.pikv.sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at indices, or those marked in a bool tensor."""
        chosen = torch.as_tensor(indices)
        self._select(chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen)

    def _select(self, index: Tensor) -> None:
        if not len(index):
            self.reset()
        elif self.pikv.sequences:
            index = index.to("cpu", torch.int64)
            self.pikv.reorder(index)
            self._seen = self._seen.select(index)


_ALONG_TOKENS = ("input_ids", "position_ids", "cache_position")  # what a model is given for each new token


class HostLayer(CacheLayerMixin):
    """A layer as transformers knows it. It holds nothing: PiKVCache does."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, cache: HostCache, layer_id: int) -> None:
        super().__init__()
        self._cache, self._layer_id = weakref.proxy(cache), layer_id  # no cycle: pages go when the cache does

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: PiKVCache starts with its first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens, and return them alone: PiKV's attention finds the older ones itself."""
        self._cache.take(self._layer_id, key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """The tokens that a mask would have to cover, and the first of them. Older versions pass positions."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + new, 0

    def get_seq_length(self) -> int:
        """The tokens seen, padding and evicted ones included."""
        return self._cache.get_seq_length()

    def get_max_cache_shape(self) -> int:
        """No limit."""
        return -1

    def get_max_length(self) -> int:
        """No limit; the name in newer versions."""
        return -1
