"""Who is judged: PiKV in a composition, and the caches that people use with transformers otherwise."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, final

import attrs
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from pikv.adapters.transformers import Host, HostCache, attach
from pikv.core.errors import ConfigError
from pikv.core.ports import SecondPassSelector
from pikv.core.runtime import RuntimeConfig


@attrs.frozen(kw_only=True)
class Held:
    """The bytes of a cache as its tensors have them. tail: what PiKV has not sealed yet, part of the total."""

    total: int
    tail: int = 0


class Contestant(abc.ABC):
    """A way to keep what a model has read. Settings only."""

    name: str

    @abc.abstractmethod
    def in_place(self, model: Any) -> contextlib.AbstractContextManager[Kept]:
        """While this is open, the model keeps what it reads in this way, and forward calls take its caches."""


class Kept(abc.ABC):
    """A contestant that is in place in a model."""

    @abc.abstractmethod
    def read(self, model: Any, ids: Tensor, chunk: int) -> Cache:
        """A cache that has read ids [batch, tokens] and has been cut, as the contestant does it."""

    @abc.abstractmethod
    def held(self, cache: Cache) -> Held:
        """The bytes of a cache."""

    @abc.abstractmethod
    def page_bytes_read(self, cache: Cache) -> tuple[int, int] | None:
        """Bytes of pages and index read by the tokens since it was cut, and what they would have read of everything.

        None for a cache that reads everything.
        """


class _KeptInTensors(Kept):
    """In a cache of transformers, whose tensors are counted and read whole."""

    @final
    def held(self, cache: Cache) -> Held:
        return Held(total=tensor_bytes(cache.layers))

    @final
    def page_bytes_read(self, cache: Cache) -> None:
        return None


def by_chunks(model: Any, cache: Cache, ids: Tensor, chunk: int) -> Cache:
    """Let a model read ids [batch, tokens], some at a time."""
    for part in ids.split(chunk, dim=1):
        model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    return cache


@final
@attrs.frozen(kw_only=True)
class Composed(Contestant):
    """PiKV with a runtime, or with parts by name, as `pikv.runtime_from` takes them."""

    name: str
    runtime: RuntimeConfig | Mapping[str, Any]

    @contextlib.contextmanager
    def in_place(self, model: Any) -> Iterator[Kept]:
        """See Contestant. Raises ConfigError for parts that do not go together, or not with this model."""
        with attach(model, self.runtime) as host:
            yield _KeptByPiKV(host)


@final
@attrs.frozen
class _KeptByPiKV(Kept):
    host: Host

    def read(self, model: Any, ids: Tensor, chunk: int) -> Cache:
        """A token selector that judges by a second pass goes over the text again before it is cut."""
        cache = by_chunks(model, self.host.new_cache(), ids, chunk)
        if isinstance(self.host.runtime.remembers, SecondPassSelector):
            self.host.rehearse(cache, ids, chunk_tokens=chunk)
        cache.pikv.finish_prefill()
        return cache

    def held(self, cache: HostCache) -> Held:
        stored = cache.pikv.stored_bytes()
        return Held(total=stored.total, tail=stored.tail)

    def page_bytes_read(self, cache: HostCache) -> tuple[int, int] | None:
        if cache.pikv.runtime.page_selector is None:
            return None
        reads = cache.pikv.page_reads()
        return reads.page_bytes + reads.index_bytes, reads.stored_bytes


@final
@attrs.frozen(kw_only=True)
class Full(Contestant):
    """transformers' DynamicCache: everything, in the model's dtype. What the others are compared with."""

    name: str = "full"

    @contextlib.contextmanager
    def in_place(self, model: Any) -> Iterator[Kept]:
        """See Contestant."""
        yield _KeptByTransformers(lambda: DynamicCache(config=model.config))


@final
@attrs.frozen(kw_only=True)
class Quantized(Contestant):
    """transformers' QuantizedCache, in 2, 4 or 8 bits. backend: "quanto" or "hqq", each a package of that name."""

    bits: int
    backend: str = "quanto"

    @property
    def name(self) -> str:
        """With its settings."""
        return f"QuantizedCache, {self.backend} {self.bits} bits"

    @contextlib.contextmanager
    def in_place(self, model: Any) -> Iterator[Kept]:
        """See Contestant."""
        yield _KeptByTransformers(
            lambda: QuantizedCache(backend=self.backend, config=model.config, nbits=self.bits, residual_length=128)
        )


@final
@attrs.frozen
class _KeptByTransformers(_KeptInTensors):
    new_cache: Any

    def read(self, model: Any, ids: Tensor, chunk: int) -> Cache:
        return by_chunks(model, self.new_cache(), ids, chunk)


@final
@attrs.frozen(kw_only=True)
class Press(Contestant):
    """A press of kvpress by its class's name, which cuts a prompt that is read in one piece.

    ratio: kvpress's compression_ratio, the share of tokens that it is to remove; what is freed is counted instead.
    """

    press: str
    ratio: float

    @property
    def name(self) -> str:
        """With its ratio."""
        return f"kvpress {self.press}, {self.ratio:g} removed"

    @contextlib.contextmanager
    def in_place(self, model: Any) -> Iterator[Kept]:
        """See Contestant. Raises ConfigError where kvpress is not installed, or has no such press."""
        yield _KeptByPress(model.config, self._made())

    def _made(self) -> Any:
        try:
            import kvpress  # here, since it pins old versions of transformers and is rarely installed
        except ImportError as error:
            raise ConfigError(f"{self.name}: kvpress is not installed ({error}); pip install pikv[peers]") from error
        made = getattr(kvpress, self.press, None)
        if made is None:
            presses = ", ".join(sorted(name for name in dir(kvpress) if name.endswith("Press")))
            raise ConfigError(f"kvpress has no {self.press}; it has {presses}")
        if self.press == "AdaKVPress":  # it wraps another press, in its paper SnapKV, and has no ratio of its own
            return made(kvpress.SnapKVPress(compression_ratio=self.ratio))
        return made(compression_ratio=self.ratio)


@final
@attrs.frozen
class _KeptByPress(_KeptInTensors):
    config: Any
    press: Any

    def read(self, model: Any, ids: Tensor, chunk: int) -> Cache:
        with self.press(model):
            return by_chunks(model, DynamicCache(config=self.config), ids, ids.shape[1])


def tensor_bytes(holder: Any) -> int:
    """The bytes of all tensors in a cache, quantized ones by what they are made of; each storage once."""
    storages: dict[int, int] = {}
    _collect(holder, storages, set())
    return sum(storages.values())


def _collect(holder: Any, storages: dict[int, int], seen: set[int]) -> None:
    if id(holder) in seen:
        return
    seen.add(id(holder))
    if isinstance(holder, Tensor):
        inner = getattr(holder, "__tensor_flatten__", None)
        if inner is not None and type(holder) is not Tensor:
            for name in inner()[0]:
                _collect(getattr(holder, name), storages, seen)
        else:
            storage = holder.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(holder, list | tuple | dict):
        for value in holder.values() if isinstance(holder, dict) else holder:
            _collect(value, storages, seen)
    elif type(holder).__module__.startswith("transformers.cache_utils"):
        _collect(vars(holder), storages, seen)
