"""The torch oracle: attention over any set of tokens, and the merge of partial results.

Every fast path is tested against this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor


@attrs.frozen
class Partial:
    """Attention over a part of the tokens.

    output: [..., value_dim], the softmax-weighted mean of the part's values; 0 where the part is empty.
    log_sum_exp: [...], of the part's scores (natural logarithm); -inf where the part is empty.
    """

    output: Tensor
    log_sum_exp: Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which scores and sums are kept: float32, or float64 where the input is."""
    return torch.promote_types(dtype, torch.float32)


def score(query: Tensor, keys: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Return scaled scores [..., queries, tokens] of query [..., queries, dim] and keys [..., tokens, dim].

    softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118).
    """
    dtype = accumulator(query.dtype)
    scores = (query.to(dtype) * scale) @ keys.to(dtype).mT
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Partial:
    """Attend query [..., queries, key_dim] to keys [..., tokens, key_dim] and values [..., tokens, value_dim].

    mask: bool, broadcastable to [..., queries, tokens]; True is seen. A query that sees nothing gets the output 0
    and the log-sum-exp -inf. Computed in float32 at least.
    """
    scores = score(query, keys, scale=scale, softcap=softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if scores.shape[-1] == 0:
        return empty(query, values.shape[-1])
    log_sum_exp = scores.logsumexp(-1)
    weights = torch.exp(scores - finite(log_sum_exp)[..., None])
    return Partial(weights @ values.to(weights.dtype), log_sum_exp)


def empty(query: Tensor, value_dim: int) -> Partial:
    """What query [..., key_dim] gets from no tokens at all."""
    dtype, shape = accumulator(query.dtype), query.shape[:-1]
    return Partial(query.new_zeros((*shape, value_dim), dtype=dtype), query.new_full(shape, -torch.inf, dtype=dtype))


def sink(logits: Tensor, like: Partial) -> Partial:
    """A part that takes weight and gives nothing: sink logits, broadcastable to like.log_sum_exp (gpt-oss)."""
    log_sum_exp = logits.to(like.log_sum_exp.dtype).expand_as(like.log_sum_exp)
    return Partial(torch.zeros_like(like.output), log_sum_exp)


def merge(partials: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint parts. Exact: the parts' sums are weighted by their log-sum-exp."""
    if len(partials) == 1:
        return partials[0]
    logs = torch.stack([partial.log_sum_exp for partial in partials])
    total = logs.logsumexp(0)
    weights = torch.exp(logs - finite(total))
    output = sum(weight[..., None] * partial.output for weight, partial in zip(weights, partials, strict=True))
    assert isinstance(output, Tensor)  # there is at least one part
    return Partial(output, total)


def finite(log_sum_exp: Tensor) -> Tensor:
    """The same with 0 for -inf, so that the difference of two empty parts is not NaN."""
    return log_sum_exp.masked_fill(log_sum_exp == -torch.inf, 0.0)
