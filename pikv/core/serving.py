"""Which kernel serves each layer: the backends are asked in order, once for each kind of layer."""

from __future__ import annotations

import attrs

from pikv.core.config import ModelConfig, RuntimeConfig
from pikv.core.errors import ConfigError
from pikv.core.ports.backend import AttendKernel, PageCodec
from pikv.core.reports import Description

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


@attrs.frozen
class Served:
    """How one layer's pages are encoded, the kernel that attends to them, and the backend that it is from."""

    codec: PageCodec
    kernel: AttendKernel
    backend: str


def serve(model: ModelConfig, runtime: RuntimeConfig) -> list[Served]:
    """One for each layer; layers alike share a kernel, and so its workspace. ConfigError if no backend serves one."""
    served: dict[PageCodec, Served] = {}
    result: list[Served] = []
    for layer in model.layers:
        form = runtime.form(layer, model.dtype)
        codec = PageCodec(compressor=runtime.compressor, layer=layer, form=form, dtype=model.dtype)
        if codec not in served:
            served[codec] = _ask(model, runtime, codec, layer_id=len(result))
        result.append(served[codec])
    return result


def _ask(model: ModelConfig, runtime: RuntimeConfig, codec: PageCodec, *, layer_id: int) -> Served:
    for backend in runtime.backends:
        kernel = backend.attend(codec, model.device)
        if kernel is not None:
            return Served(codec, kernel, backend.name)
    asked = ", ".join(backend.name for backend in runtime.backends)
    raise ConfigError(
        f"layer {layer_id}: none of the backends ({asked}) can attend to {type(codec.compressor).__name__} pages on "
        f"{model.device}; add TorchBackend() as the last one"
    )


def describe(runtime: RuntimeConfig, served: list[Served]) -> Description:
    """The parts by name, and what serves each range of layers."""
    parts = {"page_size": str(runtime.page_size), "tail_tokens": str(runtime.tail_tokens)}
    parts["budget_tokens"] = "all" if runtime.budget_tokens is None else str(runtime.budget_tokens)
    parts |= {name: repr(part) for name in _PARTS if (part := getattr(runtime, name)) is not None}
    layers: dict[str, list[int]] = {}
    for layer_id, layer in enumerate(served):
        form = layer.codec.form
        text = f"{layer.backend}: keys {form.keys}, values {form.values}, {form.stride} bytes a page"
        layers.setdefault(text, []).append(layer_id)
    return Description(parts, {f"attend, layers {_ranges(ids)}": text for text, ids in layers.items()})


def _ranges(ids: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    starts = [i for i in ids if i - 1 not in ids]
    stops = [i for i in ids if i + 1 not in ids]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))
