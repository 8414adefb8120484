"""Which kernel serves each layer: the backends are asked in order, once for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from pikv.core.config import ModelConfig
from pikv.core.errors import ConfigError
from pikv.core.missing_backend import MissingBackend
from pikv.core.ports.backend import AttendKernel, Backend, ChooseKernel, PageCodec, SealKernel
from pikv.core.reports import Description
from pikv.core.runtime import RuntimeConfig
from pikv.core.turned import attend_kernel, seal_kernel

_PARTS = (
    "compressor",
    "token_selector",
    "page_selector",
    "allocator",
    "router",
    "when_full",
    "sharding",
    "transport",
)


@attrs.frozen(kw_only=True)
class Served:
    """How one layer's pages are encoded, and the kernels for them. choose: None without a page selector.

    backends: the backend of each kernel, by the kernel's name.
    """

    codec: PageCodec
    attend: AttendKernel
    seal: SealKernel
    choose: ChooseKernel | None = None
    backends: dict[str, str] = attrs.field(eq=False)


def serve(model: ModelConfig, runtime: RuntimeConfig) -> list[Served]:
    """One for each layer; layers alike share a kernel, and so its workspace. ConfigError if no backend serves one."""
    served: dict[PageCodec, Served] = {}
    result: list[Served] = []
    for layer_id, layer in enumerate(model.layers):
        form, compressor = runtime.form(model, layer_id), runtime.compressor_of(model, layer_id)
        codec = PageCodec(compressor=compressor, layer=layer, form=form, dtype=model.dtype)
        if codec not in served:
            served[codec] = _ask(model, runtime, codec, layer_id=layer_id)
        result.append(served[codec])
    return result


def _ask(model: ModelConfig, runtime: RuntimeConfig, codec: PageCodec, *, layer_id: int) -> Served:
    selector, device = runtime.page_selector, model.device
    steps: dict[str, Callable[[Backend], Any]] = {
        "attend": lambda backend: attend_kernel(backend, codec, device),
        "seal": lambda backend: seal_kernel(backend, codec, selector, device),
    }
    if selector is not None:
        steps["choose"] = lambda backend: backend.choose(selector, codec, device)
    kernels, backends = {}, {}
    for step, kernel_of in steps.items():
        offered = ((kernel_of(backend), backend.name) for backend in runtime.backends)
        found = next(((kernel, name) for kernel, name in offered if kernel is not None), None)
        if found is None:
            asked = ", ".join(backend.name for backend in runtime.backends)
            raise ConfigError(
                f"layer {layer_id}: none of the backends ({asked}) can {step} {type(codec.compressor).__name__} pages "
                f"on {device}; add TorchBackend() as the last one"
            )
        kernels[step], backends[step] = found
    return Served(codec=codec, backends=backends, **kernels)


def describe(runtime: RuntimeConfig, served: list[Served]) -> Description:
    """The parts by name, what is not installed, and what serves each range of layers."""
    parts = {"page_size": str(runtime.page_size), "tail_tokens": str(runtime.tail_tokens)}
    parts["budget_tokens"] = "all" if runtime.budget_tokens is None else str(runtime.budget_tokens)
    parts |= {name: repr(part) for name in _PARTS if (part := getattr(runtime, name)) is not None}
    missing = [backend.name for backend in runtime.backends if isinstance(backend, MissingBackend)]
    parts |= {"not installed": "; ".join(missing)} if missing else {}
    layers: dict[tuple[str, str], list[int]] = {}
    for layer_id, layer in enumerate(served):
        form = layer.codec.form
        for step, backend in layer.backends.items():
            text = f"{backend}: keys {form.keys}, values {form.values}, {form.stride} bytes a page"
            layers.setdefault((step, text if step == "attend" else backend), []).append(layer_id)
    return Description(parts, {f"{step}, layers {_ranges(ids)}": text for (step, text), ids in layers.items()})


def _ranges(ids: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    starts = [i for i in ids if i - 1 not in ids]
    stops = [i for i in ids if i + 1 not in ids]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))
