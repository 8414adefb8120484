"""Attaching PiKV to a transformers model, and giving the model back as it was."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pikv.adapters.transformers import attention
from pikv.adapters.transformers.cache import HostCache
from pikv.adapters.transformers.experts import observe
from pikv.adapters.transformers.families import model_config
from pikv.adapters.transformers.latent import latent_kv
from pikv.adapters.transformers.padding import Seen
from pikv.adapters.transformers.recovery import Reader, Recovered
from pikv.adapters.transformers.weights import fingerprint_of, weights_of
from pikv.compose import installed_backends, runtime_from
from pikv.core.cache import PiKVCache
from pikv.core.checkpoint import beside, streamer_of
from pikv.core.config import ModelConfig
from pikv.core.errors import ConfigError, InputError, StateError
from pikv.core.pool import PagePool
from pikv.core.ports import Backend, Version
from pikv.core.runtime import RuntimeConfig
from pikv.core.salvage import Salvage


def attach(
    hf_model: nn.Module,
    runtime: RuntimeConfig | Mapping[str, Any] | None = None,
    *,
    backends: Iterable[Backend] | None = None,
) -> Host:
    """Make a transformers model attend through PiKV caches.

    runtime: a RuntimeConfig, or names as `pikv.runtime_from` takes them; exact by default. backends: those asked for
    kernels; the installed ones by default, torch last. The model goes on working with other caches and without one.

    Raises ConfigError for a family that is not supported or a composition that cannot work, before anything changes.
    """
    model = model_config(hf_model)
    composed = _composed(model, runtime, backends)
    one_page = PagePool(model, composed, capacity_bytes=max(form.stride for form in composed.forms(model)))
    PiKVCache(model, composed, pool=one_page)  # a composition that cannot work is refused now
    return Host(hf_model, model, composed)


def _composed(
    model: ModelConfig, runtime: RuntimeConfig | Mapping[str, Any] | None, backends: Iterable[Backend] | None
) -> RuntimeConfig:
    if not isinstance(runtime, RuntimeConfig | Mapping | None):
        raise ConfigError(f"runtime must be a RuntimeConfig or a mapping of names, got {runtime!r}")
    named = runtime if isinstance(runtime, RuntimeConfig) else runtime_from(runtime or {}, model)
    chosen = installed_backends(model.device) if backends is None else tuple(backends)
    return attrs.evolve(named, backends=chosen)


class Host:
    """A transformers model that PiKV is attached to. `detach()` gives it back; also a context manager."""

    def __init__(self, hf_model: Any, model: ModelConfig, runtime: RuntimeConfig) -> None:
        self.model, self.runtime = model, runtime
        self._hf_model, self._latent = hf_model, latent_kv(hf_model.base_model.layers[0].self_attn)
        self._before: str = hf_model.config._attn_implementation
        if self._before == attention.NAME:
            raise StateError("PiKV is attached to this model already; use that host, or detach it first")
        self._hooks: list[RemovableHandle] = [] if runtime.router is None else observe(hf_model)
        attention.register()
        hf_model.set_attn_implementation(attention.NAME)
        self._hooks += [
            hf_model.base_model.register_forward_pre_hook(functools.partial(_begin, model), with_kwargs=True),
            hf_model.base_model.register_forward_hook(_finish, with_kwargs=True, always_call=True),
        ]

    def new_cache(
        self, *, pool: PagePool | None = None, prefix_from: PagePool | None = None, wait_s: float | None = None
    ) -> HostCache:
        """An empty cache for one batch, to pass as `past_key_values`. pool: shared by several caches.

        prefix_from: a pool to share and to adopt known prefixes from, see PiKVCache.begin. The model's first call then
        computes what is not covered, and returns hidden states and logits of those tokens alone, as `generate` takes
        them. wait_s: another process computes the prompt, and each layer waits so long for its pages. Raises InputError
        for two pools, and for waiting without a prefix_store.
        """
        if pool is not None and prefix_from is not None:
            raise InputError("pool and prefix_from both name the cache's pool; give prefix_from alone")
        if wait_s is not None and (prefix_from is None or self.runtime.prefix_store is None):
            raise InputError("wait_s needs prefix_from=pool, and a prefix_store in the runtime to wait for pages from")
        announce = None if prefix_from is None else functools.partial(self._announce, wait_s=wait_s)
        return HostCache(PiKVCache(self.model, self.runtime, pool=pool or prefix_from), self._latent, announce)

    def _announce(self, cache: PiKVCache, token_ids: Tensor, *, wait_s: float | None) -> Tensor:
        """Announce a prompt. Other processes are told of weights by their numbers, this one by whose they are."""
        name = weights_of if self.runtime.prefix_store is None else fingerprint_of
        return cache.begin(token_ids, weights=name(self._hf_model), wait_s=wait_s)

    def restore(
        self, version: Version | None = None, *, pool: PagePool | None = None, may_differ: Iterable[str] = ()
    ) -> HostCache:
        """The cache of a version that HostCache.commit has made, the newest by default; see PiKVCache.restore.

        `cache.token_ids` is what it has read; `cache.crop(-1)` makes `generate` read the last of it again and go on.
        Raises as PiKVCache.restore does, and VersionError for a version of another origin.
        """
        streamer = streamer_of(self.runtime)
        version = streamer.newest() if version is None else version
        cache = PiKVCache.restore(self.model, self.runtime, version, pool=pool, may_differ=may_differ)
        return HostCache(cache, self._latent, seen=Seen.of(beside(streamer.manifest(version))))

    def recover(
        self,
        version: Version | None = None,
        *,
        pool: PagePool | None = None,
        may_differ: Iterable[str] = (),
        chunk_tokens: int = 512,
    ) -> Recovered:
        """As `restore`, but the model reads the tokens of missing or damaged pages again, chunk_tokens at a time.

        Where tokens were evicted, or pages are written in a basis, it reads everything again. Raises DamagedError where
        the version's document or states are damaged; StateError if the tokens came as embeddings; else as `restore`.
        """
        salvage = Salvage.of(self.model, self.runtime, version, pool=pool, may_differ=may_differ)
        reader = Reader(
            model=self._hf_model.base_model,
            wrapped=lambda cache, seen: HostCache(cache, self._latent, seen=seen),
            chunk_tokens=chunk_tokens,
        )
        seen = Seen.of(beside(salvage.manifest))
        return reader.recovered(salvage, seen, lambda: PiKVCache(self.model, self.runtime, pool=pool))

    def rehearse(self, cache: HostCache, input_ids: Tensor, *, chunk_tokens: int = 512) -> None:
        """Go over a prompt a second time, for a token selector that judges by it (KVzip); right after the prompt.

        input_ids [batch, tokens]: a request to repeat the text, and the text; read in chunks. The cache has seen no
        more tokens afterwards, and is cut at the first decoded token. Raises StateError where a second pass has no
        place; see PiKVCache.rehearsal.
        """
        with cache.rehearsal(), torch.no_grad():
            for chunk in input_ids.split(chunk_tokens, dim=1):
                self._hf_model.base_model(input_ids=chunk, past_key_values=cache)

    def detach(self) -> None:
        """Give the model back as it was. Its caches can still be read, and no longer be used with it."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._hf_model.set_attn_implementation(self._before)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _begin(
    model: ModelConfig, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the model: tell its cache which tokens come, and its attention which cache it is."""
    given = {**_named(module, args), **kwargs}
    cache = _cache(given)
    if cache is None:
        return args, kwargs
    if cache.pikv.model != model:
        raise InputError("this cache was made for a model of another shape; use the caches of this model's own host")
    if given.get("use_cache") is False:
        raise InputError("use_cache must not be False when a cache is passed; leave one of the two out")
    if given.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise InputError("output_attentions must be off: PiKV's attention keeps no matrix of weights; detach() for it")
    if module.config._attn_implementation != attention.NAME:
        raise StateError(
            f"the model's attention was changed to {module.config._attn_implementation!r} after PiKV was attached, and "
            "would not look into its cache; leave it as attach set it, or host.detach() and use another cache"
        )
    new = given.get("input_ids")
    new = given.get("inputs_embeds") if new is None else new
    if new is None:
        raise InputError("the model needs input_ids or inputs_embeds, got neither")
    given = cache.adopt(given)
    new = given["input_ids"] if given.get("inputs_embeds") is None else new
    given[attention.STEP] = cache.begin(new.shape[0], new.shape[1], given)
    given["attention_mask"] = attention.no_mask()
    return (), given


def _finish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache, step = _cache(kwargs), kwargs.get(attention.STEP)
    if cache is None or step is None:  # no step: the call was refused
        return
    if output is None or not step.complete:
        cache.take_back(step)
    else:
        cache.finish(step)
    if output is not None and not step.complete:
        raise StateError(
            f"{step.attended} of {len(step.cache.model.layers)} layers attended through PiKV, so the call was taken "
            "back: this version of transformers does not hand the model's keywords down to all of its attention"
        )


def _named(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """The positional arguments by their names."""
    return dict(inspect.signature(module.forward).bind_partial(*args).arguments) if args else {}


def _cache(given: dict[str, Any]) -> HostCache | None:
    """The PiKV cache among the arguments, whatever the model calls it."""
    return next((value for value in given.values() if isinstance(value, HostCache)), None)
