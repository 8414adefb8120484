"""What the kernels of every backend are checked for against torch's: the same bytes, choices, refusals and answers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import pikv
from pikv.adapters.compressors import Int8
from pikv.core.exact import Exact
from pikv.core.ports import Backend, IndexedPages, NewPages, PageCodec, PageIndex
from pikv.core.tail import Tail
from pikv.core.torch_backend import TorchBackend
from pikv.policies import Quest
from pikv.testing.backend import CPU, codec

NUMBERS = st.sampled_from([0.0, -0.0, 1e-30, -1e-8, 3e-8, 0.1, -0.5, 1.0, 1 / 3, 77.7, -1000.0, 65280.0, -65280.0])


def one_page(states: Tensor, slots: Tensor) -> tuple[Tail, NewPages]:
    """A tail of keys and values [2, 1, 1, tokens, dim], and the page of its slots [1, page_size]."""
    (keys, values), tokens = states, states.shape[3]
    positions = torch.arange(tokens, dtype=torch.int32).view(1, 1, tokens)
    zero = torch.zeros(1, dtype=torch.int64)
    tail = Tail(keys, values, positions, torch.tensor([[tokens]]), values.shape[-1])
    return tail, NewPages(sequence=zero, head=zero, slots=slots)


def check_seals_as_torch(backend: Backend, each: PageCodec, tail: Tail, new: NewPages) -> None:
    """Codes, scales, zeros, padding, and Quest's index, bit for bit."""
    sealed = []
    for sealing in (TorchBackend(), backend):
        out = torch.zeros(1, each.form.stride, dtype=torch.uint8)
        sealed.append((out, sealing.seal(each, Quest(), CPU)(tail, new, out)))
    assert torch.equal(sealed[0][0], sealed[1][0])
    assert torch.equal(sealed[0][1], sealed[1][1])


def check_chooses_as_torch(
    backend: Backend, data: st.DataObject, generator: torch.Generator, *, kv_heads: int, group: int, width: int
) -> None:
    """Whole numbers, whose sums are exact: the chosen scores are the same, ties or not, infinities included."""
    selector = Quest(pages=data.draw(st.integers(1, 40)))
    each = codec(Exact(), kv_heads=kv_heads, group=group, key_dim=32)
    largest = data.draw(st.sampled_from([0, 1, 9]))
    count = 2 * kv_heads * width
    index = torch.randint(-largest, largest + 1, (count, 2, 32), generator=generator).half().sort(1).values
    if data.draw(st.booleans()):
        index[0, 1, 0] = torch.inf
    query = torch.randint(-largest, largest + 1, (2, kv_heads, group, 32), generator=generator).float()
    counts = torch.randint(1, width + 1, (2, kv_heads), generator=generator)
    ids = torch.randperm(count, generator=generator).int().view(2, kv_heads, width)
    pages = IndexedPages(index=index, ids=ids, counts=counts)
    chosen = [choosing.choose(selector, each, CPU)(query, pages) for choosing in (TorchBackend(), backend)]
    present = torch.arange(width) < counts[..., None]
    scores = selector.score(PageIndex(arrays=index[ids], present=present, layer=each.layer), query)
    scores = scores.clamp(max=1e9).masked_fill(~present, -torch.inf)  # of infinite sums and others that are no numbers
    one, other = (scores.gather(-1, choice.columns).sort(-1).values for choice in chosen)
    assert torch.equal(chosen[0].reads, chosen[1].reads)
    assert torch.equal(one, other)


def check_refuses_what_float16_cannot_hold(
    backend: Backend, model: pikv.ModelConfig, tokens: int, **parts: int
) -> None:
    """With the compressor's own words, and nothing is lost. parts: of a composition, beside the compressor."""
    cache = pikv.compose(model, compressor=Int8(), tail_tokens=1, backends=[backend, TorchBackend()], **parts)
    k, v = torch.randn(2, 1, 1, tokens, model.layers[0].key_dim)
    v[0, 0, 10, 3] = -1e6
    cache.update(0, 0, k, v)
    with pytest.raises(pikv.InputError, match="values must lie within float16"):
        cache.finish_prefill()
    assert int(cache.retrieve(0).mask.sum()) == tokens


def check_decodes_as_torch(
    backend: Backend, model: pikv.ModelConfig, parts: dict[str, object], *, batch: int, stops: list[int], **close: float
) -> str:
    """Updates that end at `stops` are sealed, chosen from and attended to: what torch answers. What `describe` says."""
    caches = [pikv.compose(model, **parts, backends=each) for each in ([TorchBackend()], [backend, TorchBackend()])]
    layer, generator = model.layers[0], torch.Generator().manual_seed(0)
    k, v = torch.randn(2, batch, layer.kv_heads, stops[-1], layer.key_dim, generator=generator)
    q = torch.randn(batch, layer.query_heads, stops[-1], layer.key_dim, generator=generator)
    for start, stop in zip([0, *stops], stops, strict=False):
        for cache in caches:
            cache.update(0, start, k[:, :, start:stop], v[:, :, start:stop])
        outputs = [cache.attend(0, q[:, :, start:stop]) for cache in caches]
        torch.testing.assert_close(*outputs, **close)
    return str(caches[1].describe())
