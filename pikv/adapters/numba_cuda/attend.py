"""Attention to encoded pages: each page is read once for all queries of a block, in parts that are merged."""

from __future__ import annotations

import functools
import math
from typing import final

import attrs
import numpy as np
import torch
from numba import cuda
from torch import Tensor

from pikv.adapters.numba_cuda.launch import launch
from pikv.adapters.numba_cuda.pages import arrays, reader
from pikv.core import attention
from pikv.core.attention import Partial
from pikv.core.ports import AttendKernel, PageCodec, Pages

AT_ONCE = 8  # queries of a KV head that share the reading of a page
SPLIT_PAGES, MOST_SPLITS = 8, 64  # a row's pages are split into parts of 8 or more, of which there are at most 64


@final
@attrs.frozen
class NumbaCudaAttend(AttendKernel):
    """See AttendKernel. Compiled at the first call."""

    codec: PageCodec

    def __call__(
        self, query: Tensor, pages: Pages, *, oldest: Tensor | None = None, page_lse: Tensor | None = None
    ) -> Partial:
        """See AttendKernel. Split by the number of pages alone, so that the same pages give the same bits."""
        form, layer, width = self.codec.form, self.codec.layer, pages.rows.shape[2]
        if not width or not query.numel():
            return attention.empty(query, layer.value_dim)
        splits = min(MOST_SPLITS, -(-width // SPLIT_PAGES))
        output = query.new_empty((splits, *query.shape[:3], layer.value_dim), dtype=torch.float32)
        lse = query.new_empty((splits, *query.shape[:3]), dtype=torch.float32)
        launch(
            attend_kernel(self.codec),
            (splits, query.shape[0] * query.shape[1], -(-query.shape[2] // AT_ONCE)),
            form.page_size,
            *arrays(form, pages.slab, "key"),
            *arrays(form, pages.slab, "value"),
            form.view(pages.slab, "positions"),
            pages.rows,
            pages.live,
            query.float() * layer.scale,
            pages.live.new_empty(0, 0) if oldest is None else oldest,
            output,
            lse,
            lse.new_empty(0, 0, 0, 0) if page_lse is None else page_lse,
        )
        return attention.merge([Partial(*part) for part in zip(output, lse, strict=True)])


@functools.cache
def attend_kernel(codec: PageCodec):
    """The kernel for these pages: a thread for each token of a page, then for each of some value channels."""
    form, layer = codec.form, codec.layer
    page_size, key_dim, value_dim = form.page_size, layer.key_dim, layer.value_dim
    read_key, read_value = reader(form.keys), reader(form.values)
    softcap = 0.0 if layer.softcap is None else layer.softcap

    @cuda.jit(device=True)
    def score(keys, key_scales, key_zeros, page, token, query, first, count, scores):
        """The scores of one token with `count` queries."""
        for q in range(count):
            scores[q] = 0.0
        for channel in range(key_dim):
            key = read_key(keys, key_scales, key_zeros, page, channel, token)
            for q in range(count):
                scores[q] += query[first + q, channel] * key
        if softcap:
            for q in range(count):
                scores[q] = softcap * math.tanh(scores[q] / softcap)

    @cuda.jit(device=True)
    def weigh(weights, peak, total, rescale, q):
        """Make weights of the scores of one query with a page; returns their log-sum-exp."""
        highest = peak[q]
        for token in range(page_size):
            highest = max(highest, weights[q, token])
        if highest == -math.inf:
            return -math.inf
        added = 0.0
        for token in range(page_size):
            weights[q, token] = math.exp(weights[q, token] - highest)
            added += weights[q, token]
        rescale[q] = math.exp(peak[q] - highest)
        total[q] = total[q] * rescale[q] + added
        peak[q] = highest
        return highest + math.log(added) if added > 0.0 else -math.inf

    @cuda.jit(device=True)
    def add_values(values, value_scales, value_zeros, page, count, weights, rescale, sums):
        """Add a page's weighted values to the sums of `count` queries."""
        for channel in range(cuda.threadIdx.x, value_dim, page_size):
            for q in range(count):
                sums[q, channel] *= rescale[q]
            for token in range(page_size):
                value = read_value(values, value_scales, value_zeros, page, token, channel)
                for q in range(count):
                    if weights[q, token] > 0.0:  # 0 times infinity is no number, and what is dead is not read
                        sums[q, channel] += weights[q, token] * value

    @cuda.jit
    def attend(
        keys,
        key_scales,
        key_zeros,
        values,
        value_scales,
        value_zeros,
        positions,
        rows,
        live,
        query,
        oldest,
        output,
        lse,
        page_lse,
    ):
        """One block for each part of a row's pages and AT_ONCE queries."""
        split, sequence, head = cuda.blockIdx.x, cuda.blockIdx.y // rows.shape[1], cuda.blockIdx.y % rows.shape[1]
        first, token = cuda.blockIdx.z * AT_ONCE, cuda.threadIdx.x
        count, width = min(AT_ONCE, query.shape[2] - first), rows.shape[2]
        weights = cuda.shared.array((AT_ONCE, page_size), np.float32)
        sums = cuda.shared.array((AT_ONCE, value_dim), np.float32)
        peak = cuda.shared.array(AT_ONCE, np.float32)  # the simulator tells shared arrays apart by their lines
        total = cuda.shared.array(AT_ONCE, np.float32)
        rescale = cuda.shared.array(AT_ONCE, np.float32)
        scores = cuda.local.array(AT_ONCE, np.float32)
        if token < count:
            peak[token], total[token] = -math.inf, 0.0
        for channel in range(token, value_dim, page_size):
            for q in range(count):
                sums[q, channel] = 0.0
        for column in range(split * width // cuda.gridDim.x, (split + 1) * width // cuda.gridDim.x):
            page, alive = rows[sequence, head, column], live[sequence, head, column] >> token & 1
            if alive:
                score(keys, key_scales, key_zeros, page, token, query[sequence, head], first, count, scores)
            for q in range(count):
                seen = alive and (oldest.shape[0] == 0 or positions[page, token] >= oldest[sequence, first + q])
                weights[q, token] = scores[q] if seen else -math.inf
            cuda.syncthreads()
            if token < count:
                rescale[token] = 1.0
                page_sum = weigh(weights, peak, total, rescale, token)
                if page_lse.shape[0]:
                    page_lse[sequence, head, first + token, column] = page_sum
            cuda.syncthreads()
            add_values(values, value_scales, value_zeros, page, count, weights, rescale, sums)
            cuda.syncthreads()
        for channel in range(token, value_dim, page_size):
            for q in range(count):
                mean = sums[q, channel] / total[q] if total[q] > 0.0 else 0.0
                output[split, sequence, head, first + q, channel] = mean
        if token < count:
            seen_any = total[token] > 0.0
            lse[split, sequence, head, first + token] = peak[token] + math.log(total[token]) if seen_any else -math.inf

    return attend
